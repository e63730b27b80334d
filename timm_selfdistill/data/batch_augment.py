"""The transforms of one image, turned into those of a batch on a device.

Settings are read off the transforms of timm and torchvision, so each has one home. Crops, flips, erasing and cutout are
drawn for each image; policies, jitter and blur, which torchvision carries out, for each group of `GROUP` images.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from PIL.Image import Resampling
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
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from timm_selfdistill.data.batch_crops import cut_out, erase, pad_crop, resize_and_crop, resize_boxes, upload
from timm_selfdistill.data.batches import seeded_generators
from timm_selfdistill.data.transforms import Cutout, Transform

GROUP: Final = 8
"""Neighbours in a batch that share what a policy, the colour jitter or the blur draws."""

Step = Callable[[Tensor, np.random.Generator], Tensor]
"""From images [B, C, H, W], uint8 or normalised, to images; it draws from the generator."""


class BatchTransform(NamedTuple):
    """Transforms batches on a device, by steps in order.

    Parameters are drawn on the CPU, and from none of the generators that training draws from. Except for the noise that
    fills erased rectangles, every device draws the same.
    """

    steps: Sequence[Step]

    def __call__(self, images: Tensor, seed: Sequence[int]) -> Tensor:
        """Return float images [B, C, H, W] from images of uint8; the seed decides what is drawn."""
        rng = np.random.default_rng(seed)
        for step in self.steps:
            images = step(images, rng)
        return images


def split_transform(
    transform: Transform, device: torch.device, auto_augment: str | None = None
) -> tuple[Transform, BatchTransform]:
    """Split the transform of an image into what is the same every time and what is to be done for every batch.

    Args:
        transform: What `train_transform` or `eval_transform` built.
        device: Where the batches are.
        auto_augment: The recipe's `augment.auto_augment`, for messages.

    Returns:
        From a PIL image to a uint8 tensor [C, H, W], and from batches of them to float images.

    Raises:
        ValueError: If batches cannot have one of the transforms.
    """
    parts = list(flatten(transform))
    number = next(index for index, part in enumerate(parts) if not _is_fixed(part))
    fixed = transforms.Compose([*parts[:number], MaybePILToTensor()])
    following = iter(parts[number:])
    steps: list[Step] = []
    for part in following:
        if isinstance(part, ResizeKeepRatio):
            # Only after the crop do images have one size again.
            steps.append(partial(resize_and_crop, part, next(following)))
        else:
            steps.append(_step(part, device, auto_augment))
    return fixed, BatchTransform(tuple(steps))


def flatten(transform: Any) -> Iterator[Any]:
    """Yield the transforms that a transform is composed of."""
    if isinstance(transform, transforms.Compose):
        for part in transform.transforms:
            yield from flatten(part)
    else:
        yield transform


def _is_fixed(transform: Any) -> bool:
    if isinstance(transform, ResizeKeepRatio):
        return not transform.random_scale_prob and not transform.random_aspect_prob
    return isinstance(transform, transforms.Resize | transforms.CenterCrop | CenterCropOrPad)


def _step(part: Any, device: torch.device, auto_augment: str | None) -> Step:
    """Return what a transform is for a batch."""
    match part:
        case transforms.RandomCrop():
            return partial(pad_crop, tuple(part.size), part.padding, part.fill)
        case RandomResizedCropAndInterpolation():
            if isinstance(part.interpolation, tuple):
                raise ValueError(
                    "data.interpolation 'random' is unknown to data.cache=device: name one, such as bilinear or bicubic"
                    ", or set data.cache: null."
                )
            return partial(resize_boxes, part)
        case transforms.RandomHorizontalFlip():
            return partial(_sometimes, part.p, lambda images, rng: images.flip(3))
        case transforms.RandomVerticalFlip():
            return partial(_sometimes, part.p, lambda images, rng: images.flip(2))
        case transforms.RandomGrayscale():
            return partial(_sometimes, part.p, lambda images, rng: functional.rgb_to_grayscale(images, images.shape[1]))
        case transforms.RandomApply():
            (only,) = part.transforms
            return partial(_sometimes, part.p, _step(only, device, auto_augment))
        case transforms.ColorJitter() | transforms.GaussianBlur():
            return partial(in_groups, part)
        case transforms.AutoAugment():
            return partial(in_groups, v2.AutoAugment(part.policy, part.interpolation, part.fill))
        case timm_policies.RandAugment() | timm_policies.AutoAugment() | timm_policies.AugMixAugment():
            return partial(in_groups, policy_of_tensors(part, auto_augment))
        case MaybeToTensor():
            return partial(_normalize, torch.zeros((), device=device), torch.tensor(255.0, device=device))
        case transforms.Normalize():
            mean, std = (torch.as_tensor(values)[:, None, None].to(device) for values in (part.mean, part.std))
            return partial(_normalize, mean, std)
        case RandomErasing():
            return partial(erase, part)
        case Cutout():
            return partial(cut_out, part.side, part.fill.to(device))
    raise ValueError(f"data.cache=device does not know the transform {part!r} for batches; set data.cache: null.")


def _sometimes(probability: float, step: Step, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Do a step for some of the images only, each with a probability."""
    chosen = np.flatnonzero(rng.random(len(images)) < probability)
    if len(chosen) == 0:
        return images
    rows = upload(chosen, images.device)
    return images.index_copy(0, rows, step(images[rows], rng))


def in_groups(transform: Callable[[Tensor], Tensor], images: Tensor, rng: np.random.Generator) -> Tensor:
    """Call a random transform, which draws from the global generators, on each group of the images."""
    with seeded_generators(rng.integers(2**32, size=4).tolist()):
        return torch.cat([transform(group) for group in torch.split(images, GROUP)])


def _normalize(mean: Tensor, std: Tensor, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Subtract and divide by tensors: a GPU would multiply by the rounded reciprocal of a number."""
    return images.float().sub(mean).div(std)


def policy_of_tensors(policy: Any, auto_augment: str | None = None) -> Any:
    """Return timm's RandAugment or AutoAugment with torchvision's operations on tensors in place of Pillow's.

    timm's own code draws: which operations, how many, with which probability and magnitude.
    """
    policy = copy(policy)
    match policy:
        case timm_policies.RandAugment():
            policy.ops = [_operation_on_tensors(operation, auto_augment) for operation in policy.ops]
        case timm_policies.AutoAugment():
            policy.policy = [[_operation_on_tensors(one, auto_augment) for one in pair] for pair in policy.policy]
        case _:
            raise _unknown_policy(auto_augment, type(policy).__name__)
    return policy


def _operation_on_tensors(operation: Any, auto_augment: str | None) -> Any:
    name = operation.aug_fn.__name__
    if name not in COLOURS and name not in MOVES:
        raise _unknown_policy(auto_augment, operation.name)
    resample = operation.kwargs["resample"]
    resample = Resampling.BICUBIC if isinstance(resample, tuple) else Resampling(resample)
    if resample not in _INTERPOLATIONS:
        raise ValueError(
            f"data.interpolation {resample.name.lower()!r} is none that augment.auto_augment moves pixels with; "
            "allowed are nearest, bilinear, bicubic, or set data.cache: null."
        )
    fill = torch.tensor(operation.kwargs["fillcolor"]).reshape(-1).tolist()
    operation = copy(operation)
    operation.aug_fn = COLOURS.get(name) or MOVES[name]
    operation.kwargs = {} if name in COLOURS else {"interpolation": _INTERPOLATIONS[resample], "fill": fill}
    return operation


def _unknown_policy(auto_augment: str | None, what: str) -> ValueError:
    return ValueError(
        f"augment.auto_augment {auto_augment!r} is unknown to data.cache=device, because of {what}; allowed are timm's "
        "rand-..., v0, v0r, original and originalr, but no blur, and torchvision's cifar10, imagenet and svhn. For "
        "others set data.cache: null."
    )


# torchvision moves the pixels of tensors by no other ways.
_INTERPOLATIONS: Final = {
    Resampling.NEAREST: v2.InterpolationMode.NEAREST,
    Resampling.BILINEAR: v2.InterpolationMode.BILINEAR,
    Resampling.BICUBIC: v2.InterpolationMode.BILINEAR,
}


COLOURS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "auto_contrast": functional.autocontrast,
    "brightness": functional.adjust_brightness,
    "color": functional.adjust_saturation,
    "contrast": functional.adjust_contrast,
    "desaturate": lambda images, share: functional.adjust_saturation(images, min(1.0, max(0.0, 1.0 - share))),
    "equalize": functional.equalize,
    "invert": functional.invert,
    "posterize": lambda images, bits: functional.posterize(images, min(max(bits, 0), 8)),
    "sharpness": functional.adjust_sharpness,
    # The threshold is up to 256, which a byte would not hold; what is added, at most 128.
    "solarize": lambda images, threshold: torch.where(images.int() < threshold, images, 255 - images),
    "solarize_add": lambda images, add: torch.where(images < 128, images + add, images),
}
"""timm's operations on colours, as functions of images [..., C, H, W] of uint8 and timm's argument."""


def _move(
    images: Tensor, *, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0, **settings: Any
) -> Tensor:
    """Move pixels to the left and up, and shear, as `Image.transform` with an affine matrix does."""
    shear = [math.degrees(math.atan(share)) for share in (shear_x, shear_y)]
    shift, center = [-x, -y], [0, 0]
    moved: Tensor = functional.affine(images, 0.0, shift, 1.0, shear, center=center, **settings)
    return moved


MOVES: Final[Mapping[str, Callable[..., Tensor]]] = {
    "rotate": functional.rotate,
    "shear_x": lambda images, share, **settings: _move(images, shear_x=share, **settings),
    "shear_y": lambda images, share, **settings: _move(images, shear_y=share, **settings),
    "translate_x_abs": lambda images, pixels, **settings: _move(images, x=pixels, **settings),
    "translate_x_rel": lambda images, share, **settings: _move(images, x=share * images.shape[-1], **settings),
    "translate_y_abs": lambda images, pixels, **settings: _move(images, y=pixels, **settings),
    "translate_y_rel": lambda images, share, **settings: _move(images, y=share * images.shape[-2], **settings),
}
"""timm's operations that move pixels, as functions of images, timm's argument, interpolation and fill."""
