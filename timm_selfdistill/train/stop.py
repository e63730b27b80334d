"""What ends a run early: signals, which let it save first, and losses that are not finite."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Final, NoReturn

EXIT_PREEMPTED: Final = 75  # EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED: Final = 130

_PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
# A launcher hands Ctrl-C and SIGTERM on to processes that a terminal or scheduler has signalled too.
_ECHO_SECONDS = 1.0
# How long to wait for what still runs when everything is saved, such as a download.
_PATIENCE_SECONDS = 10.0


class Interrupted(BaseException):
    """A run was stopped by a signal; what it had done by then is saved.

    Like `KeyboardInterrupt` it is no `Exception`: a signal that comes while a model is tried or an image is decoded
    must not be taken for a fault of the model or of the image. A caller of `train` that is to go on after a signal
    catches it by name.

    Args:
        signal_name: Such as "SIGTERM".
        exit_status: What a command ends with.
    """

    def __init__(self, signal_name: str, exit_status: int) -> None:
        super().__init__(f"Stopped by {signal_name}. Run the same command again to go on.")
        self.exit_status = exit_status


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite."""


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a stop at a place where everything is saved.

    While training steps are taken (`deferred`), a signal is only noted in `received`, which is read after the step; at
    any other time nothing is lost by stopping, and it raises `Interrupted` at once. A second Ctrl-C always stops at
    once.

    Use it in a `with` block, which puts the former handlers back, and raises `Interrupted` once more at its end if that
    stopped nothing: what is raised in a destructor, Python only prints. It does nothing outside the main thread, where
    Python handles no signals, and in processes that are forked in the block.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False
        self._ctrl_c = False
        self._raised = False
        self._last = -_ECHO_SECONDS
        self._owner = os.getpid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (*_PREEMPTIONS, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._former = {}
        if error is None and self._raised:
            raise self.interruption()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals while the body runs."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def interruption(self) -> Interrupted:
        """Return the exception that ends the run; without a signal here, another process got one."""
        if self.received is None:
            return Interrupted("a signal to another process", EXIT_PREEMPTED)
        return _interruption(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        now = time.monotonic()
        echo = self._launched and now - self._last < _ECHO_SECONDS
        again = self._ctrl_c and number == signal.SIGINT
        self._last = now
        self._ctrl_c |= number == signal.SIGINT
        if self.received is None:
            self.received = signal.Signals(number)
        if not echo and (again or not self._deferring):
            self._raised = True
            raise self.interruption()


def end_program(status: int) -> NoReturn:
    """End a command that is the whole program with its exit status.

    The functions registered with `atexit` run, and then the process ends at once: Python's own shutdown takes seconds
    with torch, and a signal in that time would end it with a status that says nothing. A signal that comes before ends
    it with its own status. A stopped run does not wait for threads that hang, such as those of a stalled download.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (*_PREEMPTIONS, signal.SIGINT):
            signal.signal(number, _leave)
    if status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        timer = threading.Timer(_PATIENCE_SECONDS, os._exit, [status])
        timer.daemon = True
        timer.start()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # the output is no longer read
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _leave(number: int, frame: FrameType | None) -> None:
    interruption = _interruption(signal.Signals(number))
    os.write(2, f"{interruption}\n".encode())
    os._exit(interruption.exit_status)


def _interruption(number: signal.Signals) -> Interrupted:
    return Interrupted(number.name, EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
