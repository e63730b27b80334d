"""The transforms of one image, turned into those of a batch on a device.

What timm and torchvision were told is read off their transforms, so a setting has one home and what has no counterpart
here is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import auto_augment as timm_policies
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    CenterCropOrPad,
    MaybePILToTensor,
    MaybeToTensor,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
)
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from timm_selfdistill.data.batch_crops import ATTEMPTS, PadCrop, ResizeAndCrop, ResizedCrop, first_fit
from timm_selfdistill.data.batch_policy import colour_jitter, timm_policy, torchvision_policy
from timm_selfdistill.data.colours import luma
from timm_selfdistill.data.cutout import Cutout
from timm_selfdistill.data.geometry import blur, upload
from timm_selfdistill.data.names import Indices
from timm_selfdistill.data.transforms import Transform

Step = Callable[[Tensor, np.random.Generator], Tensor]
"""From images [B, C, H, W], uint8 or normalised, to images, drawing from the generator for each image."""


@dataclass(frozen=True)
class BatchTransform:
    """Transforms batches on a device, every image by a draw of its own.

    Parameters are drawn on the CPU, and from none of the generators that training draws from. But for the noise that
    fills erased rectangles, a batch is augmented alike on any device.

    Args:
        steps: What is done, in order.
    """

    steps: Sequence[Step]

    def __call__(self, images: Tensor, seed: Sequence[int]) -> Tensor:
        """Transform images.

        Args:
            images: Images [B, C, H, W] of uint8.
            seed: Decides what is drawn.

        Returns:
            Float images [B, C, H, W].
        """
        rng = np.random.default_rng(seed)
        for step in self.steps:
            images = step(images, rng)
        return images


def split_transform(transform: Transform, device: torch.device) -> tuple[Transform, BatchTransform]:
    """Split a transform into what is the same every time and what is to be done for every batch.

    Args:
        transform: What `train_transform` or `eval_transform` built.
        device: Where the batches are.

    Returns:
        From a PIL image to a uint8 tensor [C, H, W], and from batches of them to float images.

    Raises:
        ValueError: If there is a transform that batches do not know.
    """
    parts = list(_flatten(transform))
    number = next(index for index, part in enumerate(parts) if not _is_fixed(part))
    fixed = transforms.Compose([*parts[:number], MaybePILToTensor()])
    return fixed, BatchTransform(tuple(_steps(parts[number:], device)))


def _flatten(transform: Any) -> Iterator[Any]:
    if isinstance(transform, transforms.Compose):
        for part in transform.transforms:
            yield from _flatten(part)
    else:
        yield transform


def _is_fixed(transform: Any) -> bool:
    if isinstance(transform, ResizeKeepRatio):
        return not transform.random_scale_prob and not transform.random_aspect_prob
    return isinstance(transform, transforms.Resize | transforms.CenterCrop | CenterCropOrPad)


def _steps(parts: Sequence[Any], device: torch.device) -> Iterator[Step]:
    """Return the counterparts of transforms, in their order."""
    following = iter(parts)
    for part in following:
        # Only behind the crop do images have one size again.
        yield ResizeAndCrop(part, next(following)) if isinstance(part, ResizeKeepRatio) else _step(part, device)


def _step(part: Any, device: torch.device) -> Step:
    """Return the counterpart of a transform."""
    match part:
        case transforms.RandomCrop():
            return PadCrop(tuple(part.size), part.padding, part.fill)
        case RandomResizedCropAndInterpolation():
            return ResizedCrop(part.size, part.scale, part.ratio, InterpolationMode(part.interpolation).value)
        case transforms.RandomHorizontalFlip():
            return _Sometimes(part.p, lambda images, rng: images.flip(3))
        case transforms.RandomVerticalFlip():
            return _Sometimes(part.p, lambda images, rng: images.flip(2))
        case transforms.RandomGrayscale():
            return _Sometimes(part.p, lambda images, rng: luma(images).expand_as(images))
        case transforms.RandomApply():
            (only,) = part.transforms
            return _Sometimes(part.p, _step(only, device))
        case transforms.ColorJitter():
            return colour_jitter(part, device)
        case transforms.GaussianBlur():
            return _Blur(part.sigma, part.kernel_size[0])
        case transforms.AutoAugment():
            return torchvision_policy(part, device)
        case timm_policies.RandAugment() | timm_policies.AutoAugment():
            return timm_policy(part, device)
        case MaybeToTensor():
            return _Affine(torch.zeros((), device=device), torch.tensor(255.0, device=device))
        case transforms.Normalize():
            mean, std = (torch.as_tensor(values)[:, None, None].to(device) for values in (part.mean, part.std))
            return _Affine(mean, std)
        case RandomErasing():
            return _Erase(part)
        case Cutout():
            return _BatchCutout(part.side, part.fill.to(device))
        case timm_policies.AugMixAugment():
            raise ValueError(
                "augment.auto_augment augmix is unknown to data.cache=device; allowed are timm's other policies, such "
                "as rand-m9-mstd0.5-inc1, and torchvision's cifar10, imagenet and svhn."
            )
    raise ValueError(f"data.cache=device knows no counterpart of the transform {part!r}.")


@dataclass(frozen=True)
class _Sometimes:
    """Do a step for some of the images only, each with a probability."""

    probability: float
    step: Step

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        chosen = np.flatnonzero(rng.random(len(images)) < self.probability)
        if len(chosen) == 0:
            return images
        rows = upload(chosen, images.device)
        return images.index_copy(0, rows, self.step(images[rows], rng))


@dataclass(frozen=True)
class _Blur:
    """`torchvision.transforms.GaussianBlur`."""

    sigma: tuple[float, float]
    kernel_size: int

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        return blur(images, rng.uniform(*self.sigma, len(images)), self.kernel_size)


@dataclass(frozen=True)
class _Affine:
    """Subtract and divide, by tensors: a GPU multiplies by the rounded reciprocal of a number."""

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        return images.float().sub(self.mean).div(self.std)


class _Erase:
    """`timm.data.random_erasing.RandomErasing`."""

    def __init__(self, erasing: RandomErasing) -> None:
        self._erasing = erasing

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        erasing = self._erasing
        batch, channels, height, width = images.shape
        noise = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
        erased = rng.random(batch) <= erasing.probability
        count = rng.integers(erasing.min_count, erasing.max_count + 1, size=batch)
        for index in range(erasing.max_count):
            area = rng.uniform(erasing.min_area, erasing.max_area, (batch, ATTEMPTS)) * height * width / count[:, None]
            aspect = np.exp(rng.uniform(*erasing.log_aspect_ratio, (batch, ATTEMPTS)))
            heights, widths = np.sqrt(area * aspect).round().astype(int), np.sqrt(area / aspect).round().astype(int)
            found, first = first_fit((heights < height) & (widths < width))
            here = erased & (index < count) & found
            heights, widths = np.where(here, heights[first], 0), np.where(here, widths[first], 0)
            top, left = rng.integers(height - heights + 1), rng.integers(width - widths + 1)
            fill = torch.zeros((), device=images.device)
            if erasing.rand_color or erasing.per_pixel:
                size = (height, width) if erasing.per_pixel else (1, 1)
                fill = torch.randn((batch, channels, *size), generator=noise, device=images.device)
            images = torch.where(_rectangles(images, top, left, heights, widths), fill, images)
        return images


@dataclass(frozen=True)
class _BatchCutout:
    """`timm_selfdistill.data.cutout.Cutout`."""

    side: int
    fill: Tensor

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        top, left = (rng.integers(length, size=len(images)) - self.side // 2 for length in images.shape[2:])
        side = np.full(len(images), self.side)
        return torch.where(_rectangles(images, top, left, side, side), self.fill, images)


def _rectangles(images: Tensor, top: Indices, left: Indices, height: Indices, width: Indices) -> Tensor:
    """Return which pixels of each image are in its rectangle [B, 1, H, W]."""
    corners = upload(np.stack([top, left, top + height, left + width]), images.device)[:, :, None]
    y, x = (torch.arange(length, device=images.device) for length in images.shape[2:])
    rows, columns = (y >= corners[0]) & (y < corners[2]), (x >= corners[1]) & (x < corners[3])
    return (rows[:, :, None] & columns[:, None])[:, None]
