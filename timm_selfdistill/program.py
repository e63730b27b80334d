"""Run a command as a program: its arguments, what it says when something stops it, and its exit status."""

import argparse
import errno
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from functools import partial

from timm_selfdistill.cores import fit_threads
from timm_selfdistill.escape import PrintableFormatter, printable_message
from timm_selfdistill.lazy import MissingExtraError, needs_extra
from timm_selfdistill.stop import Interrupted, StopSignals, end_program

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
# How Python and Rust write the number of a system error, where only its message is left.
_ERRNO = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
# torch raises a plain RuntimeError for all of these.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory: you tried to allocate|out of memory|_ALLOC_FAILED")
_NO_SHARED_MEMORY = re.compile(r"out of shared memory|shared memory\(shm\)|(file|object) </torch_|/dev/shm")
_MANY_FILES = re.compile(r"Too many open files|received 0 items of ancdata")
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*?)(?:\. |\.?$)")
_LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket closed", re.IGNORECASE)

_AGAIN = "run the same command again to go on"


class ReportedError(RuntimeError):
    """An error whose message is all that a user needs: a command prints it and ends with `exit_status`."""

    exit_status = 2


class NonFiniteLossError(ReportedError):
    """The loss was NaN or infinite."""

    exit_status = 1


def run_program(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse arguments, call the parser's default `run` with them by name, and return the exit status.

    `run` returns the status, or None for 0. Without `arguments`, those of the command line are taken, and the process
    ends with the status.
    """
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes key=value in one place only; here it may also follow an option.
    unknown = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    options = {name: value for name, value in vars(parsed).items() if name not in ("run", "command")}
    if arguments is None:
        fit_threads()
    status = run_safely(partial(parsed.run, **options))
    if arguments is None:
        end_program(status)
    return status


def run_safely(run: Callable[[], int | None]) -> int:
    """Run a command; return its exit status, and say in one sentence what stopped it.

    Warnings, which data is read, the precision and the times are shown on the error output. An error of an unknown kind
    is a fault of the code, and is raised. `run` returns the exit status, or None for 0.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger = logging.getLogger("timm_selfdistill")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with needs_extra("This command"), StopSignals():
            status = run() or 0
            sys.stdout.flush()
            return status
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_status
    except Exception as error:  # raised again below if it is of no known kind
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        said, status = failure_of_machine(error), 1
        if said is None and isinstance(error, OSError):
            said = f"{message_of(error).rstrip('.')}. Fix that, and run the same command again to go on."
        elif said is None and isinstance(error, ValueError | ReportedError | MissingExtraError):
            said, status = message_of(error), getattr(error, "exit_status", 2)
        if said is None:
            raise
        print(printable_message(f"error: {said}"), file=sys.stderr)
        return status
    finally:
        logger.setLevel(level)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a GPU is full."""
    if isinstance(error, MemoryError) or _is_of_torch(error, "OutOfMemoryError"):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended."""
    said_so = _is_of_torch(error, "DistError") or _LOST_PROCESS.search(str(error)) is not None
    return said_so and _is_from_torch(error)


def failure_of_machine(error: BaseException) -> str | None:
    """Return what happened and what to do, if the machine caused an error or what it was raised from; else None."""
    link: BaseException | None = error
    while link is not None:
        if (said := _failure(link)) is not None:
            return said
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def message_of(error: BaseException) -> str:
    """Return an error's message: for one from a loader process, the last line of the traceback that it holds."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[-1].strip() if "Traceback (most recent call last)" in text else text


def _failure(error: BaseException) -> str | None:
    # torch's messages go on with frames of C++ and advice for other programs.
    text, reason = str(error), message_of(error).splitlines()[0].rstrip(".")
    number = _errno_of(error)
    from_torch = _is_from_torch(error)
    if _is_of_torch(error, "OutOfMemoryError"):
        return (
            f"The GPU's memory is full: {reason}. A smaller batch_size, a larger optimizer.accumulate or "
            "precision=bf16 need less."
        )
    if number in _TOO_MANY_FILES or (from_torch and _MANY_FILES.search(text)):
        return f"Too many files are open: {reason}. Raise the limit (ulimit -n) or lower data.workers, and {_AGAIN}."
    if (from_torch or number is not None) and _NO_SHARED_MEMORY.search(text):
        return (
            f"The shared memory (/dev/shm) in which loader processes hand over images is full: {reason}. Make it "
            f"larger (docker run --shm-size), or set data.workers=0, and {_AGAIN}."
        )
    if is_out_of_memory(error):
        return f"The memory is full: {reason}. A smaller batch_size, fewer data.workers or a smaller model need less."
    if from_torch and (lost := _LOST_WORKER.search(text)):
        return (
            f"A loader process {lost[1].replace('is killed', 'was killed')}. Where the system killed it for lack of "
            f"memory, fewer data.workers need less; {_AGAIN}."
        )
    if number in _FULL:
        return f"The disk is full: {reason}. Make room, and {_AGAIN}."
    if is_lost_process(error):
        return f"Another process of the run is gone: {reason}. What it said tells why; {_AGAIN}."
    return None


def _is_of_torch(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of torch, without importing torch, which takes seconds."""
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)


def _is_from_torch(error: BaseException) -> bool:
    """Whether an error is of a class that torch raises, its own or a plain RuntimeError."""
    return isinstance(error, RuntimeError) and type(error).__module__.startswith(("builtins", "torch"))


def _errno_of(error: BaseException) -> int | None:
    """Return the number of an error of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = None if isinstance(error, ValueError) else _ERRNO.search(message_of(error))
    return None if match is None else int(match[1] or match[2])


def _reader_is_gone() -> bool:
    """Whether the reader of the output has ended, as with `| head`; then Python must not complain at its own end."""
    try:
        sys.stdout.flush()
        # What could not be written may have been dropped, so that nothing is left to flush.
        is_gone = False
        if hasattr(select, "poll"):  # not on Windows
            output = select.poll()
            output.register(sys.stdout, 0)
            is_gone = bool(output.poll(0))
    except BrokenPipeError:
        is_gone = True
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone
