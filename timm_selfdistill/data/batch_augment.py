"""The transforms of one image, turned into those of a batch on a device.

What timm and torchvision were told is read off their transforms, so a setting has one home and what has no counterpart
here is refused.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import auto_augment as timm_policies
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    CenterCropOrPad,
    MaybePILToTensor,
    MaybeToTensor,
    RandomCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
)
from torch import Tensor
from torchvision import transforms

from timm_selfdistill.data.batch_policy import colour_jitter, timm_policy, torchvision_policy
from timm_selfdistill.data.colours import luma
from timm_selfdistill.data.cutout import Cutout
from timm_selfdistill.data.geometry import Span, blur, crop, resize, upload
from timm_selfdistill.data.transforms import Transform

Step = Callable[[Tensor, np.random.Generator], Tensor]
"""From images [B, C, H, W], uint8 or normalised, to images, drawing from the generator for each image."""

_ATTEMPTS = 10  # of timm, to draw a rectangle that fits


@dataclass(frozen=True)
class BatchTransform:
    """Transforms batches on a device, every image by a draw of its own.

    Parameters are drawn on the CPU, and from none of the generators that training draws from: a batch is augmented
    alike on any device.

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
    all_of_them = list(_flatten(transform))
    number = next(index for index, one in enumerate(all_of_them) if not _is_fixed(one))
    fixed = transforms.Compose([*all_of_them[:number], MaybePILToTensor()])  # type: ignore[no-untyped-call]
    return fixed, BatchTransform([_step(one, device) for one in all_of_them[number:]])


def _flatten(transform: Any) -> Iterator[Any]:
    if isinstance(transform, transforms.Compose):
        for part in transform.transforms:
            yield from _flatten(part)
    else:
        yield transform


def _is_fixed(transform: Any) -> bool:
    if isinstance(transform, ResizeKeepRatio):
        return transform.random_scale_prob == transform.random_aspect_prob == 0
    return isinstance(transform, transforms.Resize | transforms.CenterCrop | CenterCropOrPad)


def _step(transform: Any, device: torch.device) -> Step:
    """Return the counterpart of a transform."""
    match transform:
        case transforms.RandomCrop():
            return _PadCrop(transform)
        case RandomResizedCropAndInterpolation():
            return _ResizedCrop(transform)
        case ResizeKeepRatio():
            return _ResizeKeepRatio(transform)
    raise ValueError(f"data.cache=device knows no counterpart of {transform!r}.")
