"""Cropping, resizing, moving and blurring a batch of images, by parameters of its own for each.

The results are those of Pillow, bit for bit but for `blur`, which is torchvision's with sums in another order. Images
are uint8 tensors [B, C, H, W] on any device that computes in float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WEIGHT_BITS = 22  # of the fixed-point numbers that Pillow resizes with
_COORDINATE_BITS = 16  # of those that it looks up the nearest pixel with


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU without waiting for the work that it has."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def crop(images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], size: tuple[int, int], fill: int) -> Tensor:
    """Cut a window out of each image; what lies outside the image is filled with a grey value.

    Args:
        images: Images [B, C, H, W].
        top: First row of each window [B]; may be negative.
        left: First column of each window [B].
        size: Height and width of the windows.
        fill: The grey value.
    """
    device, (height, width) = images.device, images.shape[2:]
    corners = upload(np.stack([top, left]), device)
    rows = corners[0, :, None] + torch.arange(size[0], device=device)
    columns = corners[1, :, None] + torch.arange(size[1], device=device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    pixels = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    return torch.where(inside[:, None], _pick(images, pixels), fill)


@dataclass(frozen=True, eq=False)
class Span:
    """Which part of one side of each image is resized to what, and which of its pixels are wanted.

    Args:
        start: First pixel of the part [B].
        extent: Number of its pixels [B].
        size: Number of pixels it is resized to [B].
        wanted: Indices of the wanted ones among these [B, N].
    """

    start: NDArray[np.int64]
    extent: NDArray[np.int64]
    size: NDArray[np.int64]
    wanted: NDArray[np.int64]

    def keeps(self, length: int) -> bool:
        """Whether all sides, of this length, stay as they are."""
        whole = (self.start == 0).all() and (self.extent == length).all() and (self.size == length).all()
        return bool(whole) and self.wanted.shape[1] == length and bool((self.wanted == np.arange(length)).all())


def resize(images: Tensor, rows: Span, columns: Span, interpolation: str) -> Tensor:
    """Cut parts out of images and resize them, as `Image.crop` and `Image.resize` do.

    Args:
        images: Images [B, C, H, W].
        rows: From H rows to N of them.
        columns: From W columns to M of them.
        interpolation: A key of `FILTERS`, or "nearest".

    Returns:
        Images [B, C, N, M].
    """
    if not columns.keeps(images.shape[3]):
        weights = _weights(columns, images.shape[3], interpolation, images.device)
        images = _round(images.double() @ weights.transpose(1, 2)[:, None])
    if not rows.keeps(images.shape[2]):
        weights = _weights(rows, images.shape[2], interpolation, images.device)
        images = _round(weights[:, None] @ images.double())
    return images


def transform(images: Tensor, matrices: NDArray[np.float64], interpolation: str, fill: Tensor) -> Tensor:
    """Look up each pixel at another place of its image, as `Image.transform` does with an affine matrix.

    Args:
        images: Images [B, C, H, W].
        matrices: From places in the result to places in the image [B, 6].
        interpolation: One of `INTERPOLATIONS`.
        fill: The colour [C] of pixels from outside of the image.
    """
    device, (height, width) = images.device, images.shape[2:]
    x_axis, y_axis = torch.arange(width, device=device), torch.arange(height, device=device)[:, None]
    # For both coordinates at once: where the middle of the first pixel comes from, and what a step adds.
    a = matrices.reshape(-1, 2, 3)
    corner, step = a[:, :, 2] + a[:, :, 0] * 0.5 + a[:, :, 1] * 0.5, a[:, :, :2]
    size = upload(np.array([[[width]], [[height]]]), device)
    if interpolation == "nearest":
        fixed = upload(_fixed(np.concatenate([corner[:, :, None], step], axis=2)), device)[:, :, :, None, None]
        places = (fixed[:, :, 0] + x_axis * fixed[:, :, 1] + y_axis * fixed[:, :, 2]) >> _COORDINATE_BITS
        nearest = torch.minimum(places.clamp(min=0), size - 1)
        value = _pick(images, nearest[:, 0] + nearest[:, 1] * width)
    else:
        exact = upload(a, device)[:, :, :, None, None]
        places = exact[:, :, 0] * (x_axis + 0.5) + exact[:, :, 1] * (y_axis + 0.5) + exact[:, :, 2]
        value = _interpolate(images, places[:, 0] - 0.5, places[:, 1] - 0.5, interpolation)
    inside = ((places >= 0) & (places < size)).all(1, keepdim=True)
    return torch.where(inside, value, fill[:, None, None])


def rotation(degrees: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Return the matrices [B, 6] by which `Image.rotate` turns images around their centres."""
    angle = -np.radians(degrees % 360)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    x, y = width / 2, height / 2
    return np.stack([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y], axis=1)


