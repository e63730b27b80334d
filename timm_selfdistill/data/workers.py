"""Loader processes that leave the signals that stop a run to the process that started them.

Ctrl-C in a terminal and many schedulers signal the whole process group. A loader process that reacted would raise in
the middle of an image, or die and end the run, before the main process has saved anything.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from multiprocessing import context, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Final

from timm_selfdistill.stop import PREEMPTIONS

# Those that `train` handles.
_LEFT_TO_MAIN: Final = (signal.SIGINT, *PREEMPTIONS)
# Where the sender of a signal is not known, as on macOS, how long the parent has to save before its loaders end.
_PATIENCE_SECONDS: Final = 10.0
_CAN_BLOCK: Final = hasattr(signal, "pthread_sigmask")  # not on Windows, where only Ctrl-C reaches all processes


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
    own: Any = copy(multiprocessing.get_context(method))
    own.Process = _PROCESSES[method]
    found: context.BaseContext = own
    return found


def _begin(worker: int, *, init: Callable[[int], None] | None) -> None:
    """Set up a loader process."""
    if _CAN_BLOCK:
        # Processes do not inherit the blocking from a fork server that ran before.
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)
        threading.Thread(target=_end_if_told, daemon=True, name="signals").start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if init is not None:
        init(worker)


def _end_if_told() -> None:
    """Take the blocked signals; end the process if its parent terminates it, as torch does with one that hangs."""
    parent = multiprocessing.parent_process()
    while True:
        if hasattr(signal, "sigwaitinfo"):
            received = signal.sigwaitinfo(_LEFT_TO_MAIN)
            number, sender = received.si_signo, received.si_pid
        else:  # macOS does not tell who sent it
            number, sender = signal.sigwait(_LEFT_TO_MAIN), None
        if number == signal.SIGTERM and parent is not None and sender in (None, parent.pid):
            if sender is None:
                time.sleep(_PATIENCE_SECONDS)
            os._exit(0)


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals in the body, for processes that start there; in this process they arrive after the body."""
    if not _CAN_BLOCK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SignalFree(BaseProcess):
    def start(self) -> None:
        with _blocked():
            super().start()


# At module level each, because a spawned process is pickled by the name of its class.
class _SpawnProcess(_SignalFree, context.SpawnProcess):
    pass


_PROCESSES: Final[dict[str, type[BaseProcess]]] = {"spawn": _SpawnProcess}
if hasattr(context, "ForkProcess"):  # not on Windows

    class _ForkProcess(_SignalFree, context.ForkProcess):
        pass

    class _ForkServerProcess(_SignalFree, context.ForkServerProcess):
        pass

    _PROCESSES.update({"fork": _ForkProcess, "forkserver": _ForkServerProcess})
