"""Policies of torchvision and timm for whole batches: every image draws operations and magnitudes of its own.

What an image draws is up to the library's own policy or taken from its tables; here it is only carried out for all
images at once. Drawing is work of the CPU, so it is the same for any device.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import cache, partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment as timm_policies
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, ColorJitter

from timm_selfdistill.data.colours import OPERATIONS
from timm_selfdistill.data.geometry import INTERPOLATIONS, rotation, transform, upload
from timm_selfdistill.data.order import generators_of_training, seed_generators

Values = NDArray[np.float64]

MOVES: Final = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
"""Operations on places, beside those on colours: by degrees, by shares and by pixels."""


class Layer(NamedTuple):
    """One operation for each image of a batch.

    Args:
        names: Of `MOVES` or `colours.OPERATIONS` [B], or empty for none.
        values: What each is called with [B].
    """

    names: NDArray[np.str_]
    values: Values


DrawLayers = Callable[[int, tuple[int, int], np.random.Generator], list[Layer]]
"""From the number of images, their height and width and a generator to the layers, in order."""


class Policy:
    """A step of a batch's augmentation that carries out what is drawn for each image.

    Args:
        draw: Draws the layers.
        fill: The colour of pixels from outside of an image: one value, or one a channel.
        interpolation: How pixels are moved.
        device: Where the images are.
    """

    def __init__(self, draw: DrawLayers, fill: int | tuple[int, ...], interpolation: str, device: torch.device) -> None:
        self.draw = draw
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device).reshape(-1)
        self._interpolation = interpolation

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment images [B, C, H, W] of uint8."""
        height, width = images.shape[2:]
        for layer in self.draw(len(images), (height, width), rng):
            images = self._apply(images, layer)
        return images

    def _apply(self, images: Tensor, layer: Layer) -> Tensor:
        """Carry out each operation for all images that have drawn it."""
        height, width = images.shape[2:]
        names = np.where(np.isin(layer.names, MOVES), "move", layer.names)
        order = np.argsort(names, kind="stable")
        rows, values = upload(order, images.device), upload(layer.values[order], images.device)
        result = images.clone()
        found = np.unique(names[order], return_index=True, return_counts=True)
        for name, start, count in zip(*(array.tolist() for array in found), strict=True):
            if not name:
                continue
            some = slice(start, start + count)
            chosen = images[rows[some]]
            if name == "move":
                matrices = _matrices(layer.names[order[some]], layer.values[order[some]], height, width)
                chosen = transform(chosen, matrices, self._interpolation, self._fill)
            else:
                chosen = OPERATIONS[name](chosen, values[some])
            result[rows[some]] = chosen
        return result


def torchvision_policy(policy: AutoAugment, device: torch.device) -> Policy:
    """Return torchvision's AutoAugment for batches."""

    def draw(batch: int, size: tuple[int, int], rng: np.random.Generator) -> list[Layer]:
        names, probabilities, values = _table(policy.policy, size)
        chosen = rng.integers(len(names), size=batch)
        active = rng.random((batch, 2)) <= probabilities[chosen]
        signs = rng.integers(2, size=(batch, 2))
        return [
            Layer(np.where(active[:, place], names[chosen, place], ""), values[chosen, place, signs[:, place]])
            for place in range(2)
        ]

    return Policy(draw, policy.fill, policy.interpolation.value, device)


def timm_policy(policy: Any, device: torch.device) -> Policy:
    """Return timm's RandAugment or AutoAugment for batches.

    Args:
        policy: A `timm.data.auto_augment.RandAugment` or `AutoAugment`.
        device: Where the images are.

    Raises:
        ValueError: If it has an operation that batches do not know, or resamples in a way that they do not.
    """
    policy = copy(policy)
    # timm's own code draws: its operations note what they would do to an image, which here is what was noted before.
    if isinstance(policy, timm_policies.RandAugment):
        policy.ops = operations = [_noting(operation) for operation in policy.ops]
    else:
        policy.policy = [[_noting(operation) for operation in group] for group in policy.policy]
        operations = [operation for group in policy.policy for operation in group]
    settings = operations[0].kwargs
    interpolation = Image.Resampling(settings["resample"]).name.lower()
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"data.interpolation {interpolation!r} is none that augment.auto_augment moves pixels with; allowed are "
            f"{', '.join(INTERPOLATIONS)}."
        )

    def draw(batch: int, size: tuple[int, int], rng: np.random.Generator) -> list[Layer]:
        with generators_of_training():
            seed_generators(rng.integers(2**32, size=4).tolist())
            drawn = [policy(()) for _ in range(batch)]
        depth = max(map(len, drawn))
        columns = [[notes[place] if place < len(notes) else ("", ()) for notes in drawn] for place in range(depth)]
        return [_timm_layer(column, size) for column in columns]

    return Policy(draw, settings["fillcolor"], interpolation, device)


