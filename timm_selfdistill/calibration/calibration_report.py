"""The report of a calibration: early exit on images that nothing was chosen by, and what to compare it with."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from timm_selfdistill.calibration.choose_settings import Choice, Goal, excess_errors
from timm_selfdistill.early_exit import EarlyExitConfig, PathCosts, replay, running_ensembles
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.metrics import paired_interval
from timm_selfdistill.report.report_content import versions


class Point(TypedDict):
    """Accuracy and cost: `top1` in percent, `macs` the mean multiply-accumulates of an image, `speedup` the plain
    backbone's over these. `gain_interval` is the 95 % confidence interval of the difference of `top1` from that of the
    backbone's own classifier on the same images; None where it is not known.
    """

    top1: float
    gain_interval: list[float] | None
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

    `as_good` is the exit that, for all images, is as accurate and as cheap or better in one of these, None without one.
    `tested` of them tested a risk, and `lost` of these were answered wrong that the backbone gets right; None for other
    goals.
    """

    dataset: str
    num_samples: int
    num_skipped: int
    backbone_top1: float
    as_good: int | None
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
    correct, backbone = evaluation.correct, evaluation.correct[-1]
    running = is_right(running_ensembles(evaluation.logits, evaluation.combined), evaluation.targets)
    costs = macs.paths([True] * evaluation.num_exits).tolist()
    baseline: Point | None = None
    if baseline_top1 is not None:
        baseline = {"top1": baseline_top1, "gain_interval": None, "macs": macs.full, "speedup": 1.0}
    tested, lost = choice.tested or (None, None)
    on_chosen = _early_exit(choice.config, macs, calibration)
    return {
        "goal": goal.to_json(),
        "settings": choice.config.to_json(),
        "calibration": {
            "dataset": calibration_dataset,
            "num_samples": len(calibration),
            "num_skipped": calibration.num_skipped,
            **on_chosen,
            "backbone_top1": _percent(calibration.correct[-1]),
            "as_good": _as_good(on_chosen, macs, calibration),
            "tested": tested,
            "lost": lost,
        },
        "early_exit": _early_exit(choice.config, macs, evaluation),
        "exits": [
            {"index": index, "name": name, **_point(correct[index], macs.exit(index), macs, backbone)}
            for index, name in enumerate(exit_names)
        ],
        "running": [_point(right, cost, macs, backbone) for right, cost in zip(running, costs, strict=True)],
        "ensemble": _point(evaluation.ensemble_correct, macs.every_exit, macs, backbone),
        "baseline": baseline,
        "oracle": _oracle(macs, evaluation),
        "curve": [
            {**_replayed(config, macs, evaluation)[0], "thresholds": config.to_json()["thresholds"]}
            for config in choice.curve
        ],
        "time": time,
        **origin,
        "num_samples": len(evaluation),
        "num_skipped": evaluation.num_skipped,
        "versions": versions(),
    }


def _replayed(config: EarlyExitConfig, macs: PathCosts, stored: ExitLogits) -> tuple[Point, Tensor]:
    """Return what early exit gives on the images, and the exit at which each leaves [N]."""
    answers = replay(config, stored.logits, stored.ensemble)
    right = answers.logits.argmax(-1) == stored.targets
    return _point(right, macs.mean(config, answers.exit_index), macs, stored.correct[-1]), answers.exit_index


def _early_exit(config: EarlyExitConfig, macs: PathCosts, stored: ExitLogits) -> EarlyExitRow:
    point, exit_index = _replayed(config, macs, stored)
    return {
        **point,
        "shares": _shares(exit_index, stored),
        "excess_error": float(excess_errors(config, stored).double().mean()),
    }


def _oracle(macs: PathCosts, stored: ExitLogits) -> EarlyExitRow:
    correct = stored.correct
    never_right = ~correct.any(0)
    index = torch.where(never_right, stored.num_exits, correct.to(torch.uint8).argmax(0))
    mean = float(macs.paths([True] * stored.num_exits)[index].mean())
    point = _point(~never_right, mean, macs, correct[-1])
    return {**point, "shares": _shares(index, stored), "excess_error": 0.0}


def _as_good(chosen: EarlyExitRow, macs: PathCosts, stored: ExitLogits) -> int | None:
    """Return the first exit that is at least as accurate for all images as early exit, at no higher cost."""
    for index, right in enumerate(stored.correct):
        if macs.exit(index) <= chosen["macs"] and _percent(right) >= chosen["top1"]:
            return index
    return None


def _point(right: Tensor, cost: float, macs: PathCosts, backbone: Tensor) -> Point:
    """Return what images [N] that are answered right, or not, cost, beside those that the backbone gets right [N]."""
    gained, lost = int((right & ~backbone).sum()), int((backbone & ~right).sum())
    return {
        "top1": _percent(right),
        "gain_interval": list(paired_interval(gained, lost, len(right))),
        "macs": cost,
        "speedup": macs.full / cost,
    }


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _shares(index: Tensor, stored: ExitLogits) -> list[float]:
    counts = index.bincount(minlength=stored.num_exits + 1)
    return [count / len(stored) for count in counts.tolist()]
