"""`timm-selfdistill train` and `accelerate launch -m timm_selfdistill.train`: arguments and messages."""

import argparse
from collections.abc import Sequence
from typing import Final

from accelerate import PartialState

from timm_selfdistill.data.decode import SKIPPED
from timm_selfdistill.escape import printable
from timm_selfdistill.program import run_program
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.report import format_table
from timm_selfdistill.train.run import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the report; the exit status is 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.train", description="Train from a recipe.")
    add_arguments(parser)
    parser.set_defaults(run=_run)
    return run_program(parser, arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, such as optimizer.lr=0.05")


def _run(recipe: str, overrides: Sequence[str]) -> None:
    loaded = load_recipe(recipe, overrides)
    report = train(loaded)
    if not PartialState().is_main_process:
        return
    print(format_table(report))
    listed = f", {SKIPPED}" if any(report["num_skipped"].values()) else ""
    print(f"\nWritten to {printable(loaded.output_dir)}: report.json, report.md, report.png, model/{listed}")
    if loaded.push_to_hub is not None:
        print(f"Pushed to {loaded.push_to_hub.repo}")


COMMANDS: Final = {"train": (add_arguments, _run)}
