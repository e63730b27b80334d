"""Train one recipe with several losses and seeds, skipping what is done."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from timm_selfdistill.compare.summary import Comparison, summarize
from timm_selfdistill.compare.variants import check_names, list_variants, with_loss
from timm_selfdistill.compare.write import format_comparison, write_comparison
from timm_selfdistill.losses import needs_of
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.train import add_arguments as add_training_arguments
from timm_selfdistill.train import build_loss, end_program, finished_report, run_safely, train

_logger = logging.getLogger(__name__)

_DEFAULT = "none,label-smoothing,deep-supervision,byot-iccv2019,byot-tpami2021"


def compare(recipe: Recipe, losses: Sequence[str], seeds: Sequence[int]) -> Comparison:
    """Train a recipe with each loss and seed, and write one table and one picture.

    Each run has a folder of its own, `LOSS-seed-SEED` in the recipe's `output_dir`. One that is complete is not run
    again, one that was interrupted goes on.

    Args:
        recipe: The recipe; its own `seed`, `baseline` and `loss` do not count.
        losses: Names of `list_variants()`.
        seeds: The seeds.

    Returns:
        The comparison, which is also in `comparison.json`, `.md` and `.png`.

    Raises:
        ValueError: If a loss is unknown or a run cannot work; raised before the first training starts where possible.
        Interrupted: If a signal stops it; the same call goes on.
    """
    check_names(losses, seeds)
    folder = Path(recipe.output_dir or ".")
    plan = {loss: [_variant(recipe, folder, loss, seed) for seed in seeds] for loss in losses}
    backbone_only = {loss for loss, runs in plan.items() if not needs_of(build_loss(runs[0])).exits}
    # All of them looked at before any is trained: a folder that holds something else is an error now, not in days.
    done = {loss: [finished_report(run) for run in runs] for loss, runs in plan.items()}
    reports = {loss: list(found) for loss, found in done.items()}
    # Seed by seed, so that an unfinished comparison compares something.
    for index in range(len(seeds)):
        for loss in losses:
            if done[loss][index] is None:
                reports[loss][index] = train(plan[loss][index])
            elif PartialState().is_main_process:
                _logger.warning("%s is done.", plan[loss][index].output_dir)
        comparison = summarize(
            {loss: [report for report in found[: index + 1] if report] for loss, found in reports.items()},
            recipe=folder.name,
            epochs=recipe.epochs,
            seeds=seeds[: index + 1],
            backbone_only=backbone_only,
        )
        if PartialState().is_main_process:
            write_comparison(comparison, folder)
    return comparison


def _variant(recipe: Recipe, folder: Path, loss: str, seed: int) -> Recipe:
    """Return the recipe of one run."""
    update = {"seed": seed, "baseline": False, "output_dir": str(folder / f"{loss}-seed-{seed}"), "push_to_hub": None}
    return with_loss(recipe, loss).model_copy(update=update)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the table; the exit status is 2 for what cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.compare", description="Compare losses on one recipe.")
    add_arguments(parser)
    status = run_command(parser.parse_intermixed_args(arguments))
    if arguments is None:
        end_program(status)
    return status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a comparison."""
    add_training_arguments(parser)
    parser.add_argument(
        "--losses",
        type=_names,
        default=_DEFAULT,
        help=f"what to compare, separated by commas, of {', '.join(list_variants())}; by default {_DEFAULT}",
    )
    parser.add_argument("--seeds", type=_numbers, default="0,1,2", help="separated by commas; by default 0,1,2")


def run_command(arguments: argparse.Namespace) -> int:
    """Compare as the parsed arguments say."""

    def run() -> None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if not any(override.startswith("output_dir=") for override in arguments.overrides):
            recipe = recipe.model_copy(update={"output_dir": f"{recipe.output_dir}-compare"})
        comparison = compare(recipe, arguments.losses, arguments.seeds)
        if PartialState().is_main_process:
            print(format_comparison(comparison))
            print(f"\nWritten to {recipe.output_dir}: comparison.json, comparison.md, comparison.png")

    return run_safely(run)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
