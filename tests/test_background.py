"""Work in the background."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from timm_selfdistill.stop import Interrupted, StopSignals, in_background


def test_what_work_returns_or_raises_is_handed_on() -> None:
    assert in_background(lambda: 3, "three").result() == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, "none").result()


def signalled(wait: Callable[[], object]) -> None:
    """Wait for something, and get a SIGTERM meanwhile; called where SIGTERM does not yet end the tests."""
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    wait()


def test_a_signal_does_not_wait_for_work_that_stalls() -> None:
    may_go_on = threading.Event()
    stalled = in_background(may_go_on.wait, "stalled")
    with pytest.raises(Interrupted), StopSignals():
        signalled(lambda: stalled.result(600))  # the signal comes in place of a TimeoutError
    # Python waits for no daemon when it ends.
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "stalled"] == [True]
    may_go_on.set()
