"""`timm-selfdistill compare` and `accelerate launch -m timm_selfdistill.compare`: arguments and messages."""

import argparse
from collections.abc import Sequence

from accelerate import PartialState

from timm_selfdistill.compare.comparison import format_comparison
from timm_selfdistill.compare.run_losses import compare, list_variants
from timm_selfdistill.program import run_program
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train.command import add_arguments as add_training_arguments

_DEFAULT = "none,label-smoothing,deep-supervision,byot-iccv2019,byot-tpami2021"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the table; the exit status is 2 for what cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.compare", description="Compare losses on one recipe.")
    add_arguments(parser)
    parser.set_defaults(run=run)
    return run_program(parser, arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument(
        "--losses",
        type=_names,
        default=_DEFAULT,
        help=f"what to compare, separated by commas, of {', '.join(list_variants())}; by default {_DEFAULT}",
    )
    parser.add_argument("--seeds", type=_numbers, default="0,1,2", help="separated by commas; by default 0,1,2")


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not any(override.startswith("output_dir=") for override in arguments.overrides):
        recipe = recipe.model_copy(update={"output_dir": f"{recipe.output_dir}-compare"})
    comparison = compare(recipe, arguments.losses, arguments.seeds)
    if PartialState().is_main_process:
        print(format_comparison(comparison))
        print(f"\nWritten to {recipe.output_dir}: comparison.json, comparison.md, comparison.png")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from error
