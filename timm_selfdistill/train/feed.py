"""The data of a run, as the training loop takes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader

from timm_selfdistill.data import ImageSplit, StreamSplit
from timm_selfdistill.data.order import Arrangement, TrainingOrder
from timm_selfdistill.train.launch import refuse_sharding_loader


@dataclass
class Feed:
    """The data of a run.

    Args:
        train: Training batches of this process.
        validation: Validation batches, or None.
        steps_per_epoch: Training batches of this process in an epoch.
        mixup: Mixes a training batch and its targets, or None.
        split: The training split.
        order: Draws its samples; None for a stream.
        batch_size: Samples that a training batch of one process draws.
        process: Index of this process.
        processes: Number of processes.

    Raises:
        ValueError: If a loader shards by itself, or is of a kind that Accelerate does not shard.
    """

    train: Any
    validation: DataLoader[Any] | None
    steps_per_epoch: int
    mixup: Mixup | None
    split: ImageSplit | StreamSplit
    order: TrainingOrder | None
    batch_size: int
    process: int
    processes: int

    def __post_init__(self) -> None:
        for loader in (self.train, self.validation):
            if loader is not None:
                refuse_sharding_loader(loader)

    @property
    def streaming(self) -> bool:
        """Whether every process reads the whole of the validation batches, and a share of the training ones."""
        return self.order is None

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose what training batches hold beside the samples that they draw.

        Raises:
            ValueError: If a stream is to hold more, which has no index to look it up.
        """
        if self.order is not None:
            self.order.arrange(arrangement)
        elif arrangement != "plain":
            raise ValueError(f"A stream cannot give {arrangement} batches.")

    def batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the training batches of an epoch that are left.

        Args:
            epoch: Index of the epoch.
            done: How many of its batches were taken before.
        """
        if self.order is not None:
            self.order.begin(epoch, done * self.batch_size * self.processes)
            return iter(self.train)
        self.train.begin(epoch)
        batches: Iterator[tuple[Tensor, Tensor]] = iter(self.train)
        # A stream cannot be entered in its middle; reading its beginning also draws the random numbers that go with it.
        for _ in range(done):
            next(batches)
        return batches

    def rows(self, epoch: int, batch: int) -> list[int] | None:
        """Return which rows of the training split are in a batch of this process; None for a stream, which has none.

        Args:
            epoch: Index of the epoch.
            batch: Index of the batch in it.
        """
        if self.order is None or not isinstance(self.split, ImageSplit):
            return None
        first = (batch * self.processes + self.process) * self.batch_size
        positions = next(self.order.batches(epoch, first))
        rows: list[int] = self.split.indices[positions].tolist()
        return rows
