"""The images of a command line, classified and printed."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from timm_selfdistill.data.image_files import image_endings
from timm_selfdistill.early_exit import EarlyExit
from timm_selfdistill.escape import printable
from timm_selfdistill.hub import load_with_early_exit
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.predict.images import BATCH_SIZE, predict_images


def find_images(arguments: Sequence[str], lines: Iterable[str]) -> list[str]:
    """Return the image files that a command line names.

    Args:
        arguments: Files, whatever their names are; folders, of which all images are taken, those in folders inside
            too, in the order of their names; and "-", which stands for `lines`.
        lines: Files and folders, one a line; what does not exist there is returned too, and fails when it is read.

    Raises:
        ValueError: If an argument does not exist, or there is no image.
    """
    files: list[str] = []
    for argument in arguments:
        if argument == "-":
            for line in lines:
                if path := line.rstrip("\r\n"):
                    files += _in_folder(path) if Path(path).is_dir() else [path]
        elif Path(argument).is_dir():
            files += _in_folder(argument)
        elif Path(argument).exists():
            files.append(argument)
        else:
            raise ValueError(f"There is no file or folder {argument}.")
    if not files:
        raise ValueError(
            f"There is no image in {', '.join(arguments)}; in a folder, files with the ending of an image are, such as "
            ".png, .jpg and .avif."
        )
    return files


def print_predictions(
    source: str,
    images: Sequence[str],
    *,
    exit: int | None = None,
    threshold: float | None = None,
    top_k: int = 1,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    as_json: bool = False,
) -> int:
    """Classify the images of a command line and print the answers; what cannot be read is told on the error output.

    Without `exit`, the early-exit settings that are saved with the model hold, if there are any; else its backbone's
    own classifier answers.

    Args:
        source: A run's folder, the model folder in it, or a repository on the Hub.
        images: Files, folders and "-", as in `find_images`.
        exit: Index of the one exit that answers.
        threshold: Let images leave early from this confidence on, at every exit, whatever is saved.
        top_k: How many classes to print of each image.
        batch_size: As in `predict_images`.
        workers: As in `predict_images`.
        as_json: Print one JSON object a line.

    Returns:
        0, or 1 if there is an image without an answer.

    Raises:
        ValueError: If there is no image or no model, or an argument is not allowed.
        HubError: If the repository cannot be loaded.
    """
    files = find_images(images, sys.stdin)
    model = _load(source, exit, threshold)
    predictions = predict_images(model, files, exit=exit, top_k=top_k, batch_size=batch_size, workers=workers)
    failed = 0
    # None hides the bar where the error output is no terminal.
    with tqdm(total=len(files), unit="image", leave=False, disable=True if len(files) <= batch_size else None) as bar:
        for prediction in predictions:
            if prediction.error is not None:
                failed += 1
                tqdm.write(printable(f"{prediction.path}: {prediction.error}"), file=sys.stderr)
            else:
                tqdm.write(json.dumps(prediction.to_json()) if as_json else prediction.to_text())
            bar.update()
    if failed:
        print(f"{failed} of {len(files)} images have no answer.", file=sys.stderr)
    return 1 if failed else 0


def _in_folder(folder: str) -> list[str]:
    endings = image_endings()
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in endings
    )


def _load(source: str, exit: int | None, threshold: float | None) -> SelfDistillModel | EarlyExit:
    """Load a model, with early exit where nothing speaks against it."""
    folder = Path(source) / "model"
    model, settings = load_with_early_exit(folder if folder.is_dir() else source)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if exit is not None or (settings is None and threshold is None):
        return model
    if settings is None:
        assert threshold is not None
        return EarlyExit(model, threshold)
    if threshold is not None:
        settings = replace(settings, thresholds=(threshold,) * model.num_exits)
    return EarlyExit.from_config(model, settings)
