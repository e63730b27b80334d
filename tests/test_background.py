"""Work in the background."""

import os
import signal
import threading
import time

import pytest

from timm_selfdistill.stop import Interrupted, StopSignals, in_background


def test_what_work_returns_or_raises_is_handed_on() -> None:
    assert in_background(lambda: 3, "three").result() == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, "none").result()


def test_a_signal_does_not_wait_for_work_that_stalls() -> None:
    may_go_on = threading.Event()
    stalled = in_background(may_go_on.wait, "stalled")
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    start = time.monotonic()
    with pytest.raises(Interrupted), StopSignals():
        stalled.result(60)
    assert time.monotonic() - start < 10
    # Python waits for no daemon when it ends.
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "stalled"] == [True]
    may_go_on.set()
