"""The values of all samples of a data set, each sample once, from all processes that saw a part of it."""

import logging
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_PADDING: Final = torch.iinfo(torch.int64).min


class SampleGatherer:
    """Keeps values and labels of the batches of a loader, until all processes gather them together.

    `add` waits neither for the device nor for other processes, whose numbers of batches may differ.

    Args:
        accelerator: Gathers the samples of all its processes; those with which a loader prepared by it fills up the
            last uneven batch are left out. Without it, the samples of this process count.
        most: Roughly how many samples to keep: where there are more, evenly spaced ones, between a half and all of this
            number in each process. All by default.
    """

    def __init__(self, accelerator: "Accelerator | None" = None, most: int | None = None) -> None:
        self.accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        processes = 1 if self.accelerator is None else self.accelerator.num_processes
        self._most = None if most is None else -(-most // processes)
        self._clear()

    def _clear(self) -> None:
        self._values: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._stride, self._seen, self._kept = 1, 0, 0

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Add one batch of this process, values [B, ...] and integer labels [B], while its loader is iterated over."""
        own = self._num_own(len(labels))
        first = -self._seen % self._stride
        self._seen += own
        values, labels = values[first : own : self._stride], labels[first : own : self._stride].long()
        self._values.append(values)
        self._labels.append(labels)
        self._kept += len(labels)
        while self._most is not None and self._kept > self._most:
            self._values, self._labels = [torch.cat(self._values)[::2]], [torch.cat(self._labels)[::2]]
            self._kept = len(self._labels[0])
            self._stride *= 2

    def gather(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return values [N, *shape] and labels [N] of all samples since the last call, the same on every process.

        The values are float32 where another process may have none.
        """
        device = None if self.accelerator is None else self.accelerator.device
        values = torch.cat(self._values or [torch.empty(0, *shape, device=device)])
        labels = torch.cat(self._labels or [torch.empty(0, dtype=torch.int64, device=device)])
        self._clear()
        if self.accelerator is not None:
            padded = self.accelerator.pad_across_processes(values)
            values, labels = self.accelerator.gather(
                (padded, self.accelerator.pad_across_processes(labels, pad_index=_PADDING))
            )
            real = labels != _PADDING
            values, labels = values[real], labels[real]
        return values, labels

    def _num_own(self, batch_size: int) -> int:
        """Return how many samples of this batch are the process's own; the rest were added by the loader.

        Accelerate's `gather_for_metrics` leaves out the same samples, but gathers every batch.
        """
        if self.accelerator is None or not self.accelerator.even_batches:
            return batch_size
        state = self.accelerator.gradient_state
        remainder: int = state.remainder
        if not state.end_of_dataloader or remainder == 0:
            return batch_size
        if remainder < 0:
            if isinstance(state.active_dataloader.dataset, IterableDataset):
                logger.warning("The loader does not know its length: repeated samples in its last batch count twice.")
            return batch_size
        first: int = self.accelerator.process_index * batch_size
        return min(max(remainder - first, 0), batch_size)
