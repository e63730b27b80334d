"""Classify image files, from Python and from the command line: names, probabilities, and the exit that answered."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_selfdistill.cores import fit_threads, loader_processes
from timm_selfdistill.data.decode import check_pillow, decode, image_endings, read_file
from timm_selfdistill.data.transforms import MODES, InputConfig, Transform, eval_transform
from timm_selfdistill.data.workers import worker_options
from timm_selfdistill.early_exit import EarlyExit
from timm_selfdistill.escape import printable
from timm_selfdistill.hub import class_names, load_with_early_exit
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import ENSEMBLE, AllExits, ExitChoice, check_choice
from timm_selfdistill.output import progress_bar, tell

BATCH_SIZE: Final = 32


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one image.

    Args:
        path: The image's file.
        classes: Names of the most likely classes, the likeliest first; where the model has no names, the indices.
        indices: Their places in the logits.
        probabilities: Their probabilities, 0 to 1.
        exit: Index of the exit that answered; K, the number of added exits, is the backbone's own classifier or the
            ensemble.
        exit_name: Its name; of the ensemble "ensemble (fitted)" or "ensemble (mean)".
        error: Why there is no answer, and all of the above but the path is empty; None if there is one.
    """

    path: str
    classes: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    exit: int | None = None
    exit_name: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return an answer as JSON; with more than one class, all of them under "top"."""
        tops = [
            {"class": name, "index": index, "probability": probability}
            for name, index, probability in zip(self.classes, self.indices, self.probabilities, strict=True)
        ]
        top = {"top": tops} if len(tops) > 1 else {}
        return {"path": self.path, **tops[0], "exit": self.exit, "exit_name": self.exit_name, **top}

    def to_text(self) -> str:
        """Return an answer as lines of path, class, probability and exit, separated by tabs; one line a class.

        Line breaks, tabs and control characters in names are shown escaped, as "\\n".
        """
        return "\n".join(
            f"{printable(self.path)}\t{printable(name)}\t{probability:.4f}\t{self.exit}: {printable(self.exit_name)}"
            for name, probability in zip(self.classes, self.probabilities, strict=True)
        )


def predict_images(
    model: SelfDistillModel | EarlyExit,
    paths: Iterable[str | Path],
    *,
    exit: ExitChoice | None = None,
    top_k: int = 1,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Classify image files in batches, preprocessed as the model's configuration says.

    Args:
        model: The model, in eval mode; with early exit, each image is answered by the first exit that is confident.
        paths: The files.
        exit: Index of the exit that answers, for a model without early exit, or "ensemble": all of them together, as
            `model.ensemble` says; by default the backbone's own classifier.
        top_k: How many classes to return for each image; at most those of the model.
        batch_size: Images that run at a time.
        workers: Processes that read and decode images; by default up to four with cores of their own, which torch's
            threads leave to them, and none for a single batch.

    Returns:
        An iterator over the answers, in the order of the files. An image that cannot be read or decoded, or for which
        the model gives no finite logits, has an `error` instead.

    Raises:
        ValueError: If an argument is not allowed, the model is in train mode, or Pillow was told to accept truncated
            images.
    """
    network = model.model if isinstance(model, EarlyExit) else model
    if isinstance(model, EarlyExit) and exit is not None:
        raise ValueError(f"exit is {exit}, but the model chooses the exit for each image: give its .model instead.")
    if exit is not None:
        check_choice(network, exit)
    if network.training:
        raise ValueError("The model is in train mode: call eval() first.")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0.")
    check_pillow()
    files = [str(path) for path in paths]
    config = InputConfig.from_model(network.backbone)
    if workers is None:
        device = next(network.parameters()).device.type
        workers = loader_processes(None, device) if len(files) > batch_size else 0
        fit_threads(beside=workers)
    loader: DataLoader[list[tuple[str, Tensor | str]]] = DataLoader(
        files,  # type: ignore[arg-type]  # a list is a dataset
        batch_size=batch_size,
        **worker_options(workers),
        collate_fn=partial(_load_all, mode=MODES[config.channels], transform=eval_transform(config)),
        # Its own, because starting a loader draws a number.
        generator=torch.Generator(),
    )
    names = class_names(network) or tuple(map(str, range(network.num_classes)))
    choice = network.num_exits if exit is None else exit
    answer = partial(_answer, model, choice, names, min(top_k, network.num_classes))
    return (prediction for batch in loader for prediction in answer(batch))


def _load_all(paths: list[str], mode: str, transform: Transform) -> list[tuple[str, Tensor | str]]:
    """Return each path with its transformed image [C, H, W], or with the reason why there is none."""
    return [(path, _load_image(path, mode, transform)) for path in paths]


def _load_image(path: str, mode: str, transform: Transform) -> Tensor | str:
    try:
        data = read_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except ValueError as error:  # it is not a file, or too large
        return str(error)
    try:
        image = decode(data, mode)
    except Exception as error:  # Pillow's decoders raise whatever their format's library does
        return f"it cannot be decoded: {str(error) or repr(error)}"
    return transform(image)


