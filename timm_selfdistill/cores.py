"""The CPU cores that this process may use, and the threads and loader processes that fit them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Loader processes where nobody says how many.
MAX_WORKERS: Final = 4

_MEMBERSHIP = Path("/proc/self/cgroup")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return how many cores this process may use: those it is bound to, or fewer where a container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas()])))


def share_of_cores() -> int:
    """Return how many of the cores are this process's, where processes that were launched together share them."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fit_threads(beside: int = 0) -> None:
    """Let torch compute with no more threads than this process has cores, unless OMP_NUM_THREADS says how many.

    torch counts the cores of the machine, whatever the quota. Without torch, nothing is done.

    Args:
        beside: Loader processes of this process, which have a core each.
    """
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        # Never more than torch's choice, which leaves out the second threads of a core.
        torch.set_num_threads(max(1, min(share_of_cores() - beside, torch.get_num_threads())))


def loader_processes(wanted: int | None, device_type: str) -> int:
    """Return how many loader processes there are beside the threads that compute.

    Args:
        wanted: What was asked for, which holds as far as there are cores. By default no two processes or threads fight
            over a core: where the CPU computes, up to four get the cores that OMP_NUM_THREADS leaves, or a quarter of
            all; elsewhere, all but the one that feeds the device.
        device_type: Where the network runs, as torch calls it.
    """
    share = share_of_cores()
    if wanted is not None:
        return min(wanted, share)
    if device_type != "cpu":
        return min(MAX_WORKERS, max(1, share - 1))
    torch = sys.modules.get("torch")
    free = share - torch.get_num_threads() if torch is not None and "OMP_NUM_THREADS" in os.environ else share // 4
    return max(0, min(MAX_WORKERS, free))


def _quotas() -> Iterator[float]:
    """Yield the cores that this process's control groups and those that hold them grant, of version 2 or 1."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = _CONTROL_GROUPS / "cpu" if controllers else _CONTROL_GROUPS
        # In a container the path may be that outside of it; then its own group is at the top.
        own = Path(path.strip("/"))
        for folder in (own, *own.parents):
            quota = _quota(top / folder, version=1 if controllers else 2)
            if quota is not None:
                yield quota


def _quota(folder: Path, version: int) -> float | None:
    """Return the cores that one control group grants, or None if it has no quota."""
    try:
        if version == 2:
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(allowed) / int(period) if allowed not in ("max", "-1") else None
    except (OSError, ValueError):
        return None
