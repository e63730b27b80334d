"""Stop a program by a signal: at a place where all is saved, with one line and an exit status that says so."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

EXIT_PREEMPTED: Final = 75  # EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED: Final = 130

# Windows has no SIGUSR1.
PREEMPTIONS: Final = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A launcher hands Ctrl-C and SIGTERM on to processes that a terminal or scheduler has signalled too.
_ECHO_SECONDS = 1.0
# What is still under way when everything is saved, such as a download, may take this long to end.
_PATIENCE_SECONDS = 10.0


class Interrupted(BaseException):
    """A run was stopped by a signal; what it had done by then is saved.

    Like `KeyboardInterrupt`, this is not an `Exception`: a signal that arrives while a model is tried or an image is
    decoded must not be taken for a fault of the model or of the image. A command ends with `exit_status`.
    """

    def __init__(self, received: signal.Signals | None) -> None:
        name = "a signal to another process" if received is None else received.name
        super().__init__(f"Stopped by {name}. Run the same command again to go on.")
        self.exit_status = EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_PREEMPTED


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a stop at a place where everything is saved.

    During training steps (`deferred`), a signal is only noted, for the caller to check after the step; anywhere else
    nothing is lost by stopping, and it raises `Interrupted` at once. A second Ctrl-C always stops at once.

    Use it in a `with` block. At the block's end the former handlers are back, and `Interrupted` is raised again if it
    stopped nothing: what is raised in a destructor, Python only prints. It does nothing outside the main thread, where
    Python handles no signals, and in processes that are forked in the block.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = self._ctrl_c = self._raised = False
        self._last = -_ECHO_SECONDS
        self._owner = os.getpid()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (*PREEMPTIONS, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
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
        """Return the exception that ends the run."""
        return Interrupted(self.received)

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


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Start work on a thread that, unlike an executor's, neither a signal nor the end of the program waits for.

    A signal reaches the caller that waits for the result, even if the work itself stalls.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def leave_on_signals() -> None:
    """From now on, let a signal end the process at once, with one line and its exit status; nothing is unsaved."""
    if threading.current_thread() is threading.main_thread():
        for number in (*PREEMPTIONS, signal.SIGINT):
            signal.signal(number, _leave)


def end_program(status: int) -> NoReturn:
    """End a command that is the whole program, whose exit status is known.

    Exit functions run, then the process ends at once: Python's own shutdown takes seconds with torch, and a signal
    during it would end the process with a meaningless status. A signal before that ends it with its own status. A
    stopped run does not wait for threads that hang, such as those of a stalled download.
    """
    leave_on_signals()
    if status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        timer = threading.Timer(_PATIENCE_SECONDS, os._exit, [status])
        timer.daemon = True
        timer.start()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # nobody reads the output any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _leave(number: int, frame: FrameType | None) -> None:
    interruption = Interrupted(signal.Signals(number))
    os.write(2, f"{interruption}\n".encode())
    os._exit(interruption.exit_status)