def blur(images: Tensor, sigma: NDArray[np.float64], kernel_size: int) -> Tensor:
    """Blur with a Gaussian of its own for each image, as torchvision does: the border is reflected.

    Args:
        images: Images [B, C, H, W].
        sigma: Standard deviations in pixels [B].
        kernel_size: Pixels that are averaged in each direction, an odd number.
    """
    reach = kernel_size // 2
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float64)
    kernel = (-0.5 * (offsets / upload(sigma, images.device)[:, None]).square()).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    vertical, horizontal = (_spread(kernel, length) for length in images.shape[2:])
    return (vertical @ images.double() @ horizontal.transpose(2, 3)).round().clamp(0, 255).byte()


FILTERS: Final[Mapping[str, tuple[float, Callable[[Tensor], Tensor]]]] = {
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).double()),
    "bilinear": (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "hamming": (1.0, lambda x: torch.where(x.abs() < 1, x.sinc() * (0.54 + 0.46 * (torch.pi * x).cos()), 0.0)),
    "bicubic": (2.0, lambda x: _cubic(x.abs())),
    "lanczos": (3.0, lambda x: torch.where(x.abs() < 3, x.sinc() * (x / 3).sinc(), 0.0)),
}
"""How far each of Pillow's filters reaches, in pixels, and its weights."""

INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic")
"""What `transform` can do, as Pillow's own."""


def _cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _weights(span: Span, length: int, interpolation: str, device: torch.device) -> Tensor:
    """Return how much each of `length` pixels counts for each wanted one [B, N, length], in fixed point."""
    if interpolation == "nearest":
        pixels = torch.arange(length, device=device)
        return (pixels == upload(_nearest(span), device)[:, :, None]).double() * (1 << _WEIGHT_BITS)
    start, extent, size = (upload(array, device)[:, None, None] for array in (span.start, span.extent, span.size))
    scale = extent.double() / size.double()
    center = (upload(span.wanted, device)[:, :, None] + 0.5) * scale
    pixels = torch.arange(length, device=device) - start
    reach, weigh = FILTERS[interpolation]
    stretch = scale.clamp(min=1.0)
    first = (center - reach * stretch + 0.5).long().clamp(min=0)
    behind = torch.minimum((center + reach * stretch + 0.5).long(), extent)
    weights = weigh((pixels - center + 0.5) * stretch.reciprocal()) * ((pixels >= first) & (pixels < behind))
    weights = weights / weights.sum(2, keepdim=True) * (1 << _WEIGHT_BITS)
    return (weights + 0.5 * weights.sign()).trunc()


def _nearest(span: Span) -> NDArray[np.int64]:
    """Return the pixels that are taken for the wanted ones [B, N]; added up step by step, as Pillow's rounding is."""
    scale = (span.extent / span.size)[:, None]
    steps = np.broadcast_to(scale, (len(scale), span.size.max() - 1))
    centers = np.cumsum(np.concatenate([scale * 0.5, steps], axis=1), axis=1)
    nearest: NDArray[np.int64] = span.start[:, None] + np.take_along_axis(centers, span.wanted, axis=1).astype(np.int64)
    return nearest


def _round(sums: Tensor) -> Tensor:
    """Return the pixels that fixed-point sums stand for; they are whole numbers that float64 holds exactly."""
    return ((sums + (1 << (_WEIGHT_BITS - 1))) / (1 << _WEIGHT_BITS)).floor().clamp(0, 255).byte()


def _fixed(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(numbers * (1 << _COORDINATE_BITS) + 0.5).astype(np.int64)


def _interpolate(images: Tensor, x: Tensor, y: Tensor, interpolation: str) -> Tensor:
    """Return the pixels at places [B, H, W] between the centres of pixels."""
    left, top = x.floor(), y.floor()
    right, down = (x - left)[:, None], (y - top)[:, None]
    mix, offsets = (_linear, (0, 1)) if interpolation == "bilinear" else (_cubic_spline, (-1, 0, 1, 2))
    height, width = images.shape[2:]
    columns = [(left.long() + offset).clamp(0, width - 1) for offset in offsets]
    rows = [(top.long() + offset).clamp(0, height - 1) * width for offset in offsets]
    lines = [mix(right, *(_pick(images, row + column).double() for column in columns)) for row in rows]
    return mix(down, *lines).clamp(0, 255).byte()


def _linear(share: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a + (b - a) * share


def _cubic_spline(share: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return b + share * ((c - a) + share * ((2 * (a - b) + c - d) + share * (-a + b - c + d)))


def _pick(images: Tensor, pixels: Tensor) -> Tensor:
    """Return the pixels [B, C, H, W] at indices [B, H, W] into the flattened images."""
    channels = images.shape[1]
    index = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(-1, channels, *pixels.shape[1:])


def _spread(kernel: Tensor, length: int) -> Tensor:
    """Return the matrices [B, 1, length, length] that average a reflected line with kernels [B, K]."""
    reach = kernel.shape[1] // 2
    place = torch.arange(length, device=kernel.device)[:, None] + torch.arange(-reach, reach + 1, device=kernel.device)
    place = place.abs()
    place = torch.where(place < length, place, 2 * (length - 1) - place)
    zeros = torch.zeros((len(kernel), length, length), dtype=kernel.dtype, device=kernel.device)
    index = place.expand(len(kernel), -1, -1)
    return zeros.scatter_add_(2, index, kernel[:, None].expand_as(index))[:, None]
