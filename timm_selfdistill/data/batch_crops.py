"""Crops and rectangles that every image of a batch draws for itself.

Resized pixels are those of Pillow, bit for bit, as in evaluation and without a cache: torchvision resizes tensors with
fewer filters, other roundings, and one box for a whole batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import CenterCropOrPad, RandomCropOrPad, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode

from timm_selfdistill.data.names import Indices

_ATTEMPTS: Final = 10  # of timm, to draw a rectangle that fits
_WEIGHT_BITS: Final = 22  # of the fixed-point numbers that Pillow resizes with


class Side(NamedTuple):
    """Which part of one side of each image is resized to what, and which of its pixels are wanted."""

    start: Indices  # first pixel of the part [B]
    extent: Indices  # number of its pixels [B]
    size: Indices  # number of pixels it is resized to [B]
    wanted: Indices  # indices of the wanted ones among these [B, N]


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU without waiting for the work that it has."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad_crop(size: tuple[int, int], padding: int, fill: int, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Pad with a grey value and cut out a random window of each image, as `torchvision.transforms.RandomCrop` does."""
    corners = [
        rng.integers(length + 2 * padding - wanted + 1, size=len(images))
        for length, wanted in zip(images.shape[2:], size, strict=True)
    ]
    padded = torch.nn.functional.pad(images, [padding] * 4, value=fill)
    rows, columns = (
        upload(start, images.device)[:, None] + torch.arange(wanted, device=images.device)
        for start, wanted in zip(corners, size, strict=True)
    )
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None]).flatten(1)
    index = pixels[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, index).view(*images.shape[:2], *size)


