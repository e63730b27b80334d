"""Batches from splits: loaders that Accelerate shards, or that already hold this process's share of a stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset

from timm_selfdistill.data.cache import CachedSplit, cache_splits
from timm_selfdistill.data.collate import Batch, Collate
from timm_selfdistill.data.decode import SampleError, SkipList, Use, check_pillow
from timm_selfdistill.data.order import DrawnSamples, TrainingOrder, seed_generators
from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import MODES, InputConfig, eval_transform, train_transform
from timm_selfdistill.data.workers import worker_options
from timm_selfdistill.recipe import AugmentSection, DataSection


@dataclass(frozen=True)
class Loaders:
    """Loaders of (images [B, C, H, W] float, targets [B] int64).

    An image that cannot be decoded is an error or, with `data.on_error=skip`, left out as `Collate` says: of the
    training batches another image takes its place, of the others its target is IGNORED.

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
    accumulate: int = 1,
    skipped: SkipList | None = None,
    device: torch.device | str = "cpu",
) -> Loaders:
    """Build the loaders of a run.

    Loaders of rows with an index hold every sample: `accelerator.prepare` gives each process its share. Loaders of a
    stream must not be prepared. There the training loader holds this process's share and gives every process the same
    number of batches, starting over or stopping early where shares differ; validation and evaluation are read whole by
    every process, because nobody knows their length beforehand, so their metrics need no gathering.

    Augmentation draws from the generators of `random`, NumPy and torch. For rows with an index they are seeded for each
    batch, and what training draws from them in this process is left alone. For a stream they are those of the workers,
    which are seeded apart for every process and epoch, or of this process without workers.

    With `data.cache=device` the splits are decoded here, and batches are made on the device, each by a generator of its
    own.

    Args:
        data: What `open_dataset` returned.
        section: The recipe's `data`.
        augment: The recipe's `augment`.
        input: What the model expects.
        batch_size: Samples of one process and micro step.
        accelerator_shards: Index of this process, number of processes.
        seed: Decides the order of the training samples and the workers' augmentation.
        accumulate: Micro steps of an optimizer step.
        skipped: Lists the images that are skipped; in no file by default.
        device: Where `data.cache=device` keeps the images.

    Raises:
        ValueError: If the training split is smaller than one batch of all processes or of unknown length, if an odd
            batch is to be mixed, if Pillow was told to accept truncated images, or if the images cannot be kept on the
            device.
    """
    check_pillow()
    skip_list = SkipList() if skipped is None else skipped
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

    order = None
    if isinstance(data.train, ImageSplit):
        order = TrainingOrder(data.train.targets, batch_size, processes, accumulate, seed)

    def collate(split: ImageSplit | StreamSplit, use: Use) -> Collate:
        return Collate(
            use,
            split.name,
            MODES[input.channels],
            train_transform(augment, input) if use == "training" else eval_transform(input),
            skip_list if section.on_error == "skip" else None,
            split.class_index if isinstance(split, StreamSplit) else None,
        )

    uses: dict[Use, ImageSplit | StreamSplit | None]
    uses = {"training": data.train, "validation": data.validation, "evaluation": data.eval}
    cached: dict[Use, CachedSplit] = {}
    if section.cache == "device":
        kept = {use: split for use, split in uses.items() if isinstance(split, ImageSplit)}
        cached = cache_splits(
            kept,
            {use: collate(split, use) for use, split in kept.items()},
            torch.device(device),
            seed=seed,
            workers=section.workers,
            show_progress=process == 0,
        )

    def loader(split: ImageSplit | StreamSplit, use: Use) -> DataLoader[Any]:
        training = use == "training"
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
            samples = _Stream(samples, f"{data.name}, split {split.name!r}")
            # Those of a stream are started, and so seeded, anew in every epoch: one can then be repeated.
            persistent = workers > 0 and not training
        ordered = training and order is not None
        batches = {"batch_sampler": order} if ordered else {"batch_size": batch_size, "drop_last": training}
        if use in cached:
            # Other processes could not use the device, and its batches need no way to it.
            samples, workers, persistent = cached[use], 0, False
        return build(
            samples,
            **batches,
            **worker_options(workers, partial(_seed_worker, process=process)),
            persistent_workers=persistent,
            collate_fn=_as_it_is if use in cached else collate(split, use),
            pin_memory=torch.cuda.is_available() and use not in cached,
            # Its own, because starting a loader draws a number: from the global generator, that would change what
            # training draws next.
            generator=torch.Generator().manual_seed(seed),
        )

    return Loaders(
        train=loader(data.train, "training"),
        validation=None if data.validation is None else loader(data.validation, "validation"),
        eval=loader(data.eval, "evaluation"),
        steps_per_epoch=steps,
        order=order,
    )


class _Stream(IterableDataset[dict[str, Any]]):
    """The samples of a stream; where it breaks off, the error says which stream."""

    def __init__(self, rows: datasets.IterableDataset, name: str) -> None:
        self.rows, self.name = rows, name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows
        except Exception as error:  # of the file system, the network, pyarrow or whatever reads the format
            reason = str(error.__cause__ or error).rstrip(".") or repr(error)
            raise SampleError(
                f"{self.name}: the stream cannot be read on: {reason}. If a file of it is damaged or incomplete, write "
                "or download it again; then the same command goes on."
            ) from error


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
        self.dataset.rows.set_epoch(epoch)  # type: ignore[attr-defined]
        words = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        self.generator.manual_seed(int(words[0]))


def _as_it_is(batch: Batch) -> Batch:
    """What collates batches that are whole."""
    return batch


def _seed_worker(worker: int, *, process: int) -> None:
    """Seed a worker's generators; torch alone would give worker i of every process the same seed."""
    seed_generators([torch.initial_seed(), process])
