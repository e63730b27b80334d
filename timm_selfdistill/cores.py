"""The CPU cores that this process may use, and the threads and loader processes that fit them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return how many cores this process may use: those it is bound to, or fewer where a container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas()])))


def share_of_cores() -> int:
    """Return how many of the cores are this process's, where processes that were launched together share them."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fit_threads() -> None:
    """Let torch compute with no more threads than this process has cores, unless OMP_NUM_THREADS says how many.

    torch counts the cores of the machine, whatever the quota. Without torch, nothing is done.
    """
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        # Never more than torch's choice, which leaves out the second threads of a core.
        torch.set_num_threads(min(share_of_cores(), torch.get_num_threads()))


def _quotas() -> Iterator[float]:
    """Yield the cores that this process's control groups and those that hold them grant, of version 2 or 1."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # of no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = _CONTROL_GROUPS / "cpu" if controllers else _CONTROL_GROUPS
        # In a container the path may be that outside of it; then its own group is at the top.
        for folder in {top, *(top / part for part in _prefixes(path))}:
            quota = _quota(folder, version=1 if controllers else 2)
            if quota is not None:
                yield quota


def _prefixes(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


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