def colour_jitter(jitter: ColorJitter, device: torch.device) -> Policy:
    """Return torchvision's ColorJitter, which has no hue here, for batches."""
    ranges = {"brightness": jitter.brightness, "color": jitter.saturation, "contrast": jitter.contrast}
    names = np.array(list(ranges))
    low, high = np.array(list(ranges.values()), dtype=np.float64).T

    def draw(batch: int, size: tuple[int, int], rng: np.random.Generator) -> list[Layer]:
        orders = rng.permuted(np.tile(np.arange(len(names)), (batch, 1)), axis=1)
        factors = rng.uniform(low[orders], high[orders])
        return [Layer(names[orders[:, place]], factors[:, place]) for place in range(len(names))]

    return Policy(draw, 0, "nearest", device)


_FROM_TORCHVISION: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "AutoContrast": ("auto_contrast", float),
    "Brightness": ("brightness", lambda magnitude: 1.0 + magnitude),
    "Color": ("color", lambda magnitude: 1.0 + magnitude),
    "Contrast": ("contrast", lambda magnitude: 1.0 + magnitude),
    "Equalize": ("equalize", float),
    "Invert": ("invert", float),
    "Posterize": ("posterize", int),
    "Rotate": ("rotate", float),
    "Sharpness": ("sharpness", lambda magnitude: 1.0 + magnitude),
    "ShearX": ("shear_x", float),
    "ShearY": ("shear_y", float),
    "Solarize": ("solarize", float),
    "TranslateX": ("translate_x", lambda magnitude: -int(magnitude)),
    "TranslateY": ("translate_y", lambda magnitude: -int(magnitude)),
}


@cache
def _table(policy: AutoAugmentPolicy, size: tuple[int, int]) -> tuple[NDArray[np.str_], Values, Values]:
    """Return names [P, 2], probabilities [P, 2] and, for both signs, values [P, 2, 2] of torchvision's policies."""
    library = AutoAugment(policy)
    space = library._augmentation_space(10, size)
    names, values = [], []
    for pair in library.policies:
        for operation, _, index in pair:
            magnitudes, signed = space[operation]
            magnitude = 0.0 if index is None else float(magnitudes[index])
            name, convert = _FROM_TORCHVISION[operation]
            names.append(name)
            values.append([convert(-magnitude if signed else magnitude), convert(magnitude)])
    probabilities = np.array([[probability for _, probability, _ in pair] for pair in library.policies])
    return np.array(names).reshape(-1, 2), probabilities, np.array(values, dtype=np.float64).reshape(-1, 2, 2)


# What timm calls an operation, where it is another here, and how its argument becomes a value for an image of H, W.
_FROM_TIMM: Mapping[str, tuple[str, Callable[[float, tuple[int, int]], float]]] = {
    "desaturate": ("color", lambda share, size: min(1.0, max(0.0, 1.0 - share))),
    "translate_x_abs": ("translate_x", lambda pixels, size: pixels),
    "translate_x_rel": ("translate_x", lambda share, size: share * size[1]),
    "translate_y_abs": ("translate_y", lambda pixels, size: pixels),
    "translate_y_rel": ("translate_y", lambda share, size: share * size[0]),
}


def _noting(operation: Any) -> Any:
    """Return a copy of timm's operation that adds its name and arguments to the notes that it is called with."""
    name = operation.aug_fn.__name__
    if name not in (*OPERATIONS, *MOVES, *_FROM_TIMM):
        raise ValueError(
            f"augment.auto_augment has the operation {operation.name}, unknown to data.cache=device, which knows "
            f"{', '.join(sorted((*OPERATIONS, *MOVES, *_FROM_TIMM)))}."
        )
    operation = copy(operation)
    operation.aug_fn = partial(_note, name)
    return operation


def _note(name: str, notes: tuple[Any, ...], *arguments: float, **settings: Any) -> tuple[Any, ...]:
    return (*notes, (name, arguments))


def _timm_layer(column: list[tuple[str, tuple[float, ...]]], size: tuple[int, int]) -> Layer:
    """Return a layer from the names and arguments that timm's policy noted for each image."""
    names, values = [], []
    for name, arguments in column:
        value = arguments[0] if arguments else 0.0
        if name in _FROM_TIMM:
            name, convert = _FROM_TIMM[name]
            value = convert(value, size)
        names.append(name)
        values.append(value)
    return Layer(np.array(names), np.array(values, dtype=np.float64))


def _matrices(names: NDArray[np.str_], values: Values, height: int, width: int) -> Values:
    """Return the affine matrices [B, 6] of moves."""
    matrices = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(names), 1))
    for name, element in (("shear_x", 1), ("shear_y", 3), ("translate_x", 2), ("translate_y", 5)):
        matrices[names == name, element] = values[names == name]
    matrices[names == "rotate"] = rotation(values[names == "rotate"], height, width)
    return matrices
