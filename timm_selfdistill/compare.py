"""Train one recipe with each of several losses and seeds, skipping what is done: `timm-selfdistill compare`.

With more processes: `accelerate launch -m timm_selfdistill.compare RECIPE [key=value ...] --losses A,B --seeds 0,1`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from accelerate import PartialState

from timm_selfdistill.losses import PRESETS, list_losses, list_presets, needs_of
from timm_selfdistill.output import tell
from timm_selfdistill.program import run_program
from timm_selfdistill.recipe import LossSection, Recipe, load_recipe
from timm_selfdistill.report.comparison_page import BASELINE, Comparison, format_comparison, summarize, write_comparison
from timm_selfdistill.train import as_begun, build_loss, finished_report, train
from timm_selfdistill.train.refusals import all_problems
from timm_selfdistill.train.run import add_arguments as add_training_arguments

_logger = logging.getLogger(__name__)

_LABEL_SMOOTHING: Final = "label-smoothing"
_OWN: Final = "recipe"
_SMOOTHING: Final = 0.1
_DEFAULT: Final = "none,label-smoothing,deep-supervision,byot-iccv2019,byot-tpami2021,ensemble-distillation"


def compare(recipe: Recipe, losses: Sequence[str], seeds: Sequence[int]) -> Comparison:
    """Train a recipe with each loss and seed, and write one table and one picture.

    Each run has a folder of its own, `LOSS-seed-SEED` in the recipe's `output_dir`. One that is complete is not run
    again, one that was interrupted goes on. The recipe's own `seed`, `baseline` and `loss` do not count; losses are
    names of `list_variants()`. What is returned is also in `comparison.json`, `.md` and `.png`.

    Raises:
        ValueError: If a loss is unknown or a run cannot work; raised before the first training starts where possible.
        Interrupted: If a signal stops it; the same call goes on.
    """
    _check(losses, seeds)
    folder = Path(recipe.output_dir or ".")
    plan = {loss: [as_begun(_variant(recipe, folder, loss, seed)) for seed in seeds] for loss in losses}
    backbone_only = {loss for loss, runs in plan.items() if not needs_of(build_loss(runs[0])).exits}
    # All folders are checked before any training: one that holds something else is an error now, not after days.
    done = {loss: [finished_report(run) for run in runs] for loss, runs in plan.items()}
    reports = {loss: list(found) for loss, found in done.items()}
    is_main = PartialState().is_main_process
    # Seed by seed, so that an unfinished comparison compares something.
    for index in range(len(seeds)):
        for place, loss in enumerate(losses, 1):
            if is_main:
                tell(f"[{index * len(losses) + place}/{len(seeds) * len(losses)}] {loss}, seed {seeds[index]}")
            if done[loss][index] is None:
                reports[loss][index] = train(plan[loss][index])
            elif is_main:
                _logger.warning("%s is done.", plan[loss][index].output_dir)
        comparison = summarize(
            {loss: [report for report in found[: index + 1] if report] for loss, found in reports.items()},
            recipe=folder.name,
            epochs=recipe.epochs,
            seeds=seeds[: index + 1],
            backbone_only=backbone_only,
        )
        if is_main:
            write_comparison(comparison, folder)
    return comparison


def list_variants() -> list[str]:
    """Return the names of all losses that can be compared: presets, registered losses and two more.

    "label-smoothing" trains the backbone alone on smoothed labels, "recipe" is the recipe's own loss section.
    """
    ours = LossSection.model_fields["name"].default
    return sorted({*list_presets(), *list_losses(), _LABEL_SMOOTHING, _OWN} - {ours})


def with_loss(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe with another loss, in its published settings, and everything else as it is.

    A teacher from outside is left out with another loss, and hint adapters where the loss has no hints to train them.
    """
    if name == _OWN:
        return recipe
    if name == _LABEL_SMOOTHING:
        loss = LossSection(preset=BASELINE, label_smoothing=_SMOOTHING)
    elif name in PRESETS:
        loss = LossSection(preset=name)
    else:
        loss = LossSection(name=name, preset=None)
    has_hints = name in PRESETS and PRESETS[name].hint_weight > 0
    exits = recipe.exits.model_copy(update={"hint_adapter": recipe.exits.hint_adapter and has_hints})
    return recipe.model_copy(update={"loss": loss, "exits": exits, "teacher": None})


def _check(losses: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse an empty comparison, repeated entries and unknown losses."""
    for what, entries in (("losses", losses), ("seeds", seeds)):
        if not entries or len(set(entries)) < len(entries):
            raise ValueError(f"{what} must be one or more different entries, received {', '.join(map(str, entries))}.")
    unknown = sorted(set(losses) - set(list_variants()))
    if unknown:
        raise ValueError(f"Unknown losses {', '.join(unknown)}; a comparison knows {', '.join(list_variants())}.")
    if min(seeds) < 0:
        raise ValueError(f"seeds must be 0 or more, received {', '.join(map(str, seeds))}.")


def _variant(recipe: Recipe, folder: Path, loss: str, seed: int) -> Recipe:
    update = {"seed": seed, "baseline": False, "output_dir": str(folder / f"{loss}-seed-{seed}"), "push_to_hub": None}
    return with_loss(recipe, loss).model_copy(update=update)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the table; the exit status is 2 for what cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.compare", description="Compare losses on one recipe.")
    _add_arguments(parser)
    parser.set_defaults(run=_run)
    return run_program(parser, arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument(
        "--losses",
        type=_names,
        default=_DEFAULT,
        help=f"what to compare, separated by commas, of {', '.join(list_variants())}; by default {_DEFAULT}",
    )
    parser.add_argument("--seeds", type=_numbers, default="0,1,2", help="separated by commas; by default 0,1,2")


def _run(recipe: str, overrides: Sequence[str], losses: Sequence[str], seeds: Sequence[int]) -> None:
    loaded = load_recipe(recipe, overrides, check=all_problems)
    if not any(override.startswith("output_dir=") for override in overrides):
        loaded = loaded.model_copy(update={"output_dir": f"{loaded.output_dir}-compare"})
    comparison = compare(loaded, losses, seeds)
    if PartialState().is_main_process:
        print(format_comparison(comparison))
        print(f"\nWritten to {loaded.output_dir}: comparison.json, comparison.md, comparison.png")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from error


COMMANDS: Final = {"compare": (_add_arguments, _run)}

if __name__ == "__main__":
    sys.exit(main())
