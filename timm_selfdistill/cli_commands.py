"""The commands for a model, trained or of timm, and for a run's folder; `cli.py` lists them.

What needs the extra `train` is imported by the command that uses it.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from timm_selfdistill.early_exit import FALLBACKS, list_rules
from timm_selfdistill.escape import printable
from timm_selfdistill.export import FORMATS, export_folder
from timm_selfdistill.hub import push_folder, read_early_exit
from timm_selfdistill.predict import BATCH_SIZE, print_predictions
from timm_selfdistill.preview import format_preview, preview_exits
from timm_selfdistill.recipe import read_settings
from timm_selfdistill.report import format_table
from timm_selfdistill.stop import in_background

_RANGE_IMAGES: Final = 128  # that set the ranges of static quantisation


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_model_source(parser)
    parser.add_argument("images", nargs="+", help="files, folders, or - for a list on the standard input, one a line")
    answering = parser.add_mutually_exclusive_group()
    help = "index of the one exit that answers, 0 the shallowest, or ensemble: all together"
    answering.add_argument("--exit", type=_exit_choice, metavar="K|ensemble", help=help)
    help = "let images leave at any exit with this confidence, whatever is saved"
    answering.add_argument("--threshold", type=float, help=help)
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="print the N most likely classes")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images at a time")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode images")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object a line")


def _predict(folder: str, from_checkpoint: bool, **options: Any) -> int:
    with _model_source(folder, from_checkpoint) as source:
        return print_predictions(source, **options)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model_source(parser)
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    answering = parser.add_mutually_exclusive_group()
    help = "index of the exit, or ensemble: all together; the backbone's own by default"
    answering.add_argument("--exit", type=_exit_choice, metavar="K|ensemble", help=help)
    help = "the logits of each exit, in one graph"
    answering.add_argument("--all-exits", dest="exit", action="store_const", const="all", help=help)
    help = "early exit: leave at any exit with this confidence, whatever is saved"
    answering.add_argument("--threshold", type=float, help=help)
    help = "onnx-stages in 8 bits, with ranges of the batch or of images"
    parser.add_argument("--quantize", choices=["dynamic", "static"], help=help)
    parser.add_argument("--data", dest="data_path", metavar="DATA", help="data set of the images of --quantize static")
    parser.add_argument("--split", help="its split; what the run held out for validation by default")
    parser.add_argument("--dynamic-batch", action="store_true", help="take batches of any size, not only one image")
    _add_image_size(parser)
    help = "where to write; by default exit-K, ensemble, all or the format, with an ending, in the folder"
    parser.add_argument("--output", type=Path, help=help)
    help = "replace what an earlier export wrote there"
    parser.add_argument("--force", dest="overwrite", action="store_true", help=help)


def _export(
    folder: str, from_checkpoint: bool, data_path: str | None, split: str | None, quantize: str | None, **options: Any
) -> None:
    images = None
    if quantize == "static":
        from timm_selfdistill.calibration import held_out_images

        images = held_out_images(
            Path(folder), _RANGE_IMAGES, data_path=data_path, split=split, from_checkpoint=from_checkpoint
        )
    elif data_path is not None or split is not None:
        raise ValueError("--data and --split name the images of --quantize static.")
    with _model_source(folder, from_checkpoint) as source:
        path = export_folder(source, default_folder=folder, quantize=quantize, calibration_images=images, **options)
    print(printable(path))


def _add_push(parser: argparse.ArgumentParser) -> None:
    _add_run_folder(parser)
    parser.add_argument("repo_id", metavar="repo", help="the repository, as namespace/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--pr", dest="create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", help="branch to push to; the main branch by default")
    parser.add_argument("--message", dest="commit_message", metavar="MESSAGE", help="what the commit says")
    parser.add_argument("--license", help="licence of the weights, by its identifier on the Hub, such as apache-2.0")


def _push(**options: Any) -> None:
    print(printable(in_background(partial(push_folder, **options), "push").result()))


def _add_exits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="model", help="name of a timm model")
    help = "how many exits to mark; by default three, or fewer on a small backbone"
    parser.add_argument("--num", dest="exits", type=int, metavar="NUM", help=help)
    _add_image_size(parser)
    parser.add_argument("--num-classes", type=int, help="number of classes; the model's default otherwise")
    parser.add_argument("--head", default="auto", help="head of every exit; by default as wide as the budget allows")
    help = "share of the backbone's multiply-accumulates that a default head may cost; 0.1 by default"
    parser.add_argument("--head-budget", type=float, metavar="SHARE", help=help)
    help = "arguments of timm.create_model, such as in_chans=1"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)


def _exits(overrides: list[str], **options: Any) -> None:
    print(format_preview(preview_exits(**options, model_kwargs=read_settings(overrides))))


def _add_finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the run's folder")


def _finish(folder: Path) -> None:
    from timm_selfdistill.train import finish_folder

    print(format_table(finish_folder(folder)))
    print(f"\nWritten to {folder}: report.json, report.md, report.png, model/")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_run_folder(parser)
    _add_data(parser)
    parser.add_argument("--output", type=Path, help="folder for report.json, report.md and report.png")
    _add_from_checkpoint(parser)


def _evaluate(folder: Path, from_checkpoint: bool, **options: Any) -> None:
    from timm_selfdistill.train import evaluate_folder
    from timm_selfdistill.train.saved_run import SavedRun

    print(format_table(evaluate_folder(folder, from_checkpoint=from_checkpoint, **options)))
    if not from_checkpoint and read_early_exit(SavedRun.find(folder).model_folder) is not None:
        print(
            "\nEach row is one exit for all images. Early exit by the saved settings answers in predict, and calibrate "
            "reports on it."
        )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    from timm_selfdistill.calibration import CONFIDENCE

    _add_run_folder(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    help = (
        "as cheap as possible, at most this many percentage points of top-1 accuracy below the backbone's own "
        "classifier on the calibration split"
    )
    goal.add_argument("--max-accuracy-drop", type=float, metavar="POINTS", help=help)
    goal.add_argument("--speedup", type=float, help="as accurate as possible, this many times cheaper")
    goal.add_argument("--macs-budget", type=float, metavar="MACS", help="the same for mean MACs of an image")
    help = (
        "as cheap as possible, and certainly (see --confidence) at most this share of new images answered wrong that "
        "the backbone's own classifier gets right"
    )
    goal.add_argument("--risk", type=float, help=help)
    parser.add_argument("--confidence", type=float, help=f"confidence of --risk; {CONFIDENCE} by default")
    parser.add_argument("--split", help="split to calibrate on; what the run held out for validation by default")
    _add_data(parser, "data set of both splits")
    parser.add_argument("--rule", choices=list_rules(), default="max-softmax", help="what confidence is")
    help = "who answers when no exit reaches its threshold"
    parser.add_argument("--fallback", choices=FALLBACKS, default="last", help=help)
    help = "let exit k answer with the ensemble of the exits 0 to k; usually with --fallback ensemble"
    parser.add_argument("--running-ensemble", action="store_true", help=help)
    help = "choose by the time of batches of N images here, in place of MACs"
    parser.add_argument("--by-time", dest="time_batch_size", type=int, metavar="N", help=help)
    help = "calibrate stages of this model that were exported as onnx-stages"
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help=help)
    parser.add_argument("--output", type=Path, help="folder for calibration.json, .md, .png; the run's by default")
    _add_from_checkpoint(parser)


def _calibrate(
    folder: Path,
    max_accuracy_drop: float | None,
    speedup: float | None,
    macs_budget: float | None,
    risk: float | None,
    confidence: float | None,
    **options: Any,
) -> None:
    from timm_selfdistill.calibration import CONFIDENCE, Goal, calibrate_folder, format_calibration

    if confidence is None:
        confidence = CONFIDENCE
    elif risk is None:
        raise ValueError("--confidence is that of --risk, which is not given.")
    goal = Goal(max_accuracy_drop, speedup, macs_budget, risk=risk, confidence=confidence)
    print(format_calibration(calibrate_folder(folder, goal, **options)))


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    from timm_selfdistill.analysis import DRAWS, IMAGES, SIGMAS

    _add_run_folder(parser)
    _add_data(parser)
    help = "a run whose backbone to draw beside; the run's own baseline by default, if its checkpoint is there"
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help=help)
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"at most N; {IMAGES} by default")
    help = f"standard deviations of the noise; by default 0 to {SIGMAS[-1]:g} in steps of {SIGMAS[1]:g}"
    parser.add_argument("--sigmas", type=_numbers, default=SIGMAS, metavar="S,S,...", help=help)
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the noise; {DRAWS} by default")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="folder for analysis.json, .md, .png; the run's by default")


def _analyze(folder: Path, **options: Any) -> None:
    from timm_selfdistill.analysis import analyze_folder, format_analysis

    print(format_analysis(analyze_folder(folder, **options)))


def _add_run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")


def _add_model_source(parser: argparse.ArgumentParser) -> None:
    """Add the folder or repository of a trained model; `_model_source` reads it."""
    parser.add_argument("folder", help="a run's folder, the model folder in it, or a repository on the Hub")
    _add_from_checkpoint(parser)


def _add_from_checkpoint(parser: argparse.ArgumentParser) -> None:
    help = "take the newest checkpoint of a run that was stopped"
    parser.add_argument("--from-checkpoint", action="store_true", help=help)


@contextmanager
def _model_source(folder: str, from_checkpoint: bool) -> Iterator[str]:
    """Give the body the folder or repository of a model."""
    if not from_checkpoint:
        yield folder
        return
    from timm_selfdistill.train import opened_run

    with opened_run(Path(folder), from_checkpoint=True) as saved:
        yield str(saved.model_folder)


def _add_data(parser: argparse.ArgumentParser, what: str = "data set") -> None:
    help = f"{what}: a hub name or a path; the run's own by default"
    parser.add_argument("--data", dest="data_path", metavar="DATA", help=help)
    help = "fields of the recipe's data section, such as eval_split=val"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)


def _add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=_size, metavar="N or HxW", help="side of the image in pixels, or both")


def _size(text: str) -> tuple[int, int]:
    """Read "224" or "224x192" as height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or two as in 224x192, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _exit_choice(text: str) -> int | Literal["ensemble"]:
    """Read the index of an exit, or "ensemble"."""
    if text == "ensemble":
        return "ensemble"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be the index of an exit or 'ensemble', got {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None


COMMANDS: Final = {
    "predict": (_add_predict, _predict),
    "export": (_add_export, _export),
    "push": (_add_push, _push),
    "exits": (_add_exits, _exits),
    "finish": (_add_finish, _finish),
    "evaluate": (_add_evaluate, _evaluate),
    "calibrate": (_add_calibrate, _calibrate),
    "analyze": (_add_analyze, _analyze),
}
