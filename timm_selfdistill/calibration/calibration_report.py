"""The report of a calibration: early exit on images that nothing was chosen by, and what to compare it with."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from timm_selfdistill.calibration.choose_settings import Choice, Goal, excess_errors
from timm_selfdistill.calibration.path_costs import PathCosts
from timm_selfdistill.early_exit import EarlyExitConfig, replay, running_ensembles
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.report.report_content import versions


class Point(TypedDict):
    """Accuracy and cost: `top1` in percent, `macs` the mean multiply-accumulates of an image, `speedup` the plain
    backbone's over these.
    """

    top1: float
    macs: float
    speedup: float


class ExitPointRow(Point):
    """One exit for all images; `index` counts from the shallowest, `name` is its module path."""

    index: int
    name: str


class EarlyExitRow(Point):
    """Early exit: `shares` of the images that leave at each exit, the last the backbone, and `excess_error`, the share
    that is answered wrong and that the backbone's own classifier gets right; both 0 to 1.
    """

    shares: list[float]
    excess_error: float


class CurvePoint(Point):
    """Other thresholds with the same temperatures; None stands for infinity."""

    thresholds: list[float | None]


class Calibrated(EarlyExitRow):
    """Early exit on the images that the settings were chosen by: their data set and split, their number, how many more
    could not be decoded, and in `backbone_top1` the accuracy of the backbone's own classifier.

    `tested` of them tested a risk, and `lost` of these were answered wrong that the backbone gets right; None for other
    goals.
    """

    dataset: str
    num_samples: int
    num_skipped: int
    backbone_top1: float
    tested: int | None
    lost: int | None


class Timing(TypedDict):
    """The time that the settings were chosen by, that of batches of this size on a device. `speedup` is the plain
    backbone's time over that with early exit, of `num_images` of the images reported on.
    """

    batch_size: int
    device: str
    speedup: float
    num_images: int


class Origin(TypedDict):
    """The images that are reported on, and the network; `input_size` is channels, height and width of one image."""

    dataset: str
    backbone: str
    recipe: str
    seed: int
    input_size: list[int]


class CalibrationReport(Origin):
    """The content of `calibration.json`.

    All but `calibration` is about the images that are reported on, which nothing was chosen by. `settings` is what
    `load_early_exit` takes. `oracle` lets each image leave at the first exit that is right, at the last where none is.
    `exits` holds the fixed exits, the last the backbone's own classifier. `running` holds the ensembles of the exits 0
    to k for every k, the first being exit 0 and the last `ensemble`. `baseline` is the plain backbone trained on its
    own, where the run's `report.json` has it for the same images. `curve` is in the order of cost. `time` is None where
    the settings were chosen by multiply-accumulates.
    """

    goal: dict[str, float]
    settings: dict[str, Any]
    calibration: Calibrated
    early_exit: EarlyExitRow
    exits: list[ExitPointRow]
    running: list[Point]
    ensemble: Point
    baseline: Point | None
    oracle: EarlyExitRow
    curve: list[CurvePoint]
    time: Timing | None
    num_samples: int
    num_skipped: int
    versions: dict[str, str]


def build_calibration_report(
    choice: Choice,
    goal: Goal,
    macs: PathCosts,
    calibration: ExitLogits,
    evaluation: ExitLogits,
    origin: Origin,
    *,
    calibration_dataset: str,
    exit_names: Sequence[str],
    baseline_top1: float | None,
    time: Timing | None,
) -> CalibrationReport:
    """Compare the chosen settings with fixed exits, ensemble, baseline and oracle.

    `calibration` holds the images that the settings were chosen by, `evaluation` those to report on; `baseline_top1` is
    of the latter, in percent.
    """
    correct = evaluation.correct
    tested, lost = choice.tested or (None, None)
    return {
        "goal": goal.to_json(),
        "settings": choice.config.to_json(),
        "calibration": {
            "dataset": calibration_dataset,
            "num_samples": len(calibration),
            "num_skipped": calibration.num_skipped,
            **_early_exit(choice.config, macs, calibration),
            "backbone_top1": _percent(calibration.correct[-1]),
            "tested": tested,
            "lost": lost,
        },
        "early_exit": _early_exit(choice.config, macs, evaluation),
        "exits": [
            {"index": index, "name": name, **_point(_percent(correct[index]), macs.exit(index), macs)}
            for index, name in enumerate(exit_names)
        ],
        "running": _running(macs, evaluation),
        "ensemble": _point(_percent(evaluation.ensemble_correct), macs.every_exit, macs),
        "baseline": None if baseline_top1 is None else _point(baseline_top1, macs.full, macs),
        "oracle": _oracle(macs, evaluation),
        "curve": [_curve_point(config, macs, evaluation) for config in choice.curve],
        "time": time,
        **origin,
        "num_samples": len(evaluation),
        "num_skipped": evaluation.num_skipped,
        "versions": versions(),
    }


def _early_exit(config: EarlyExitConfig, macs: PathCosts, stored: ExitLogits) -> EarlyExitRow:
    answers = replay(config, stored.logits, stored.ensemble)
    right = answers.logits.argmax(-1) == stored.targets
    return {
        **_point(_percent(right), macs.mean(config, answers.exit_index), macs),
        "shares": _shares(answers.exit_index, stored),
        "excess_error": float(excess_errors(config, stored).double().mean()),
    }


def _running(macs: PathCosts, stored: ExitLogits) -> list[Point]:
    right = is_right(running_ensembles(stored.logits, stored.combined), stored.targets)
    costs = macs.paths([True] * stored.num_exits).tolist()
    return [_point(_percent(row), cost, macs) for row, cost in zip(right, costs, strict=True)]


def _oracle(macs: PathCosts, stored: ExitLogits) -> EarlyExitRow:
    correct = stored.correct
    never_right = ~correct.any(0)
    index = torch.where(never_right, stored.num_exits, correct.to(torch.uint8).argmax(0))
    mean = float(macs.paths([True] * stored.num_exits)[index].mean())
    return {**_point(_percent(~never_right), mean, macs), "shares": _shares(index, stored), "excess_error": 0.0}


def _curve_point(config: EarlyExitConfig, macs: PathCosts, stored: ExitLogits) -> CurvePoint:
    row = _early_exit(config, macs, stored)
    thresholds = config.to_json()["thresholds"]
    return {"top1": row["top1"], "macs": row["macs"], "speedup": row["speedup"], "thresholds": thresholds}


def _point(top1: float, cost: float, macs: PathCosts) -> Point:
    return {"top1": top1, "macs": cost, "speedup": macs.full / cost}


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _shares(index: Tensor, stored: ExitLogits) -> list[float]:
    counts = index.bincount(minlength=stored.num_exits + 1)
    return [count / len(stored) for count in counts.tolist()]
