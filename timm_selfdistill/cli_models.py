"""The commands for a model, trained or of timm: predict, export, push, exits."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from timm_selfdistill.escape import printable
from timm_selfdistill.export import FORMATS, export_folder
from timm_selfdistill.hub import push_folder
from timm_selfdistill.predict import BATCH_SIZE, print_predictions
from timm_selfdistill.preview import format_preview, preview_exits
from timm_selfdistill.recipe import read_settings
from timm_selfdistill.stop import in_background

_RANGE_IMAGES: Final = 128  # that set the ranges of static quantisation


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a trained model on this machine."""
    parser.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")


def add_from_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_model_source(parser)
    parser.add_argument("images", nargs="+", help="files, folders, or - for a list on the standard input, one a line")
    answering = parser.add_mutually_exclusive_group()
    answering.add_argument(
        "--exit",
        type=_exit_choice,
        metavar="K|ensemble",
        help="index of the one exit that answers, 0 the shallowest, or ensemble: all together",
    )
    answering.add_argument(
        "--threshold", type=float, help="let images leave at any exit with this confidence, whatever is saved"
    )
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
    answering.add_argument(
        "--exit",
        type=_exit_choice,
        metavar="K|ensemble",
        help="index of the exit, or ensemble: all together; the backbone's own by default",
    )
    answering.add_argument(
        "--all-exits", dest="exit", action="store_const", const="all", help="the logits of each exit, in one graph"
    )
    answering.add_argument(
        "--threshold", type=float, help="early exit: leave at any exit with this confidence, whatever is saved"
    )
    parser.add_argument(
        "--quantize", choices=["dynamic", "static"], help="onnx-stages in 8 bits, with ranges of the batch or of images"
    )
    parser.add_argument("--data", dest="data_path", metavar="DATA", help="data set of the images of --quantize static")
    parser.add_argument("--split", help="its split; what the run held out for validation by default")
    parser.add_argument("--dynamic-batch", action="store_true", help="take batches of any size, not only one image")
    _add_image_size(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write; by default exit-K, ensemble, all or the format, with an ending, in the folder",
    )
    parser.add_argument(
        "--force", dest="overwrite", action="store_true", help="replace what an earlier export wrote there"
    )


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
    add_run_folder(parser)
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
    parser.add_argument(
        "--num",
        dest="exits",
        type=int,
        metavar="NUM",
        help="how many exits to mark; by default three, or fewer on a small backbone",
    )
    _add_image_size(parser)
    parser.add_argument("--num-classes", type=int, help="number of classes; the model's default otherwise")
    parser.add_argument("--head", default="auto", help="head of every exit; by default as wide as the budget allows")
    parser.add_argument(
        "--head-budget",
        type=float,
        metavar="SHARE",
        help="share of the backbone's multiply-accumulates that a default head may cost; 0.1 by default",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="arguments of timm.create_model, such as in_chans=1"
    )


def _exits(overrides: list[str], **options: Any) -> None:
    print(format_preview(preview_exits(**options, model_kwargs=read_settings(overrides))))


def _add_model_source(parser: argparse.ArgumentParser) -> None:
    """Add the folder or repository of a trained model; `_model_source` reads it."""
    parser.add_argument("folder", help="a run's folder, the model folder in it, or a repository on the Hub")
    add_from_checkpoint(parser)


@contextmanager
def _model_source(folder: str, from_checkpoint: bool) -> Iterator[str]:
    """Give the body the folder or repository of a model."""
    if not from_checkpoint:
        yield folder
        return
    from timm_selfdistill.train import opened_run

    with opened_run(Path(folder), from_checkpoint=True) as saved:
        yield str(saved.model_folder)


def _exit_choice(text: str) -> int | Literal["ensemble"]:
    """Read the index of an exit, or "ensemble"."""
    if text == "ensemble":
        return "ensemble"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be the index of an exit or 'ensemble', got {text!r}") from None


def _add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=_size, metavar="N or HxW", help="side of the image in pixels, or both")


def _size(text: str) -> tuple[int, int]:
    """Read "224" or "224x192" as height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or two as in 224x192, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


COMMANDS: Final = {
    "predict": (_add_predict, _predict),
    "export": (_add_export, _export),
    "push": (_add_push, _push),
    "exits": (_add_exits, _exits),
}
