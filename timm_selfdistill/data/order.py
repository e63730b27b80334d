"""The order of the training samples and what a batch is augmented with: functions of seed, epoch and first row alone.

So a training goes on in the middle of an epoch as if nothing had happened, with any number of loader processes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from timm_selfdistill.data.names import Indices
from timm_selfdistill.data.splits import ImageSplit

Arrangement = Literal["plain", "paired", "repeated"]
"""What a training batch holds beside the samples that it draws."""

Draw = tuple[int, int]
"""The position of a sample in the training split, and the epoch that it is drawn in."""


class TrainingOrder(Sampler[list[Draw]]):
    """Full batches of the training split, in a new order in every epoch, from any place in it.

    Every batch draws as many samples. Beside them it holds none (plain); for each one another of its class, behind them
    all (paired); or, before them, those that the same process drew in the batch before (repeated; in the very first
    batch, its own). What an epoch draws does not depend on that.

    Args:
        targets: Class index of each sample [N].
        batch_size: Samples that a batch draws.
        processes: Number of processes, which take the batches in turn.
        accumulate: Batches that each process takes for one optimizer step; an epoch ends behind the last whole one.
        seed: Decides the orders.
    """

    # Accelerate asks for it. It must not find a batch size, which may differ between the phases of a training.
    drop_last = True

    def __init__(self, targets: Indices, batch_size: int, processes: int, accumulate: int, seed: int) -> None:
        self._targets, self._seed = targets, seed
        self._drawn, self._processes = batch_size, processes
        self._last_round = len(targets) // (batch_size * processes) // accumulate * accumulate - 1
        self._epoch, self._first = 0, 0
        self._arrangement: Arrangement = "plain"

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose what batches hold beside the samples that they draw."""
        self._arrangement = arrangement

    def begin(self, epoch: int, first: int = 0) -> None:
        """Choose what is drawn next.

        Args:
            epoch: Index of the epoch.
            first: How many of its samples were drawn before, a multiple of the batch size.
        """
        self._epoch, self._first = epoch, first

    def positions(self, epoch: int) -> list[int]:
        """Return the positions of all samples in the order of an epoch."""
        # numpy's sequence of seeds, as nearby seeds of torch's own generator are not independent.
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        order: list[int] = torch.randperm(len(self._targets), generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """Return the positions in the batches of an epoch, those of all processes in turn.

        Args:
            epoch: Index of the epoch.
            first: How many of its samples were drawn before, a multiple of the batch size.
        """
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
        """Return what the process that takes a batch drew in its batch before."""
        size, of_round = self._drawn, self._drawn * self._processes
        if start >= of_round:
            return order[start - of_round : start - of_round + size]
        if epoch == 0:
            return order[start : start + size]
        before = self._last_round * of_round + start
        return self.positions(epoch - 1)[before : before + size]


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
