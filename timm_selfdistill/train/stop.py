"""What ends a run before its end: signals, which let it save first, and losses that are no numbers."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

EXIT_PREEMPTED: Final = 75  # EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED: Final = 130

_PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A run was stopped by a signal; what it had done by then is saved.

    Args:
        signal_name: Which one, such as "SIGTERM".
        exit_status: What a command ends with.
    """

    def __init__(self, signal_name: str, exit_status: int) -> None:
        super().__init__(f"Stopped by {signal_name}. Run the same command again to go on.")
        self.exit_status = exit_status


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite."""


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a stop at a place where everything is saved.

    While training steps are taken (`deferred`), a signal is only noted, to be asked for after the step; anywhere else
    nothing is lost by stopping, and it raises `Interrupted` at once. A second Ctrl-C always stops at once.

    Use it in a `with` block, which puts the former handlers back. Outside the main thread, where Python handles no
    signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (*_PREEMPTIONS, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._former = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals while the body runs."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def interruption(self, signal_name: str | None = None) -> Interrupted:
        """Return the exception that ends the run.

        Args:
            signal_name: Which signal, where this process got none but another one did.
        """
        if self.received is None:
            return Interrupted(signal_name or "a signal to another process", EXIT_PREEMPTED)
        status = EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED
        return Interrupted(self.received.name, status)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received == signal.SIGINT and number == signal.SIGINT
        self.received = signal.Signals(number)
        if again or not self._deferring:
            raise self.interruption()
