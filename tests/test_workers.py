"""Loader processes and signals."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from timm_selfdistill.data import workers
from timm_selfdistill.data.workers import signal_free_context, worker_options

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Numbers:
    """Numbers, each of which takes a while."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return index


def mask_of_this_process(answers: Any) -> None:
    answers.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_a_signal_to_loader_processes_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    loader = DataLoader(Numbers(), batch_size=4, **worker_options(2))
    batches = iter(loader)
    answers = [next(batches)]
    sender = os.fork()  # not their parent, which may end them
    if sender == 0:
        for worker in batches._workers:
            for number in SIGNALS:
                os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(sender, 0)
    answers += batches
    assert torch.cat(answers).tolist() == list(range(40))


def test_the_signals_are_blocked_from_the_first_moment_on() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    context = signal_free_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=mask_of_this_process, args=(answers,))
    process.start()
    assert set(SIGNALS) <= answers.get()
    process.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_loader_process_that_hangs_is_ended_by_its_parent() -> None:
    batches = iter(DataLoader(Numbers(seconds=600), **worker_options(1)))
    (worker,) = batches._workers
    time.sleep(0.5)
    worker.terminate()
    worker.join(300)
    assert worker.exitcode == 0


def test_loader_processes_end_when_their_parent_is_killed() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        batches = iter(DataLoader(Numbers(), **worker_options(2)))
        next(batches)
        os.write(writer, " ".join(str(worker.pid) for worker in batches._workers).encode())
        time.sleep(600)
    workers = [psutil.Process(int(pid)) for pid in os.read(reader, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    gone, alive = psutil.wait_procs(workers, timeout=300)
    assert (len(gone), alive) == (2, [])


def test_asking_for_options_does_not_choose_how_processes_start() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    assert worker_options(0)["multiprocessing_context"] is None
    assert multiprocessing.get_start_method(allow_none=True) == before


# As the standard library is on Windows; there is none here to try it on.
WINDOWS = """
import select, signal, sys
from multiprocessing import context
for module, names in (
    (signal, ["SIGUSR1", "pthread_sigmask", "sigwait", "sigwaitinfo"]),
    (select, ["poll"]),
    (context, ["ForkContext", "ForkProcess", "ForkServerContext", "ForkServerProcess"]),
):
    for name in names:
        delattr(module, name)
from timm_selfdistill.data import workers
from timm_selfdistill.program import _reader_is_gone, run_safely
from timm_selfdistill.stop import PREEMPTIONS

assert run_safely(lambda: None) == 0 and not _reader_is_gone()
with workers._blocked():
    workers.signal_free_context("spawn").Process
workers._begin(0, init=print)
print(list(workers._PROCESSES), *PREEMPTIONS, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
"""


def test_what_windows_does_not_have_is_not_needed() -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", f"['spawn'] {signal.SIGTERM!s} True"]


def test_where_the_sender_of_a_signal_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: a loader process that is told to end gives the one that started it time to save."""
    done: list[object] = []

    def end(status: int) -> None:
        done.append(status)
        raise SystemExit

    monkeypatch.delattr(signal, "sigwaitinfo")
    monkeypatch.setattr(signal, "sigwait", lambda signals: signal.SIGTERM)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: multiprocessing.current_process())
    monkeypatch.setattr(time, "sleep", done.append)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        workers._end_if_told()
    assert done == [workers._PATIENCE_SECONDS, 0]
