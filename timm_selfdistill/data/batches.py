"""Training batches: which samples they hold and in which order, and how samples become tensors.

Order and augmentation are functions of seed, epoch and first row alone, so a training resumes in the middle of an epoch
with the same batches, whatever the number of loader processes.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from timm_selfdistill.data.decode import SampleError, SkipList, SkippedImage, Use, decode, read
from timm_selfdistill.data.names import Indices, listed
from timm_selfdistill.data.splits import ImageSplit
from timm_selfdistill.data.transforms import Transform
from timm_selfdistill.metrics import IGNORED

Arrangement = Literal["plain", "paired", "repeated"]
"""What a training batch holds besides the samples that it draws."""

Draw = tuple[int, int]
"""The position of a sample in the training split, and the epoch that it is drawn in."""

Batch = tuple[Tensor, Tensor]


class TrainingOrder(Sampler[list[Draw]]):
    """Full batches of the training split, in a new order in every epoch, from any place in it.

    Every batch draws the same number of samples. It holds nothing else (plain); or also, after all of them, another
    sample of the class of each (paired); or, before them, those that the same process drew in the previous batch
    (repeated; in the very first batch, its own). What an epoch draws does not depend on the arrangement.

    Args:
        targets: Class index of each sample [N].
        batch_size: Samples that a batch draws.
        processes: Number of processes, which take the batches in turn.
        accumulate: Batches that each process takes for one optimizer step; an epoch ends after the last whole one.
        seed: Decides the orders.
        balanced: Whether an epoch draws as many samples of every class, to within one, and N in all: of a small class
            each several times, of a large one not all.
    """

    # Accelerate reads it. It must not find a batch size, which may differ between the phases of a training.
    drop_last = True

    def __init__(
        self, targets: Indices, batch_size: int, processes: int, accumulate: int, seed: int, balanced: bool = False
    ) -> None:
        self._targets, self._seed, self._balanced = targets, seed, balanced
        self._drawn, self._processes = batch_size, processes
        self._last_round = len(targets) // (batch_size * processes) // accumulate * accumulate - 1
        self._epoch, self._first = 0, 0
        self._arrangement: Arrangement = "plain"

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose what batches hold besides the samples that they draw."""
        self._arrangement = arrangement

    def begin(self, epoch: int, first: int = 0) -> None:
        """Choose what is drawn next: an epoch, of which `first` samples (whole batches) were drawn before."""
        self._epoch, self._first = epoch, first

    def positions(self, epoch: int) -> list[int]:
        """Return the positions of all samples in the order of an epoch."""
        # numpy's sequence of seeds, as nearby seeds of torch's own generator are not independent.
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        order = torch.randperm(len(self._targets), generator=torch.Generator().manual_seed(seed)).numpy()
        places: list[int] = (self._of_every_class(epoch)[order] if self._balanced else order).tolist()
        return places

    def _of_every_class(self, epoch: int) -> Indices:
        """Return the positions of as many samples of every class, to within one, as many in all as there are [N]."""
        random_numbers = np.random.default_rng([self._seed, epoch, 2])
        classes = random_numbers.permutation(np.unique(self._targets))
        shares = np.full(len(classes), len(self._targets) // len(classes))
        shares[: len(self._targets) % len(classes)] += 1
        drawn = []
        for index, share in zip(classes, shares, strict=True):
            own = np.flatnonzero(self._targets == index)
            rounds = [random_numbers.permutation(own) for _ in range(-(-share // len(own)))]
            drawn.append(np.concatenate(rounds)[:share])
        return np.concatenate(drawn)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """Return the positions in the batches of an epoch, those of all processes in turn; arguments as `begin`."""
        size, order = self._drawn, self.positions(epoch)
        partners = self._partners(epoch) if self._arrangement == "paired" else None
        for start in range(first, len(order) - size + 1, size):
            drawn = order[start : start + size]
            if partners is not None:
                yield drawn + partners[drawn].tolist()
            elif self._arrangement == "repeated":
                yield self._drawn_before(epoch, start, order) + drawn
            else:
                yield drawn

    def __iter__(self) -> Iterator[list[Draw]]:
        for positions in self.batches(self._epoch, self._first):
            yield [(position, self._epoch) for position in positions]

    def __len__(self) -> int:
        return (len(self._targets) - self._first) // self._drawn

    def _partners(self, epoch: int) -> Indices:
        """Return the position of a random other sample of its class for each sample [N]; itself where it is alone."""
        random_numbers = np.random.default_rng([self._seed, epoch, 1]).random(len(self._targets))
        by_class = np.argsort(self._targets, kind="stable")
        counts = np.bincount(self._targets)
        starts = np.cumsum(counts) - counts
        ranks = np.empty_like(by_class)
        ranks[by_class] = np.arange(len(by_class)) - starts[self._targets[by_class]]
        size = counts[self._targets]
        others = (ranks + 1 + (random_numbers * (size - 1)).astype(np.int64)) % size
        partners: Indices = by_class[starts[self._targets] + others]
        return partners

    def _drawn_before(self, epoch: int, start: int, order: list[int]) -> list[int]:
        """Return what the process that takes a batch drew in its previous batch."""
        size, of_round = self._drawn, self._drawn * self._processes
        if start >= of_round:
            return order[start - of_round : start - of_round + size]
        if epoch == 0:
            return order[start : start + size]
        before = self._last_round * of_round + start
        return self.positions(epoch - 1)[before : before + size]


class DrawnSamples(Dataset[dict[str, Any]]):
    """The samples of a split as `TrainingOrder` draws them, each with a seed for the batch that it begins."""

    def __init__(self, split: ImageSplit, seed: int) -> None:
        self._split, self._seed = split, seed

    def __len__(self) -> int:
        return len(self._split)

    def __getitems__(self, draws: list[Draw]) -> list[dict[str, Any]]:
        """Read a batch in one go, as torch's fetcher does when it can."""
        samples = self._split.__getitems__([position for position, _ in draws])
        for sample, (_, epoch) in zip(samples, draws, strict=True):
            sample["seed"] = [self._seed, epoch, sample["row"]]
        return samples


def seed_generators(words: list[int]) -> None:
    """Seed every generator that augmentation draws from: those of `random`, NumPy and torch (on the CPU)."""
    seeds = np.random.SeedSequence(words).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


@contextmanager
def seeded_generators(words: list[int]) -> Iterator[None]:
    """Seed the generators for the body, and set them back after it: training may draw from them in this process."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(words)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Collate:
    """Decode, transform and stack samples; all in the loader process that read them.

    Without a list of skipped images, one that cannot be decoded is an error. With one, batches keep their size: in
    training, the next image of the batch that can be decoded, after the last one the first, is taken twice, with its
    target and another augmentation (a batch without any is an error); elsewhere, a blank image holds the place, and its
    target is IGNORED, so that no metric counts it. What cannot be read, because a file is missing or the storage fails,
    is always an error: it may be readable at the next attempt.
    """

    use: Use
    split: str
    mode: str  # of an image that has as many channels as the model takes
    transform: Transform
    skipped: SkipList | None  # None to skip none
    class_index: Mapping[int | str, int] | None = None  # of every label; None where targets are class indices already

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        if "seed" not in samples[0]:
            return self._batch(samples)
        with seeded_generators(samples[0]["seed"]):
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
            digest = hashlib.sha256(data).hexdigest()
            self.skipped.add(SkippedImage(self.use, self.split, sample.get("row"), _file(sample), digest, reason))
            return None
        return self.transform(image), self._target(sample)

    def _batch(self, samples: list[dict[str, Any]]) -> Batch:
        loaded = [self.load(sample) for sample in samples]
        good = [place for place, pair in enumerate(loaded) if pair is not None]
        whole = [pair or self._substitute(place, samples, good) for place, pair in enumerate(loaded)]
        images, targets = default_collate(whole)
        return images, targets

    def _substitute(self, place: int, samples: list[dict[str, Any]], good: list[int]) -> tuple[Tensor, int] | None:
        """Return what takes the place of a skipped image."""
        if self.use != "training":
            return self.transform(Image.new(self.mode, (1, 1))), IGNORED
        if not good:
            raise no_good_image(self._where(samples[0]), len(samples))
        return self.load(samples[next((later for later in good if later > place), good[0])])

    def _target(self, sample: dict[str, Any]) -> int:
        target = sample["target"]
        if target is None or target in ("", -1):
            raise SampleError(f"{self._where(sample)}: the label is missing ({target}).")
        if self.class_index is None:
            return int(target)
        if target not in self.class_index:
            raise SampleError(
                f"{self._where(sample)}: the label is {target!r}, which is none of the {len(self.class_index)} classes "
                f"{listed(map(str, self.class_index))}."
            )
        return self.class_index[target]

    def _where(self, sample: dict[str, Any]) -> str:
        row = f", row {sample['row']}" if "row" in sample else ""
        file = f", file {name}" if (name := _file(sample)) else ""
        return f"Split {self.split!r}{row}{file}"


def no_good_image(where: str, count: int) -> SampleError:
    """Return the error for a training batch of which every image is skipped."""
    return SampleError(
        f"{where}: none of the {count} images of a training batch can be decoded, so nothing can take their places. "
        "Repair or remove them."
    )


def _file(sample: dict[str, Any]) -> str | None:
    return sample["image"]["path"] if isinstance(sample["image"], dict) else None
