"""Loader processes that leave the signals that stop a run to the process that started them.

Ctrl-C in a terminal and many schedulers signal the whole process group. A loader process that reacted would raise in
the middle of an image, or die and end the run, before the main process has saved anything.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import context, resource_tracker
from typing import Any, Final

# Those that `train` handles.
_LEFT_TO_MAIN: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def worker_options(workers: int, init: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Return the arguments of a `DataLoader` whose processes leave signals to this one; 0 loads in this one.

    Such a process ends when this one ends it or is gone, as any loader process does. `init` is called in each with its
    index.
    """
    # Read in a way that does not choose it for the rest of the program.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return {
        "num_workers": workers,
        "worker_init_fn": partial(_begin, init=init),
        # torch refuses one for a loader without processes.
        "multiprocessing_context": signal_free_context(method) if workers else None,
    }


def signal_free_context(method: str) -> context.BaseContext:
    """Return a context of a start method whose processes have the signals blocked from their first moment on."""
    if method != "fork":
        resource_tracker.ensure_running()  # a start in the body of `_blocked` would unblock the signals
    start_context, process = _START_METHODS[method]
    free: Any = start_context()
    free.Process = process
    return free  # type: ignore[no-any-return]  # a context, of which the line before replaces a class


def _begin(worker: int, *, init: Callable[[int], None] | None) -> None:
    """Set up a loader process."""
    # Processes do not inherit the blocking from a fork server that ran before.
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)
    threading.Thread(target=_end_if_told, daemon=True, name="signals").start()
    if init is not None:
        init(worker)


def _end_if_told() -> None:
    """Take the blocked signals; end the process if its parent terminates it, as torch does with one that hangs."""
    parent = multiprocessing.parent_process()
    while True:
        received = signal.sigwaitinfo(_LEFT_TO_MAIN)
        if received.si_signo == signal.SIGTERM and parent is not None and received.si_pid == parent.pid:
            os._exit(0)


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals in the body, for processes that start there; in this process they arrive after the body."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SignalFree:
    def start(self) -> None:
        with _blocked():
            super().start()  # type: ignore[misc]  # of the process that this class is mixed into


# At module level each, because a spawned process is pickled by the name of its class.
class _ForkProcess(_SignalFree, context.ForkProcess):
    pass


class _SpawnProcess(_SignalFree, context.SpawnProcess):
    pass


class _ForkServerProcess(_SignalFree, context.ForkServerProcess):
    pass


_START_METHODS: Final = {
    "fork": (context.ForkContext, _ForkProcess),
    "spawn": (context.SpawnContext, _SpawnProcess),
    "forkserver": (context.ForkServerContext, _ForkServerProcess),
}
