"""What Pillow does to the colours of one image, done to a batch, by a value of its own for each.

The results are those of Pillow, bit for bit. Images are uint8 tensors [B, C, H, W] with one channel (grey) or three.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor


def luma(images: Tensor) -> Tensor:
    """Return the grey images [B, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).byte()[:, None]


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, factor)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(luma(images), images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = luma(images)
    count = grey.shape[2] * grey.shape[3]
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + count) // (2 * count)
    return _blend(mean, images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    wide = images.int()
    lines = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * (around + 4 * wide[:, :, 1:-1, 1:-1]) + 13) // 26).byte()
    return _blend(smooth, images, factor)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - (1 << (8 - bits.long()))).byte()[:, None, None, None]


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def _solarize_add(images: Tensor, add: Tensor) -> Tensor:
    brighter = (images.int() + add.int()[:, None, None, None]).clamp(max=255).byte()
    return torch.where(images < 128, brighter, images)


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = (bound.double() for bound in torch.aminmax(images.flatten(2), dim=2, keepdim=True))
    # A number over a tensor would on a GPU be the number times a rounded reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low)
    levels = torch.arange(256, device=images.device)
    table = (levels * scale + -low * scale).nan_to_num(0.0, 0.0, 0.0).clamp(0, 255).byte()
    return _look_up(images, torch.where(high > low, table, levels.byte()))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    values = images.flatten(2).long()
    histogram = torch.zeros((*values.shape[:2], 256), dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    highest = values.amax(2, keepdim=True)
    step = (values.shape[2] - histogram.gather(2, highest)) // 255
    table = (step // 2 + histogram.cumsum(2) - histogram) // step.clamp(min=1)
    levels = torch.arange(256, device=images.device)
    return _look_up(images, torch.where(step > 0, table.clamp(max=255), levels).byte())


OPERATIONS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "auto_contrast": _auto_contrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "sharpness": _sharpness,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
}
"""What timm's augmentation calls operations on colours, as functions of images [B, C, H, W] and one value each [B]."""


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by what a table [B, C, 256] holds for it."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Go from a base (factor 0) to the images (factor 1) and beyond."""
    base = base.float()
    return (base + factor.float()[:, None, None, None] * (images.float() - base)).clamp(0, 255).byte()
