"""What several seeds of several losses say: means, spreads and paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypedDict

from scipy.special import stdtrit

from timm_selfdistill.compare.variants import BASELINE
from timm_selfdistill.report import Report

CONFIDENCE = 0.95


class Spread(TypedDict):
    """Values of several seeds, in the seeds' order, their mean and sample standard deviation (None for one seed)."""

    values: list[float]
    mean: float
    std: float | None


class Difference(TypedDict):
    """Mean over seeds of an accuracy minus the baseline's of the same seed, in percentage points.

    `low` and `high` bound it at 95 % confidence by Student's t; None with one seed.
    """

    mean: float
    low: float | None
    high: float | None


class ExitSummary(TypedDict):
    """Top-1 accuracy of one output in percent, and its paired difference to the baseline's backbone."""

    name: str
    top1: Spread
    difference: Difference | None


class LossSummary(TypedDict):
    """One loss: its outputs from shallow to deep, then the ensemble; the backbone alone if the loss trains no exits.

    `train_seconds` is the time spent on training steps.
    """

    loss: str
    outputs: list[ExitSummary]
    train_seconds: Spread


class Comparison(TypedDict):
    """The content of `comparison.json`.

    `baseline` is the loss that differences are taken to: "none" if it was trained, else the first.
    """

    recipe: str
    backbone: str
    dataset: str
    num_samples: int
    epochs: int
    seeds: list[int]
    baseline: str
    losses: list[LossSummary]
    versions: dict[str, str]
    device: str


def summarize(
    reports: Mapping[str, Sequence[Report]], *, recipe: str, epochs: int, seeds: Sequence[int], backbone_only: set[str]
) -> Comparison:
    """Summarise the reports of a comparison.

    Args:
        reports: For each loss, the reports of its runs, in the order of the seeds.
        recipe: Name of the recipe.
        epochs: Epochs of every run.
        seeds: The seeds.
        backbone_only: Losses that train no exits, of which the backbone alone counts.

    Raises:
        ValueError: If a run has no finite accuracy, so that its loss has no mean.
    """
    baseline = BASELINE if BASELINE in reports else next(iter(reports))
    reference = [_top1(baseline, report, -1) for report in reports[baseline]]
    first = reports[baseline][0]
    return {
        "recipe": recipe,
        "backbone": first["backbone"],
        "dataset": first["dataset"],
        "num_samples": first["num_samples"],
        "epochs": epochs,
        "seeds": list(seeds),
        "baseline": baseline,
        "losses": [
            {
                "loss": loss,
                "outputs": _outputs(loss, runs, reference, alone=loss in backbone_only, is_baseline=loss == baseline),
                "train_seconds": _spread([report["train_seconds"]["self-distilled"] for report in runs]),
            }
            for loss, runs in reports.items()
        ],
        "versions": first["versions"],
        "device": first["device"],
    }


def _outputs(
    loss: str, runs: Sequence[Report], reference: Sequence[float], *, alone: bool, is_baseline: bool
) -> list[ExitSummary]:
    names = [row["name"] for row in runs[0]["exits"]]
    positions = [len(names) - 1] if alone else range(len(names) + 1)
    outputs: list[ExitSummary] = []
    for position in positions:
        values = [_top1(loss, report, position) for report in runs]
        is_reference = is_baseline and position == len(names) - 1
        outputs.append(
            {
                "name": [*names, "ensemble"][position],
                "top1": _spread(values),
                "difference": None if is_reference else _difference(values, reference),
            }
        )
    return outputs


def _top1(loss: str, report: Report, position: int) -> float:
    """Return the top-1 accuracy of an output; the position behind the last exit is the ensemble's."""
    exits = report["exits"]
    top1 = report["ensemble"]["top1"] if position == len(exits) else exits[position]["top1"]
    if top1 is None:
        raise ValueError(f"{loss}, seed {report['seed']}: the accuracy is no number; see the run's report.")
    return top1


def _spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "std": std}


def _difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    pairs = [value - other for value, other in zip(values, reference, strict=True)]
    mean, count = statistics.fmean(pairs), len(pairs)
    if count == 1:
        return {"mean": mean, "low": None, "high": None}
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    half = quantile * statistics.stdev(pairs) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}
