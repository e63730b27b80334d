"""The order of the training samples and what a batch is augmented with: functions of seed, epoch and first row alone.

So a training goes on in the middle of an epoch as if nothing had happened, with any number of loader processes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from timm_selfdistill.data.splits import ImageSplit

Draw = tuple[int, int]
"""The position of a sample in the training split, and the epoch that it is drawn in."""


class TrainingOrder(Sampler[Draw]):
    """A new order of the training split in every epoch, from any place in it.

    Args:
        size: Number of samples.
        seed: Decides the orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch, self._first = 0, 0

    def begin(self, epoch: int, first: int = 0) -> None:
        """Choose what is drawn next.

        Args:
            epoch: Index of the epoch.
            first: How many of its samples were drawn before.
        """
        self._epoch, self._first = epoch, first

    def positions(self, epoch: int) -> list[int]:
        """Return the positions of all samples in the order of an epoch."""
        # numpy's sequence of seeds, as nearby seeds of torch's own generator are not independent.
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        order: list[int] = torch.randperm(self._size, generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def __iter__(self) -> Iterator[Draw]:
        return iter([(position, self._epoch) for position in self.positions(self._epoch)[self._first :]])

    def __len__(self) -> int:
        return self._size - self._first


class DrawnSamples(Dataset[dict[str, Any]]):
    """The samples of a split as `TrainingOrder` draws them, each with a seed for the batch that it begins.

    Args:
        split: The split.
        seed: The run's seed.
    """

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

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.__getitems__([draw])[0]


def seed_generators(words: list[int]) -> None:
    """Seed every generator that augmentation draws from: those of `random`, NumPy and torch."""
    seeds = np.random.SeedSequence(words).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


@contextmanager
def generators_of_training() -> Iterator[None]:
    """Keep what training draws apart from what the body draws, where both happen in one process."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
