"""What is said of failures, and with which exit status."""

import errno
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from timm_selfdistill.hub import HubError
from timm_selfdistill.program import NonFiniteLossError, failure_of_machine, is_out_of_memory, message_of, run_safely

WORKER = "DataLoader worker (pid 123) is killed by signal: {}"


def error_of(error: BaseException) -> BaseException:
    """Return what a command would see of an error that our code explains in its own way."""
    try:
        try:
            raise error
        except type(error) as inner:
            raise ValueError("ResNet fails on an input of shape (1, 3, 8, 8).") from inner
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full: [Errno 28] No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full: "),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "The disk is full"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many files are open: [Errno 24] Too many"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
         "Too many files are open: "),
        (RuntimeError("received 0 items of ancdata"), "Too many files are open: "),
        (MemoryError(), "The memory is full: MemoryError(). A smaller batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "The memory is full: "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "The GPU's memory is full: CUDA out"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "The memory is full: "),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "The shared memory"),
        (RuntimeError(WORKER.format("Bus error. It is possible that dataloader's workers are out of shared memory.")),
         "The shared memory (/dev/shm)"),
        (RuntimeError(WORKER.format("Killed. ")), "A loader process was killed by signal: Killed. Where the system"),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly with exit code 1. Details are lost."),
         "A loader process exited unexpectedly with exit code 1. Where"),
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"),
         "Another process of the run is gone: "),
    ],
)  # fmt: skip
def test_a_failure_of_the_machine_is_named_for_what_it_is(
    error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seen in (error, error_of(error)):

        def fail(seen: BaseException = seen) -> None:
            raise seen

        assert run_safely(fail) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {said}")
        assert len(printed.splitlines()) == 1
        assert ("Make room" in printed) == ("disk is full" in printed)


def test_memory_that_torch_cannot_get_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert is_out_of_memory(error.value)
    assert failure_of_machine(error.value).startswith("The memory is full: [enforce fail at alloc_cpu.cpp")


def test_what_could_not_be_done_for_want_of_room_is_told_too() -> None:
    error = OSError("The checkpoint of step 3 cannot be written: [Errno 28] No space left on device; others are kept")
    assert failure_of_machine(error) == (
        "The disk is full: The checkpoint of step 3 cannot be written: [Errno 28] No space left on device; others are "
        "kept. Make room, and run the same command again to go on."
    )
    assert failure_of_machine(HubError("Pushing failed: Connection reset by peer.")) is None


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "error: [Errno 13] Permission denied: 'a'. Fix"),
        (ConnectionError("no route"), 1, "error: no route. Fix that, and run the same command again to go on."),
        (NonFiniteLossError("The loss is not finite."), 1, "error: The loss is not finite."),
        (ValueError("batch_size: wrong."), 2, "error: batch_size: wrong."),
        (HubError("Pushing failed."), 2, "error: Pushing failed."),
        (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                    '  File "a.py", line 1\nValueError: no crop'), 2, "error: ValueError: no crop"),
    ],
)  # fmt: skip
def test_other_failures_keep_their_words(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run_safely(fail) == status
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert "Make room" not in printed
    assert "Traceback" not in printed


def test_a_fault_of_the_code_is_raised() -> None:
    for error in (ZeroDivisionError("division by zero"), RuntimeError("stack expects each tensor to be equal size")):

        def fail(error: Exception = error) -> None:
            raise error

        assert failure_of_machine(error) is None
        with pytest.raises(type(error)):
            run_safely(fail)


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Closed:
        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def fileno(self) -> int:
            return 1

    moved = []
    monkeypatch.setattr("os.dup2", lambda source, target: moved.append(target))
    monkeypatch.setattr(sys, "stdout", Closed())
    assert run_safely(lambda: None) == 1
    assert (moved, capsys.readouterr().err) == ([1], "")


def test_a_reader_that_has_gone_in_the_middle_of_a_long_text_is_no_error() -> None:
    code = (
        "import sys; from timm_selfdistill.program import run_safely; sys.exit(run_safely(lambda: print('x' * 10**6)))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_message_of_a_loader_process_is_its_last_line() -> None:
    assert message_of(OSError("Caught OSError.\nTraceback (most recent call last):\nOSError: [Errno 5] gone")) == (
        "OSError: [Errno 5] gone"
    )
    assert message_of(KeyError()) == "KeyError()"
