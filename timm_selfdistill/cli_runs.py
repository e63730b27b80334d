"""The commands for a run's folder: finish, evaluate, calibrate, analyze."""

import argparse
from pathlib import Path
from typing import Any, Final

from timm_selfdistill.analysis import DRAWS, IMAGES, SIGMAS, analyze_folder, format_analysis
from timm_selfdistill.calibration import CONFIDENCE, Goal, calibrate_folder, format_calibration
from timm_selfdistill.cli_models import add_from_checkpoint, add_run_folder
from timm_selfdistill.early_exit import FALLBACKS, list_rules
from timm_selfdistill.hub import read_early_exit
from timm_selfdistill.report import format_table
from timm_selfdistill.train import evaluate_folder, finish_folder
from timm_selfdistill.train.saved_run import SavedRun


def _add_finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the run's folder")


def _finish(folder: Path) -> None:
    print(format_table(finish_folder(folder)))
    print(f"\nWritten to {folder}: report.json, report.md, report.png, model/")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    _add_data(parser)
    parser.add_argument("--output", type=Path, help="folder for report.json, report.md and report.png")
    add_from_checkpoint(parser)


def _evaluate(folder: Path, from_checkpoint: bool, **options: Any) -> None:
    print(format_table(evaluate_folder(folder, from_checkpoint=from_checkpoint, **options)))
    if not from_checkpoint and read_early_exit(SavedRun.find(folder).model_folder) is not None:
        print(
            "\nEach row is one exit for all images. Early exit by the saved settings answers in predict, and calibrate "
            "reports on it."
        )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="as cheap as possible, at most this many percentage points of top-1 accuracy below the backbone's own "
        "classifier on the calibration split",
    )
    goal.add_argument("--speedup", type=float, help="as accurate as possible, this many times cheaper")
    goal.add_argument("--macs-budget", type=float, metavar="MACS", help="the same for mean MACs of an image")
    goal.add_argument(
        "--risk",
        type=float,
        help="as cheap as possible, and certainly (see --confidence) at most this share of new images answered wrong "
        "that the backbone's own classifier gets right",
    )
    parser.add_argument("--confidence", type=float, help=f"confidence of --risk; {CONFIDENCE} by default")
    parser.add_argument("--split", help="split to calibrate on; what the run held out for validation by default")
    _add_data(parser, "data set of both splits")
    parser.add_argument("--rule", choices=list_rules(), default="max-softmax", help="what confidence is")
    parser.add_argument(
        "--fallback", choices=FALLBACKS, default="last", help="who answers when no exit reaches its threshold"
    )
    parser.add_argument(
        "--running-ensemble",
        action="store_true",
        help="let exit k answer with the ensemble of the exits 0 to k; usually with --fallback ensemble",
    )
    parser.add_argument(
        "--by-time",
        dest="time_batch_size",
        type=int,
        metavar="N",
        help="choose by the time of batches of N images here, in place of MACs",
    )
    parser.add_argument(
        "--onnx", type=Path, metavar="FOLDER", help="calibrate stages of this model that were exported as onnx-stages"
    )
    parser.add_argument("--output", type=Path, help="folder for calibration.json, .md, .png; the run's by default")
    add_from_checkpoint(parser)


def _calibrate(
    folder: Path,
    max_accuracy_drop: float | None,
    speedup: float | None,
    macs_budget: float | None,
    risk: float | None,
    confidence: float | None,
    **options: Any,
) -> None:
    if confidence is None:
        confidence = CONFIDENCE
    elif risk is None:
        raise ValueError("--confidence is that of --risk, which is not given.")
    goal = Goal(max_accuracy_drop, speedup, macs_budget, risk=risk, confidence=confidence)
    print(format_calibration(calibrate_folder(folder, goal, **options)))


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    _add_data(parser)
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="a run whose backbone to draw beside; the run's own baseline by default, if its checkpoint is there",
    )
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"at most N; {IMAGES} by default")
    parser.add_argument(
        "--sigmas",
        type=_numbers,
        default=SIGMAS,
        metavar="S,S,...",
        help=f"standard deviations of the noise; by default 0 to {SIGMAS[-1]:g} in steps of {SIGMAS[1]:g}",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the noise; {DRAWS} by default")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="folder for analysis.json, .md, .png; the run's by default")


def _analyze(folder: Path, **options: Any) -> None:
    print(format_analysis(analyze_folder(folder, **options)))


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None


def _add_data(parser: argparse.ArgumentParser, what: str = "data set") -> None:
    help = "fields of the recipe's data section, such as eval_split=val"
    parser.add_argument(
        "--data", dest="data_path", metavar="DATA", help=f"{what}: a hub name or a path; the run's own by default"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)


COMMANDS: Final = {
    "finish": (_add_finish, _finish),
    "evaluate": (_add_evaluate, _evaluate),
    "calibrate": (_add_calibrate, _calibrate),
    "analyze": (_add_analyze, _analyze),
}
