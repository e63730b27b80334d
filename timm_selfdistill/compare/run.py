"""Train one recipe with several losses and seeds, skipping what is done."""

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from timm_selfdistill.compare.summary import Comparison, summarize
from timm_selfdistill.compare.variants import check_names, with_loss
from timm_selfdistill.compare.write import write_comparison
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train import build_loss, finished_report, train

_logger = logging.getLogger(__name__)


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
    backbone_only = {loss for loss, runs in plan.items() if not getattr(build_loss(runs[0]), "needs_exits", True)}
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
