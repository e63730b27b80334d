"""Splits that are decoded once and kept on the device that trains, where batches of them are augmented as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_selfdistill.data.batch_augment import BatchTransform, split_transform
from timm_selfdistill.data.batch_crops import upload
from timm_selfdistill.data.batches import Batch, Collate, Draw, no_good_image
from timm_selfdistill.data.decode import SampleError, Use
from timm_selfdistill.data.splits import ImageSplit
from timm_selfdistill.data.workers import worker_options
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.output import progress_bar

_DECODED_AT_ONCE = 256
_MODES = ("L", "RGB")


@dataclass(frozen=True, eq=False)
class CachedSplit(Dataset[Batch]):
    """A split whose images are on a device; it is indexed by whole batches, and skips images as `Collate` does."""

    split: ImageSplit
    use: Use
    images: Tensor  # [N, C, H, W] of uint8, black where one is skipped
    targets: Tensor  # class indices [N], on the same device
    skipped: NDArray[np.bool_]  # [N]
    transform: BatchTransform
    seed: int  # with the epoch and the first row, decides how a training batch is augmented

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, draws: Sequence[int | Draw]) -> Batch:
        """Return the batch of samples that `TrainingOrder` drew or, not for training, that are at positions."""
        first = draws[0]
        positions = np.array([draw if isinstance(draw, int) else draw[0] for draw in draws])
        seed = [self.seed, 0 if isinstance(first, int) else first[1], int(self.split.indices[positions[0]])]
        if self.use == "training":
            good = np.flatnonzero(~self.skipped[positions])
            if len(good) == 0:
                row = self.split.indices[positions[0]]
                raise no_good_image(f"Split {self.split.name!r}, row {row}", len(positions))
            # In place of a skipped image, the next one of the batch that is not, after the last one the first.
            positions = positions[good[np.searchsorted(good, np.arange(len(positions))) % len(good)]]
        places = upload(positions, self.images.device)
        return self.transform(self.images[places], seed), self.targets[places]


def cache_splits(
    splits: Mapping[Use, ImageSplit],
    collates: Mapping[Use, Collate],
    device: torch.device,
    auto_augment: str | None,
    *,
    seed: int,
    workers: int,
    show_progress: bool,
) -> dict[Use, CachedSplit]:
    """Decode splits and keep them on a device; what is random of their transforms is left for the batches.

    Raises:
        ValueError: If a setting of the augmentation is unknown to batches, if images have different sizes where they
            must not, if they do not fit into the device's memory, or if one cannot be decoded and is not skipped.
    """
    if device.type == "mps":
        raise ValueError("data.cache=device computes in float64, which an mps device cannot: leave it out.")
    transforms: dict[Use, BatchTransform] = {}
    decoders: dict[Use, Collate] = {}
    for use, collate in collates.items():
        if collate.mode not in _MODES:
            raise ValueError("data.cache=device knows images of 1 or 3 channels, and the model takes 4: leave it out.")
        fixed, transforms[use] = split_transform(collate.transform, device, auto_augment)
        decoders[use] = replace(collate, transform=fixed)
    shapes = {use: _first_shape(split, decoders[use]) for use, split in splits.items()}
    _check_memory({use: (len(split), *shapes[use]) for use, split in splits.items()}, device)
    cached = {}
    for use, split in splits.items():
        images = torch.zeros((len(split), *shapes[use]), dtype=torch.uint8, device=device)
        skipped = _decode(split, decoders[use], images, workers, show_progress)
        targets = split.targets if use == "training" else np.where(skipped, IGNORED, split.targets)
        cached[use] = CachedSplit(split, use, images, upload(targets, device), skipped, transforms[use], seed)
    return cached


def _first_shape(split: ImageSplit, decoder: Collate) -> tuple[int, ...]:
    """Return the shape of the first image that can be decoded."""
    for position in range(len(split)):
        loaded = decoder.load(split[position])
        if loaded is not None:
            return tuple(loaded[0].shape)
    raise SampleError(f"Split {split.name!r}: none of its {len(split)} images can be decoded. Repair or replace them.")


def _check_memory(shapes: Mapping[Use, tuple[int, ...]], device: torch.device) -> None:
    """Raise unless tensors of these shapes fit into what is free on the device."""
    needed = sum(int(np.prod(shape)) for shape in shapes.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        parts = ", ".join(f"{use} {' x '.join(map(str, shape))}" for use, shape in shapes.items())
        raise ValueError(
            f"data.cache=device needs {needed / 2**30:.2f} GiB in every process for the decoded images ({parts}), and "
            f"{device} has {free / 2**30:.2f} GiB free: leave it out, or take fewer or smaller images."
        )


def _decode(
    split: ImageSplit, decoder: Collate, images: Tensor, workers: int, show_progress: bool
) -> NDArray[np.bool_]:
    """Fill in the images of a split, and return which were skipped."""
    loader: DataLoader[Any] = DataLoader(
        split,
        batch_size=_DECODED_AT_ONCE,
        **worker_options(workers),
        collate_fn=partial(_decode_all, decoder=decoder),
        # Its own, because starting a loader draws a number.
        generator=torch.Generator(),
    )
    skipped = np.zeros(len(split), dtype=bool)
    first, done = None, 0
    for decoded in progress_bar(loader, title=f"decode {decoder.use}", show=show_progress):
        for position, image in enumerate(decoded, done):
            if image is None:
                skipped[position] = True
                continue
            first = position if first is None else first
            if image.shape != images.shape[1:]:
                raise _different_sizes(split, (first, position), (images.shape[1:], image.shape))
        good = [image for image in decoded if image is not None]
        if good:
            places = done + np.flatnonzero(~skipped[done : done + len(decoded)])
            images[upload(places, images.device)] = upload(np.stack(good), images.device)
        done += len(decoded)
    return skipped


def _decode_all(samples: list[dict[str, Any]], decoder: Collate) -> list[NDArray[np.uint8] | None]:
    """Decode samples, to arrays: each tensor from a loader process would be a file in shared memory."""
    loaded = [decoder.load(sample) for sample in samples]
    return [None if pair is None else pair[0].numpy() for pair in loaded]


def _different_sizes(split: ImageSplit, positions: Sequence[int], shapes: Sequence[Sequence[int]]) -> ValueError:
    (one, other), ((_, *size), (_, *another)) = split.indices[list(positions)], shapes
    return ValueError(
        f"Split {split.name!r}: before the random crop the images of rows {one} and {other} have {size[0]} x {size[1]} "
        f"and {another[0]} x {another[1]} pixels (height x width), and data.cache=device needs one size: store them at "
        "one size (for augment.train_crop_mode 'pad' one aspect ratio is enough), or leave data.cache out."
    )