def resize_boxes(part: RandomResizedCropAndInterpolation, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Cut a random box out of each image [B, C, H, W] and resize it, as timm's transform does."""
    boxes = draw_boxes(part, len(images), (images.shape[2], images.shape[3]), rng)
    rows, columns = (
        Side(start, extent, np.full_like(start, size), np.tile(np.arange(size), (len(start), 1)))
        for start, extent, size in zip(*boxes, part.size, strict=True)
    )
    return resize(images, rows, columns, InterpolationMode(part.interpolation).value)


def draw_boxes(
    part: RandomResizedCropAndInterpolation, batch: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[Indices, Indices], tuple[Indices, Indices]]:
    """Draw (tops, lefts) and (heights, widths) of the boxes [B] in images of a size."""
    height, width = size
    smallest, largest = part.scale
    area = rng.uniform(smallest, largest, (batch, _ATTEMPTS)) * (height * width)
    aspect = np.exp(rng.uniform(math.log(part.ratio[0]), math.log(part.ratio[1]), (batch, _ATTEMPTS)))
    heights, widths = np.sqrt(area / aspect).round().astype(int), np.sqrt(area * aspect).round().astype(int)
    found, first = _first_fit((heights <= height) & (widths <= width))
    # Where nothing fits, as much of the whole image as the aspect ratios allow.
    narrow, wide = min(part.ratio), max(part.ratio)
    last = (min(height, round(width / narrow)), min(width, round(height * wide)))
    heights, widths = np.where(found, heights[first], last[0]), np.where(found, widths[first], last[1])
    top = np.where(found, rng.integers(height - heights + 1), (height - heights) // 2)
    left = np.where(found, rng.integers(width - widths + 1), (width - widths) // 2)
    return (top, left), (heights, widths)


def resize_and_crop(
    resizing: ResizeKeepRatio, cropping: CenterCropOrPad | RandomCropOrPad, images: Tensor, rng: np.random.Generator
) -> Tensor:
    """Resize each image [B, C, H, W] by factors of its own, then crop or pad it, as timm's two transforms do."""
    lengths = (images.shape[2], images.shape[3])
    sizes = draw_sizes(resizing, len(images), lengths, rng)
    sides = []
    for length, size, wanted in zip(lengths, sizes, cropping.size, strict=True):
        excess = size - wanted
        if isinstance(cropping, RandomCropOrPad):
            start = np.sign(excess) * rng.integers(np.abs(excess) + 1)
        else:
            start = np.where(excess < 0, -(-excess // 2), (excess / 2).round().astype(int))
        # Outside of the image there is what is reflected at its border.
        period = np.maximum(2 * (size - 1), 1)[:, None]
        index = np.abs(start[:, None] + np.arange(wanted)) % period
        index = np.minimum(np.minimum(index, period - index), size[:, None] - 1)
        sides.append(Side(np.zeros_like(size), np.full_like(size, length), size, index))
    return resize(images, sides[0], sides[1], InterpolationMode(resizing.interpolation).value)


def draw_sizes(
    resizing: ResizeKeepRatio, batch: int, lengths: tuple[int, int], rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Draw the heights and widths [B] that images are resized to."""
    height, width = lengths
    ratio = min(length / target for length, target in zip(lengths, resizing.size, strict=True))
    low, high = resizing.random_scale_range
    scale = 1 / np.sqrt(rng.uniform(low, high, batch))
    scale = np.where(rng.random(batch) < resizing.random_scale_prob, scale, 1.0)
    low, high = map(math.log, resizing.random_aspect_range)
    aspect = np.sqrt(np.exp(rng.uniform(low, high, batch)))
    aspect = np.where(rng.random(batch) < resizing.random_aspect_prob, aspect, 1.0)
    heights, widths = height * (scale / aspect) / ratio, width * (scale * aspect) / ratio
    return heights.round().astype(int), widths.round().astype(int)


def resize(images: Tensor, rows: Side, columns: Side, interpolation: str) -> Tensor:
    """Cut parts out of images [B, C, H, W] of uint8 and resize them, as `Image.crop` and `Image.resize` do.

    The interpolation is a key of `FILTERS`, or "nearest"; the device has to compute in float64.
    """
    for side, dimension in ((columns, 3), (rows, 2)):
        length = images.shape[dimension]
        if _is_whole(side, length):
            continue
        weights = _weights(side, length, interpolation, images.device)[:, None]
        sums = images.double() @ weights.mT if dimension == 3 else weights @ images.double()
        # From fixed point; the sums are whole numbers that float64 holds exactly.
        images = ((sums + (1 << (_WEIGHT_BITS - 1))) / (1 << _WEIGHT_BITS)).floor().clamp(0, 255).byte()
    return images


FILTERS: Final[Mapping[str, tuple[float, Callable[[Tensor], Tensor]]]] = {
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).double()),
    "bilinear": (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "hamming": (1.0, lambda x: torch.where(x.abs() < 1, x.sinc() * (0.54 + 0.46 * (torch.pi * x).cos()), 0.0)),
    "bicubic": (2.0, lambda x: _cubic(x.abs())),
    "lanczos": (3.0, lambda x: torch.where(x.abs() < 3, x.sinc() * (x / 3).sinc(), 0.0)),
}
"""How far each of Pillow's filters reaches, in pixels, and its weights."""


def _cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _is_whole(side: Side, length: int) -> bool:
    """Whether all images keep a side of this length as it is."""
    kept = (side.start == 0).all() and (side.extent == length).all() and (side.size == length).all()
    return bool(kept) and side.wanted.shape[1] == length and bool((side.wanted == np.arange(length)).all())


def _weights(side: Side, length: int, interpolation: str, device: torch.device) -> Tensor:
    """Return how much each of `length` pixels counts for each wanted one [B, N, length], in fixed point."""
    pixels = torch.arange(length, device=device)
    if interpolation == "nearest":
        return (pixels == upload(_nearest(side), device)[:, :, None]).double() * (1 << _WEIGHT_BITS)
    start, extent, size = (upload(array, device)[:, None, None] for array in (side.start, side.extent, side.size))
    scale = extent.double() / size.double()
    center = (upload(side.wanted, device)[:, :, None] + 0.5) * scale
    pixels = pixels - start
    reach, weigh = FILTERS[interpolation]
    stretch = scale.clamp(min=1.0)
    first = (center - reach * stretch + 0.5).long().clamp(min=0)
    end = torch.minimum((center + reach * stretch + 0.5).long(), extent)
    weights = weigh((pixels - center + 0.5) * stretch.reciprocal()) * ((pixels >= first) & (pixels < end))
    weights = weights / weights.sum(2, keepdim=True) * (1 << _WEIGHT_BITS)
    return (weights + 0.5 * weights.sign()).trunc()


def _nearest(side: Side) -> Indices:
    """Return the pixels that are taken for the wanted ones [B, N]; added up step by step, as Pillow's rounding is."""
    scale = (side.extent / side.size)[:, None]
    steps = np.broadcast_to(scale, (len(scale), side.size.max() - 1))
    centers = np.cumsum(np.concatenate([scale * 0.5, steps], axis=1), axis=1)
    nearest: Indices = side.start[:, None] + np.take_along_axis(centers, side.wanted, axis=1).astype(np.int64)
    return nearest


def erase(erasing: RandomErasing, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Erase random rectangles, as `timm.data.random_erasing.RandomErasing` does."""
    batch, channels, height, width = images.shape
    noise = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
    erased = rng.random(batch) <= erasing.probability
    count = rng.integers(erasing.min_count, erasing.max_count + 1, size=batch)
    for index in range(erasing.max_count):
        area = rng.uniform(erasing.min_area, erasing.max_area, (batch, _ATTEMPTS)) * height * width / count[:, None]
        aspect = np.exp(rng.uniform(*erasing.log_aspect_ratio, (batch, _ATTEMPTS)))
        heights, widths = np.sqrt(area * aspect).round().astype(int), np.sqrt(area / aspect).round().astype(int)
        found, first = _first_fit((heights < height) & (widths < width))
        here = erased & (index < count) & found
        heights, widths = np.where(here, heights[first], 0), np.where(here, widths[first], 0)
        top, left = rng.integers(height - heights + 1), rng.integers(width - widths + 1)
        fill = torch.zeros((), device=images.device)
        if erasing.rand_color or erasing.per_pixel:
            size = (height, width) if erasing.per_pixel else (1, 1)
            fill = torch.randn((batch, channels, *size), generator=noise, device=images.device)
        images = torch.where(_rectangles(images, top, left, heights, widths), fill, images)
    return images


def cut_out(side: int, fill: Tensor, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Fill a square around a random pixel of each image, as `Cutout` does."""
    top, left = (rng.integers(length, size=len(images)) - side // 2 for length in images.shape[2:])
    sides = np.full(len(images), side)
    return torch.where(_rectangles(images, top, left, sides, sides), fill, images)


def _rectangles(images: Tensor, top: Indices, left: Indices, height: Indices, width: Indices) -> Tensor:
    """Return which pixels of each image are in its rectangle [B, 1, H, W]."""
    corners = upload(np.stack([top, left, top + height, left + width]), images.device)[:, :, None]
    y, x = (torch.arange(length, device=images.device) for length in images.shape[2:])
    rows, columns = (y >= corners[0]) & (y < corners[2]), (x >= corners[1]) & (x < corners[3])
    return (rows[:, :, None] & columns[:, None])[:, None]


def _first_fit(fits: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], tuple[Indices, Indices]]:
    """Return for each image whether any of its attempts [B, N] fits [B], and the index of the first that does."""
    return np.asarray(fits.any(1)), (np.arange(len(fits)), np.asarray(fits.argmax(1)))
