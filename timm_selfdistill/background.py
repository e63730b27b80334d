"""Work that nobody has to wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Start work on a thread that neither a signal nor the end of the program waits for, unlike those of executors.

    A signal reaches who waits for the result even where the work itself stalls in the network.

    Args:
        work: What to do.
        name: Name of the thread.

    Returns:
        What the work will return or raise.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
