"""`accelerate launch -m timm_selfdistill.train RECIPE [key=value ...]`: arguments, messages and exit statuses."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from accelerate import PartialState

from timm_selfdistill.data.decode import SKIPPED
from timm_selfdistill.escape import PrintableFormatter, printable, printable_message
from timm_selfdistill.failures import failure_of_machine, message_of
from timm_selfdistill.hub import HubError
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.report import format_table
from timm_selfdistill.train.run import train
from timm_selfdistill.train.stop import Interrupted, NonFiniteLossError, StopSignals, end_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the report; the exit status is 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.train", description="Train from a recipe.")
    add_arguments(parser)
    status = run_command(parser.parse_args(arguments))
    if arguments is None:
        end_program(status)
    return status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a training command."""
    parser.add_argument("recipe", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, such as optimizer.lr=0.05")


def run_command(arguments: argparse.Namespace) -> int:
    """Train as the parsed arguments say."""

    def run() -> None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        report = train(recipe)
        if not PartialState().is_main_process:
            return
        print(format_table(report))
        listed = f", {SKIPPED}" if any(report["num_skipped"].values()) else ""
        print(f"\nWritten to {printable(recipe.output_dir)}: report.json, report.md, report.png, model/{listed}")
        if recipe.push_to_hub is not None:
            print(f"Pushed to {recipe.push_to_hub.repo}")

    return run_safely(run)


def run_safely(run: Callable[[], int | None]) -> int:
    """Run a command; return its exit status, and say in one sentence what stopped it.

    Warnings, and which data is read, are shown on the error output. An error of an unknown kind is a fault of the code,
    and is raised.

    Args:
        run: What to do; returns the exit status, None for 0.
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
        said = failure_of_machine(error)
        if said is None and isinstance(error, OSError):
            said = f"{message_of(error).rstrip('.')}. Mend that, and run the same command again to go on."
        if said is not None or isinstance(error, NonFiniteLossError):
            print(printable_message(f"error: {said or error}"), file=sys.stderr)
            return 1
        if isinstance(error, ValueError | HubError):
            print(printable_message(f"error: {message_of(error)}"), file=sys.stderr)
            return 2
        raise


@contextmanager
def _shown(logger: logging.Logger) -> Iterator[None]:
    """Let a logger tell what it only informs of, while the body runs."""
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more, as behind `| head`; then Python must not complain when it closes it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