def _answer(
    model: SelfDistillModel | EarlyExit,
    choice: ExitChoice,
    classes: Sequence[str],
    top_k: int,
    batch: list[tuple[str, Tensor | str]],
) -> Iterator[Prediction]:
    """Run a model on the images of a batch that could be loaded."""
    network = model.model if isinstance(model, EarlyExit) else model
    names = network.exit_names
    if choice == ENSEMBLE or (isinstance(model, EarlyExit) and model.config.fallback == "ensemble"):
        names = (*names[:-1], network.ensemble.title)
    images = [image for _, image in batch if isinstance(image, Tensor)]
    answers = _run(model, choice, torch.stack(images)) if images else iter(())
    for path, image in batch:
        if isinstance(image, str):
            yield Prediction(path, error=image)
            continue
        answered, probabilities = next(answers)
        if not probabilities.isfinite().all():
            yield Prediction(path, error="the model gives no finite logits for it")
            continue
        values, places = (top.tolist() for top in probabilities.topk(top_k))
        top_classes = tuple(classes[place] for place in places)
        yield Prediction(path, top_classes, tuple(places), tuple(values), answered, names[answered])


@torch.inference_mode()
def _run(model: SelfDistillModel | EarlyExit, choice: ExitChoice, images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Return, for each image, the exit that answered and its probabilities [num_classes]."""
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    if isinstance(model, EarlyExit):
        logits, exits = model(images)
        # The probabilities that the exits decided by; the last one has no temperature.
        temperatures = model.config.temperatures or (1.0,) * len(model.config.thresholds)
        logits = logits.float() / torch.tensor((*temperatures, 1.0), device=exits.device)[exits].unsqueeze(1)
    elif isinstance(choice, str):
        logits, exits = AllExits(model)(images).float(), torch.full((len(images),), model.num_exits)
    else:
        logits, exits = model.forward_exit(images, choice).float(), torch.full((len(images),), choice)
    return iter(zip(exits.tolist(), logits.softmax(-1).cpu(), strict=True))


def find_images(arguments: Sequence[str], lines: Iterable[str]) -> list[str]:
    """Return the image files that a command line names, whatever their names are, and those in its folders, sorted.

    "-" stands for the lines, a file or folder each. What does not exist is returned too, and fails when it is read, so
    that it does not stop the others. No image at all is a ValueError.
    """
    paths: list[str] = []
    for argument in arguments:
        paths += (line.rstrip("\r\n") for line in lines) if argument == "-" else [argument]
    files: list[str] = []
    for path in filter(None, paths):
        files += _in_folder(path) if Path(path).is_dir() else [path]
    if not files:
        raise ValueError(
            f"There is no image in {', '.join(arguments)}; in a folder, files with the ending of an image are, such as "
            ".png, .jpg and .avif."
        )
    return files


def _in_folder(folder: str) -> list[str]:
    endings = image_endings()
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in endings
    )


def print_predictions(
    source: str,
    images: Sequence[str],
    *,
    exit: ExitChoice | None = None,
    threshold: float | None = None,
    top_k: int = 1,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    as_json: bool = False,
) -> int:
    """Classify images and print the answers, as the command `predict` does; errors go to the error output.

    Arguments are those of `find_images` and `predict_images`, and:

    Args:
        source: A run's folder, the model folder in it, or a repository on the Hub. Without `exit`, the early-exit
            settings that are saved with it hold, if there are any.
        threshold: Let images leave early from this confidence on, at every exit, whatever is saved.
        as_json: Print one JSON object a line.

    Returns:
        0, or 1 if there is an image without an answer.
    """
    files = find_images(images, sys.stdin)
    model = _load(source, exit, threshold)
    if isinstance(model, EarlyExit):
        where = "settings that are saved with the model" if threshold is None else f"--threshold {threshold:g}"
        print(
            f"Early exit answers, by the {where}: an image stops at the first exit that is confident enough. "
            f"--exit {model.model.num_exits} lets the whole network answer.",
            file=sys.stderr,
        )
    predictions = predict_images(model, files, exit=exit, top_k=top_k, batch_size=batch_size, workers=workers)
    failed = 0
    with progress_bar(title="predict", show=len(files) > batch_size, total=len(files), unit="image") as bar:
        for prediction in predictions:
            if prediction.error is not None:
                failed += 1
                tell(f"{prediction.path}: {prediction.error}")
            else:
                tqdm.write(json.dumps(prediction.to_json()) if as_json else prediction.to_text())
            bar.update()
    if failed:
        print(f"{failed} of {len(files)} images have no answer.", file=sys.stderr)
    return 1 if failed else 0


def _load(source: str, exit: ExitChoice | None, threshold: float | None) -> SelfDistillModel | EarlyExit:
    """Load a model, with early exit by what is given or, without that, by what is saved."""
    folder = Path(source) / "model"
    model, settings = load_with_early_exit(folder if folder.is_dir() else source)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if exit is not None:
        return model
    if settings is None:
        return model if threshold is None else EarlyExit(model, threshold)
    if threshold is not None:
        settings = replace(settings, thresholds=(threshold,) * model.num_exits)
    return EarlyExit.from_config(model, settings)
