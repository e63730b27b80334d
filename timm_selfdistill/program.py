"""Run a command as a program: its arguments, what it says when something stops it, and its exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from timm_selfdistill.escape import PrintableFormatter, printable_message
from timm_selfdistill.failures import ReportedError, failure_of_machine, message_of
from timm_selfdistill.stop import Interrupted, StopSignals, end_program


def run_program(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse arguments, call what the parser sets as `run`, and return the exit status.

    Args:
        parser: The parser; its default `run` takes the parsed arguments and returns an exit status, or None for 0.
        arguments: The words; by default those of the command line, and then the process ends with the status.
    """
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes key=value in one place only; here it may also follow an option.
    unknown = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    status = run_safely(partial(parsed.run, parsed))
    if arguments is None:
        end_program(status)
    return status


def run_safely(run: Callable[[], int | None]) -> int:
    """Run a command; return its exit status, and say in one sentence what stopped it.

    Warnings, and which data is read, are shown on the error output. An error of an unknown kind is a fault of the code,
    and is raised. `run` returns the exit status, or None for 0.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with StopSignals(), _shown(logging.getLogger("timm_selfdistill.data")):
            status = run() or 0
            sys.stdout.flush()
            return status
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        said, status = failure_of_machine(error), 1
        if said is None and isinstance(error, OSError):
            said = f"{message_of(error).rstrip('.')}. Mend that, and run the same command again to go on."
        elif said is None and isinstance(error, ValueError | ReportedError):
            said, status = message_of(error), getattr(error, "exit_status", 2)
        if said is None:
            raise
        print(printable_message(f"error: {said}"), file=sys.stderr)
        return status


@contextmanager
def _shown(logger: logging.Logger) -> Iterator[None]:
    """Show what a logger says at level INFO while the body runs."""
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reader_is_gone() -> bool:
    """Whether the reader of the output has ended, as with `| head`; then Python must not complain at its own end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
