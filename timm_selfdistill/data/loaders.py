"""Batches from splits: loaders that Accelerate shards, or that already hold this process's share of a stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from timm_selfdistill.data.order import DrawnSamples, TrainingOrder, generators_of_training, seed_generators
from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import MODES, InputConfig, Transform, decode, eval_transform, train_transform
from timm_selfdistill.recipe import AugmentSection, DataSection

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loaders:
    """Loaders of (images [B, C, H, W] float, targets [B] int64).

    Args:
        train: Shuffled; every batch is full.
        validation: In order, to the last sample; None if the recipe wants none.
        eval: In order, to the last sample.
        steps_per_epoch: Training batches of each process in an epoch.
        order: Draws the training samples; None for a stream.
    """

    train: DataLoader[Batch]
    validation: DataLoader[Batch] | None
    eval: DataLoader[Batch]
    steps_per_epoch: int
    order: TrainingOrder | None


def build_loaders(
    data: ImageData,
    section: DataSection,
    augment: AugmentSection,
    input: InputConfig,
    *,
    batch_size: int,
    accelerator_shards: tuple[int, int],
    seed: int,
) -> Loaders:
    """Build the loaders of a run.

    Loaders of rows with an index hold every sample: `accelerator.prepare` gives each process its share. Loaders of a
    stream must not be prepared. There the training loader holds this process's share and gives every process the same
    number of batches, starting over or stopping early where shares differ; validation and evaluation are read whole by
    every process, because nobody knows their length beforehand, so their metrics need no gathering.

    Augmentation draws from the generators of `random`, NumPy and torch. For rows with an index they are seeded for each
    sample, and what training draws from them in this process is left alone. For a stream they are those of the workers,
    which are seeded apart for every process and epoch, or of this process without workers.

    Args:
        data: What `open_dataset` returned.
        section: The recipe's `data`.
        augment: The recipe's `augment`.
        input: What the model expects.
        batch_size: Samples of one process and micro step.
        accelerator_shards: Index of this process, number of processes.
        seed: Decides the order of the training samples and the workers' augmentation.

    Raises:
        ValueError: If the training split is smaller than one batch of all processes or of unknown length, or if an odd
            batch is to be mixed.
    """
    process, processes = accelerator_shards
    if augment.mixes and batch_size % 2:
        raise ValueError(f"Mixup and CutMix need an even batch size per process and micro step, received {batch_size}.")
    size = len(data.train) if isinstance(data.train, ImageSplit) else data.train.size
    if size is None:
        raise ValueError(f"The stream {data.name} does not know the length of its training split: set data.train_size.")
    steps = size // (batch_size * processes)
    if steps == 0:
        raise ValueError(
            f"The training split has {size} samples, less than one batch of {batch_size} for each of {processes} "
            "process(es)."
        )

    order = TrainingOrder(size, seed) if isinstance(data.train, ImageSplit) else None

    def loader(split: ImageSplit | StreamSplit, transform: Transform, training: bool = False) -> DataLoader[Any]:
        build: Callable[..., DataLoader[Any]] = DataLoader
        samples: Any = split
        workers = section.workers
        persistent = workers > 0
        if isinstance(split, ImageSplit):
            samples = DrawnSamples(split, seed) if training else split
        else:
            samples = split.rows
            if training:
                build = partial(_SteadyLoader, steps, seed)
                samples = samples.shuffle(seed=seed, buffer_size=section.shuffle_buffer)
                samples = split_dataset_by_node(samples, rank=process, world_size=processes)
            workers = min(workers, samples.num_shards)  # a shard is read by one worker
            # Those of a stream are started, and so seeded, anew in every epoch: one can then be repeated.
            persistent = workers > 0 and not training
        return build(
            samples,
            batch_size=batch_size,
            sampler=order if training else None,
            drop_last=training,
            num_workers=workers,
            persistent_workers=persistent,
            collate_fn=_Collate(split.name, MODES[input.channels], transform),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_seed_worker, process=process),
            # Its own, because starting a loader draws a number: from the global generator, that would change what
            # training draws next.
            generator=torch.Generator().manual_seed(seed),
        )

    still = eval_transform(input)
    return Loaders(
        train=loader(data.train, train_transform(augment, input), training=True),
        validation=None if data.validation is None else loader(data.validation, still),
        eval=loader(data.eval, still),
        steps_per_epoch=steps,
        order=order,
    )


class _SteadyLoader(DataLoader[Any]):
    """A loader of a stream that gives exactly `steps` batches an epoch: it starts over or stops early."""

    def __init__(self, steps: int, seed: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch promises its own iterator class
        left = self.steps
        while left:
            before = left
            for batch in islice(super().__iter__(), left):
                left -= 1
                yield batch
            if left == before:
                raise ValueError(
                    f"A pass over this process's share of the stream gave no full batch of {self.batch_size} samples."
                )

    def begin(self, epoch: int) -> None:
        """Choose the order of the coming epoch, and the seeds of its workers."""
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        words = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        self.generator.manual_seed(int(words[0]))


@dataclass(frozen=True)
class _Collate:
    """Decode, transform and stack samples; all in the worker that read them."""

    split: str
    mode: str
    transform: Transform

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        if "seed" not in samples[0]:
            return self._stack(samples)
        with generators_of_training():
            return self._stack(samples)

    def _stack(self, samples: list[dict[str, Any]]) -> Batch:
        images, targets = default_collate([(self._image(sample), self._target(sample)) for sample in samples])
        return images, targets

    def _image(self, sample: dict[str, Any]) -> Tensor:
        try:
            image = decode(sample["image"], self.mode)
        except Exception as error:  # Pillow's decoders raise whatever their format's library does
            raise ValueError(f"{self._place(sample)}: the image cannot be decoded: {error}") from error
        if "seed" in sample:
            seed_generators(sample["seed"])
        return self.transform(image)

    def _target(self, sample: dict[str, Any]) -> int:
        target = sample["target"]
        if target is None or target < 0:
            raise ValueError(f"{self._place(sample)}: the label is missing ({target}).")
        return int(target)

    def _place(self, sample: dict[str, Any]) -> str:
        place = f"Split {self.split!r}"
        if "row" in sample:
            place += f", row {sample['row']}"
        path = sample["image"].get("path") if isinstance(sample["image"], dict) else None
        return f"{place}, file {path}" if path else place


def _seed_worker(worker: int, *, process: int) -> None:
    """Seed a worker's generators; torch alone would give worker i of every process the same seed."""
    seed_generators([torch.initial_seed(), process])
