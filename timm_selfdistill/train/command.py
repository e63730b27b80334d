"""`accelerate launch -m timm_selfdistill.train RECIPE [key=value ...]`: arguments, messages and exit statuses."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from accelerate import PartialState

from timm_selfdistill.data import SKIPPED
from timm_selfdistill.hub import HubError
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.report import format_table
from timm_selfdistill.train.run import train
from timm_selfdistill.train.stop import Interrupted, NonFiniteLossError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the report; the exit status is 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.train", description="Train from a recipe.")
    add_arguments(parser)
    return run_command(parser.parse_args(arguments))


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
        print(f"\nWritten to {recipe.output_dir}: report.json, report.md, report.png, model/{listed}")
        if recipe.push_to_hub is not None:
            print(f"Pushed to {recipe.push_to_hub.repo}")

    return run_safely(run)


def log_to_error_output() -> None:
    """Show warnings, and which data is read."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("timm_selfdistill.data").setLevel(logging.INFO)


def run_safely(run: Callable[[], None]) -> int:
    """Run what trains; return the exit status, and say in one sentence what stopped it."""
    log_to_error_output()
    try:
        run()
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_status
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Make room, and run the same command again to go on.", file=sys.stderr)
        return 1
    except (ValueError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(
            f"error: {error} Run the same command again to go on; fewer data.workers need less memory.", file=sys.stderr
        )
        return 1
    return 0
