"""Arguments that several commands share."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a trained model on this machine."""
    parser.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")


def add_model_source(parser: argparse.ArgumentParser) -> None:
    """Add the folder or repository of a trained model; `model_source` reads it."""
    parser.add_argument("folder", help="a run's folder, the model folder in it, or a repository on the Hub")
    add_from_checkpoint(parser)


def add_from_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )


def add_data_overrides(parser: argparse.ArgumentParser) -> None:
    """Add key=value for the recipe's data section."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section, such as eval_split=val"
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=_size, metavar="N or HxW", help="side of the image in pixels, or both")


def exit_choice(text: str) -> int | Literal["ensemble"]:
    """Read the index of an exit, or "ensemble"."""
    if text == "ensemble":
        return "ensemble"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be the index of an exit or 'ensemble', got {text!r}") from None


@contextmanager
def model_source(arguments: argparse.Namespace) -> Iterator[str]:
    """Give the body the folder or repository of the model that the arguments name."""
    if not arguments.from_checkpoint:
        yield arguments.folder
        return
    from timm_selfdistill.train import opened_run

    with opened_run(Path(arguments.folder), from_checkpoint=True) as saved:
        yield str(saved.model_folder)


def _size(text: str) -> tuple[int, int]:
    """Read "224" or "224x192" as height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or two as in 224x192, got {text!r}")
    return int(match[1]), int(match[2] or match[1])
