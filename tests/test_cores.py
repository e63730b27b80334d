"""How many cores a process may use, and what is fitted to them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_selfdistill import cores
from timm_selfdistill.data import loaders as building
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.loaders import build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.recipe import AugmentSection, DataSection


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores, whose control groups are in the folder `groups`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def groups(machine: Path, membership: str, **files: str) -> None:
    (machine / "cgroup").write_text(membership)
    for name, text in files.items():
        path = machine / "groups" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")).write_text(text)


def test_without_a_quota_the_cores_are_those_that_the_process_is_bound_to(machine: Path) -> None:
    assert cores.available_cores() == 8
    groups(machine, "0::/\n", cpu_max="max 100000\n")
    assert cores.available_cores() == 8


@pytest.mark.parametrize(("quota", "expected"), [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1)])
def test_a_container_with_a_quota_has_fewer(machine: Path, quota: str, expected: int) -> None:
    groups(machine, "0::/\n", cpu_max=quota)
    assert cores.available_cores() == expected


def test_the_smallest_quota_of_all_groups_counts(machine: Path) -> None:
    files = {"cpu_max": "max 100000", "user__cpu_max": "300000 100000", "user__job__cpu_max": "500000 100000"}
    groups(machine, "1:memory:/user\n0::/user/job\n", **files)
    assert cores.available_cores() == 3


def test_groups_of_the_first_version_have_quotas_too(machine: Path) -> None:
    files = {"cpu__cpu_cfs_quota_us": "400000\n", "cpu__cpu_cfs_period_us": "100000\n"}
    groups(machine, "4:cpu,cpuacct:/docker/abc\n2:cpuset:/\n", **files)
    assert cores.available_cores() == 4
    (machine / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores.available_cores() == 8


def test_processes_that_were_launched_together_share(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores.share_of_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores.share_of_cores() == 1


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that torch was told; the last is what it has, at first eight."""
    told = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return told


@pytest.mark.parametrize(("before", "variable", "after"), [(8, None, 2), (1, None, 1), (8, "8", None)])
def test_threads_fit_the_cores_unless_the_environment_says_how_many(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[int],
    before: int,
    variable: str | None,
    after: int | None,
) -> None:
    groups(machine, "0::/\n", cpu_max="200000 100000")
    chosen[:] = [before]
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    cores.fit_threads()
    assert chosen == ([before] if after is None else [before, after])


@pytest.mark.parametrize(
    ("available", "device", "wanted", "given", "processes", "threads"),
    [
        (1, "cpu", None, None, 0, 1),
        (2, "cpu", None, None, 0, 2),
        (4, "cpu", None, None, 1, 3),
        (8, "cpu", None, None, 2, 6),
        (2, "cpu", None, "1", 1, 1),
        (8, "cpu", None, "6", 2, 6),
        (2, "cpu", None, "8", 0, 8),
        (1, "cuda", None, None, 1, 1),
        (4, "cuda", None, None, 3, 1),
        (8, "cuda", None, None, 4, 4),
        # What is asked for holds as far as there are cores.
        (8, "cpu", 0, None, 0, 8),
        (8, "cpu", 5, None, 5, 3),
        (2, "cpu", 5, None, 2, 1),
    ],
)
def test_threads_and_loader_processes_together_fit_the_cores(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[int],
    available: int,
    device: str,
    wanted: int | None,
    given: str | None,
    processes: int,
    threads: int,
) -> None:
    groups(machine, "0::/\n", cpu_max=f"{available}00000 100000")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        chosen.append(int(given))
    found = cores.loader_processes(wanted, device)
    cores.fit_threads(beside=found)
    assert (found, chosen[-1]) == (processes, threads)


@pytest.mark.parametrize(("asked", "started"), [(None, 2), (5, 5), (9, 8), (1, 1), (0, 0)])
def test_loaders_leave_the_cores_that_torch_computes_with(
    machine: Path, chosen: list[int], asked: int | None, started: int
) -> None:
    config = InputConfig(1, (16, 16), (0.5,), (0.5,), "bilinear", 1.0)
    section = DataSection(path="digits", workers=asked)
    options: dict[str, Any] = {"batch_size": 8, "accelerator_shards": (0, 1), "seed": 0}
    loaders = build_loaders(open_dataset(section, 0), section, AugmentSection(), config, **options)
    assert (loaders.train.num_workers, loaders.eval.num_workers) == (started, started)
    assert chosen[-1] == max(1, 8 - started)


def test_all_cores_fill_the_cache_because_nothing_computes_yet(
    machine: Path, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(machine, "0::/\n", cpu_max="200000 100000")
    found: list[int] = []
    monkeypatch.setattr(building, "cache_splits", lambda *splits, workers, **options: found.append(workers) or {})
    config = InputConfig(1, (16, 16), (0.5,), (0.5,), "bilinear", 1.0)
    section = DataSection(path="digits", cache="device")
    options: dict[str, Any] = {"batch_size": 8, "accelerator_shards": (0, 1), "seed": 0}
    build_loaders(open_dataset(section, 0), section, AugmentSection(), config, **options)
    assert (found, chosen[-1]) == ([2], 2)
