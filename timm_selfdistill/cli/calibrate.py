"""`timm-selfdistill calibrate`: choose when a trained model answers early."""

import argparse
from pathlib import Path

from timm_selfdistill.calibration import CONFIDENCE, Goal, calibrate_folder, format_calibration
from timm_selfdistill.cli.options import add_data_overrides, add_from_checkpoint, add_run_folder
from timm_selfdistill.early_exit import FALLBACKS, list_rules


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--data", help="data set of both splits: a hub name or a path; the run's own by default")
    parser.add_argument("--rule", choices=list_rules(), default="max-softmax", help="what confidence is")
    parser.add_argument(
        "--fallback", choices=FALLBACKS, default="last", help="who answers when no exit reaches its threshold"
    )
    parser.add_argument(
        "--by-time", type=int, metavar="N", help="choose by the time of batches of N images here, in place of MACs"
    )
    parser.add_argument("--output", type=Path, help="folder for calibration.json, .md, .png; the run's by default")
    add_from_checkpoint(parser)
    add_data_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.confidence is not None and arguments.risk is None:
        raise ValueError("--confidence is that of --risk, which is not given.")
    goal = Goal(
        max_accuracy_drop=arguments.max_accuracy_drop,
        speedup=arguments.speedup,
        macs_budget=arguments.macs_budget,
        risk=arguments.risk,
        confidence=CONFIDENCE if arguments.confidence is None else arguments.confidence,
    )
    report = calibrate_folder(
        arguments.folder,
        goal,
        data_path=arguments.data,
        split=arguments.split,
        overrides=arguments.overrides,
        rule=arguments.rule,
        fallback=arguments.fallback,
        time_batch_size=arguments.by_time,
        output=arguments.output,
        from_checkpoint=arguments.from_checkpoint,
    )
    print(format_calibration(report))
