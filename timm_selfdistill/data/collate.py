"""Samples to a batch: decode, transform, stack; and what becomes of images that cannot be decoded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from timm_selfdistill.data.decode import SampleError, SkipList, SkippedImage, Use, decode, read
from timm_selfdistill.data.order import generators_of_training, seed_generators
from timm_selfdistill.data.transforms import Transform
from timm_selfdistill.metrics import IGNORED

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Collate:
    """Decode, transform and stack samples; all in the loader process that read them.

    Without a list of skipped images, one that cannot be decoded is an error. With one, batches keep their size, and
    what they hold depends on the order of the samples alone:

    - In training, the next image of the batch that can be decoded, after the last one the first, is taken twice, with
      its target and another augmentation. A batch without any is an error.
    - Elsewhere, a blank image holds the place, and its target is IGNORED, so that no metric counts it.

    What cannot be read, because a file is missing or the storage fails, is always an error: that is no property of the
    image, and may be another at the next attempt.

    Args:
        use: What the batches are for.
        split: The split's name, for messages.
        mode: The mode of an image that has as many channels as the model takes.
        transform: From an image to a tensor.
        skipped: Lists the images that are skipped; None to skip none.
        class_index: The class index of every label; None where targets are class indices already.
    """

    use: Use
    split: str
    mode: str
    transform: Transform
    skipped: SkipList | None
    class_index: Mapping[int | str, int] | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        if "seed" not in samples[0]:
            return self._batch(samples)
        with generators_of_training():
            seed_generators(samples[0]["seed"])
            return self._batch(samples)

    def load(self, sample: dict[str, Any]) -> tuple[Tensor, int] | None:
        """Return the transformed image and its target, or None if it is skipped."""
        try:
            data = read(sample["image"])
        except Exception as error:  # of the file system, an archive or the network
            raise SampleError(f"{self._where(sample)}: the image cannot be read: {error}") from error
        try:
            image = decode(data, self.mode)
        except MemoryError as error:
            raise SampleError(f"{self._where(sample)}: not enough memory to decode the image.") from error
        except Exception as error:  # Pillow's decoders raise whatever their format's library does
            reason = (str(error) or repr(error)).rstrip(".")
            if self.skipped is None:
                raise SampleError(
                    f"{self._where(sample)}: the image cannot be decoded: {reason}. Repair or remove it, or set "
                    "data.on_error=skip to go on without such images."
                ) from error
            self.skipped.add(
                SkippedImage(
                    use=self.use,
                    split=self.split,
                    row=sample.get("row"),
                    file=_file(sample),
                    sha256=hashlib.sha256(data).hexdigest(),
                    reason=reason,
                )
            )
            return None
        return self.transform(image), self._target(sample)

    def _batch(self, samples: list[dict[str, Any]]) -> Batch:
        loaded = [self.load(sample) for sample in samples]
        good = [place for place, pair in enumerate(loaded) if pair is not None]
        for place, pair in enumerate(loaded):
            if pair is None:
                loaded[place] = self._substitute(place, samples, good)
        images, targets = default_collate(loaded)
        return images, targets

    def _substitute(self, place: int, samples: list[dict[str, Any]], good: list[int]) -> tuple[Tensor, int] | None:
        """Return what takes the place of a skipped image."""
        if self.use != "training":
            return self.transform(Image.new(self.mode, (1, 1))), IGNORED
        if not good:
            raise SampleError(
                f"{self._where(samples[0])}: none of the {len(samples)} images of a training batch can be decoded, so "
                "nothing can take their places. Repair or remove them."
            )
        return self.load(samples[next((later for later in good if later > place), good[0])])

    def _target(self, sample: dict[str, Any]) -> int:
        target = sample["target"]
        if target is None or target in ("", -1):
            raise SampleError(f"{self._where(sample)}: the label is missing ({target}).")
        if self.class_index is None:
            return int(target)
        if target not in self.class_index:
            labels = list(self.class_index)
            raise SampleError(
                f"{self._where(sample)}: the label is {target!r}, which is none of the {len(labels)} classes "
                f"{', '.join(map(str, labels[:5]))}{', ...' if len(labels) > 5 else ''}."
            )
        return self.class_index[target]

    def _where(self, sample: dict[str, Any]) -> str:
        where = f"Split {self.split!r}"
        if "row" in sample:
            where += f", row {sample['row']}"
        file = _file(sample)
        return f"{where}, file {file}" if file else where


def _file(sample: dict[str, Any]) -> str | None:
    return sample["image"]["path"] if isinstance(sample["image"], dict) else None
