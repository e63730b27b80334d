"""The random crops of one image, done to a batch: every image draws a place and a size of its own."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from timm.data.transforms import CenterCropOrPad, RandomCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode

from timm_selfdistill.data.geometry import Span, crop, resize
from timm_selfdistill.data.names import Indices

ATTEMPTS: Final = 10  # of timm, to draw a rectangle that fits


@dataclass(frozen=True)
class PadCrop:
    """`torchvision.transforms.RandomCrop`."""

    size: tuple[int, int]
    padding: int
    fill: int

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        top, left = (
            rng.integers(length + 2 * self.padding - size + 1, size=len(images)) - self.padding
            for length, size in zip(images.shape[2:], self.size, strict=True)
        )
        return crop(images, top, left, self.size, self.fill)


@dataclass(frozen=True)
class ResizedCrop:
    """`timm.data.transforms.RandomResizedCropAndInterpolation`."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        boxes = self.boxes(len(images), (images.shape[2], images.shape[3]), rng)
        rows, columns = (_part(start, extent, size) for start, extent, size in zip(*boxes, self.size, strict=True))
        return resize(images, rows, columns, self.interpolation)

    def boxes(
        self, batch: int, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[tuple[Indices, Indices], tuple[Indices, Indices]]:
        """Draw (tops, lefts) and (heights, widths) of the boxes [B], in images of a size."""
        height, width = size
        area = rng.uniform(*self.scale, (batch, ATTEMPTS)) * (height * width)
        aspect = _log_uniform(rng, self.ratio, (batch, ATTEMPTS))
        heights, widths = np.sqrt(area / aspect).round().astype(int), np.sqrt(area * aspect).round().astype(int)
        found, first = first_fit((heights <= height) & (widths <= width))
        # Where nothing fits, as much of the whole image as the aspect ratios allow.
        narrow, wide = min(self.ratio), max(self.ratio)
        last = (min(height, round(width / narrow)), min(width, round(height * wide)))
        heights, widths = np.where(found, heights[first], last[0]), np.where(found, widths[first], last[1])
        top = np.where(found, rng.integers(height - heights + 1), (height - heights) // 2)
        left = np.where(found, rng.integers(width - widths + 1), (width - widths) // 2)
        return (top, left), (heights, widths)


class ResizeAndCrop:
    """`timm.data.transforms.ResizeKeepRatio` and the crop behind it, `CenterCropOrPad` or `RandomCropOrPad`."""

    def __init__(self, resizing: ResizeKeepRatio, cropping: CenterCropOrPad | RandomCropOrPad) -> None:
        self._resizing, self._cropping = resizing, cropping

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        lengths = (images.shape[2], images.shape[3])
        sides = []
        for length, size, wanted in zip(
            lengths, self.sizes(len(images), lengths, rng), self._cropping.size, strict=True
        ):
            start = self._start(size - wanted, rng)
            index = np.abs(start[:, None] + np.arange(wanted))
            # What lies outside is filled with what is reflected at the border.
            period = np.maximum(2 * (size - 1), 1)[:, None]
            index = np.minimum(index % period, period - index % period)
            zeros = np.zeros_like(size)
            sides.append(Span(zeros, zeros + length, size, np.minimum(index, size[:, None] - 1)))
        return resize(images, sides[0], sides[1], InterpolationMode(self._resizing.interpolation).value)

    def sizes(self, batch: int, lengths: tuple[int, int], rng: np.random.Generator) -> tuple[Indices, Indices]:
        """Draw the heights and widths [B] that images are resized to."""
        resizing = self._resizing
        ratio = min(length / target for length, target in zip(lengths, resizing.size, strict=True))
        low, high = resizing.random_scale_range
        scale = 1 / np.sqrt(rng.uniform(low, high, batch))
        scale = np.where(rng.random(batch) < resizing.random_scale_prob, scale, 1.0)
        aspect = np.sqrt(_log_uniform(rng, resizing.random_aspect_range, (batch,)))
        aspect = np.where(rng.random(batch) < resizing.random_aspect_prob, aspect, 1.0)
        height, width = lengths
        return (
            (height * (scale / aspect) / ratio).round().astype(int),
            (width * (scale * aspect) / ratio).round().astype(int),
        )

    def _start(self, excess: Indices, rng: np.random.Generator) -> Indices:
        """Return the first wanted pixel [B] of sides that have so many too many or, negative, too few."""
        if isinstance(self._cropping, RandomCropOrPad):
            return np.sign(excess) * rng.integers(np.abs(excess) + 1)
        return np.where(excess < 0, -(-excess // 2), (excess / 2).round().astype(int))


def first_fit(fits: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], tuple[Indices, Indices]]:
    """Return for each image whether any of its attempts [B, N] fits [B], and the index of the first that does."""
    return np.asarray(fits.any(1)), (np.arange(len(fits)), np.asarray(fits.argmax(1)))


def _part(start: Indices, extent: Indices, size: int) -> Span:
    """Return the side of a box that is resized to a size."""
    batch = len(start)
    return Span(start, extent, np.full(batch, size), np.tile(np.arange(size), (batch, 1)))


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw numbers whose logarithms are uniform."""
    numbers: NDArray[np.float64] = np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]), size))
    return numbers
