"""Classify image files: names, probabilities, and the exit that answered."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from timm_selfdistill.data.decode import check_pillow, decode, read_file
from timm_selfdistill.data.transforms import MODES, InputConfig, Transform, eval_transform
from timm_selfdistill.data.workers import worker_options
from timm_selfdistill.early_exit import EarlyExit
from timm_selfdistill.escape import printable
from timm_selfdistill.hub import class_names
from timm_selfdistill.model import SelfDistillModel

BATCH_SIZE: Final = 32
_MOST_WORKERS = 4


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Args:
        path: The image's file.
        classes: Names of the most likely classes, the likeliest first; where the model has no names, the indices.
        indices: Their places in the logits.
        probabilities: Their probabilities, 0 to 1.
        exit: Index of the exit that answered; K, the number of added exits, is the backbone's own classifier or the
            ensemble.
        exit_name: Its name.
        error: Why there is no answer, and all of the above but the path is empty; else None.
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
    exit: int | None = None,
    top_k: int = 1,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Classify image files, prepared as the model's own configuration says, in batches.

    Args:
        model: The model, in eval mode; with early exit, each image is answered by the first exit that is sure of it.
        paths: The files.
        exit: Index of the exit that answers, for a model without early exit; by default the backbone's own classifier.
        top_k: How many classes to tell of each image; at most those of the model.
        batch_size: Images that run at a time.
        workers: Processes that read and decode images; by default up to four, and none for no more than one batch.

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
    if exit is not None and not 0 <= exit <= network.num_exits:
        raise ValueError(f"There is no exit {exit}; allowed are 0 to {network.num_exits} (the backbone's own).")
    if network.training:
        raise ValueError("The model is in train mode: call eval() first.")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0.")
    check_pillow()
    files = [str(path) for path in paths]
    input = InputConfig.from_model(network.backbone)
    if workers is None:
        workers = min(_MOST_WORKERS, os.cpu_count() or 1) if len(files) > batch_size else 0
    loader: DataLoader[list[tuple[str, Tensor | str]]] = DataLoader(
        files,  # type: ignore[arg-type]  # a list is a dataset
        batch_size=batch_size,
        **worker_options(workers),
        collate_fn=partial(_load_all, mode=MODES[input.channels], transform=eval_transform(input)),
        # Its own, because starting a loader draws a number.
        generator=torch.Generator(),
    )
    names = class_names(network) or tuple(map(str, range(network.num_classes)))
    answer = _Answer(model, network.num_exits if exit is None else exit, names, min(top_k, network.num_classes))
    return (prediction for batch in loader for prediction in answer(batch))


def _load_all(paths: list[str], mode: str, transform: Transform) -> list[tuple[str, Tensor | str]]:
    """Return each path with its transformed image [C, H, W], or with the reason why there is none."""
    return [(path, _load_image(path, mode, transform)) for path in paths]


def _load_image(path: str, mode: str, transform: Transform) -> Tensor | str:
    try:
        data = read_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except ValueError as error:  # it is no file, or too large
        return str(error)
    try:
        image = decode(data, mode)
    except Exception as error:  # Pillow's decoders raise whatever their format's library does
        return f"it cannot be decoded: {str(error) or repr(error)}"
    return transform(image)


class _Answer:
    """Runs a model on the images of a batch that could be loaded."""

    def __init__(self, model: SelfDistillModel | EarlyExit, exit: int, classes: tuple[str, ...], top_k: int) -> None:
        self._model, self._exit, self._classes, self._top_k = model, exit, classes, top_k
        network = model.model if isinstance(model, EarlyExit) else model
        self._device = next(network.parameters()).device
        self._dtype = next(network.parameters()).dtype
        self._exit_names = network.exit_names
        if isinstance(model, EarlyExit) and model.config.fallback == "ensemble":
            self._exit_names = (*network.exit_names[:-1], "ensemble")

    def __call__(self, batch: list[tuple[str, Tensor | str]]) -> Iterator[Prediction]:
        images = [image for _, image in batch if isinstance(image, Tensor)]
        answers = self._run(torch.stack(images)) if images else iter(())
        for path, image in batch:
            if isinstance(image, str):
                yield Prediction(path, error=image)
                continue
            exit, probabilities = next(answers)
            if not probabilities.isfinite().all():
                yield Prediction(path, error="the model gives no finite logits for it")
                continue
            top = probabilities.topk(self._top_k)
            indices = tuple(map(int, top.indices))
            yield Prediction(
                path,
                classes=tuple(self._classes[index] for index in indices),
                indices=indices,
                probabilities=tuple(map(float, top.values)),
                exit=exit,
                exit_name=self._exit_names[exit],
            )

    @torch.inference_mode()
    def _run(self, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Return, for each image, the exit that answered and its probabilities [num_classes]."""
        images = images.to(self._device, self._dtype)
        if isinstance(self._model, EarlyExit):
            logits, exits = self._model(images)
            logits = logits.float() / self._temperatures(exits).unsqueeze(1)
        else:
            logits = self._model.forward_exit(images, self._exit).float()
            exits = torch.full((len(images),), self._exit)
        return iter(zip(exits.tolist(), logits.softmax(-1).cpu(), strict=True))

    def _temperatures(self, exits: Tensor) -> Tensor:
        """Return what the logits of each image are divided by: what its exit decided by."""
        assert isinstance(self._model, EarlyExit)
        config = self._model.config
        values = (1.0,) * len(config.thresholds) if config.temperatures is None else config.temperatures
        return torch.tensor((*values, 1.0), device=exits.device)[exits]
