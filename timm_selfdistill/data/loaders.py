"""Batches from splits: loaders that Accelerate shards, or that already hold this process's share of a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset

from timm_selfdistill.cores import fit_threads, loader_processes
from timm_selfdistill.data.batches import Batch, Collate, DrawnSamples, TrainingOrder, seed_generators
from timm_selfdistill.data.cache import CachedSplit, cache_splits
from timm_selfdistill.data.decode import SampleError, SkipList, Use, check_pillow
from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import MODES, InputConfig, eval_transform, train_transform
from timm_selfdistill.data.workers import worker_options
from timm_selfdistill.recipe import AugmentSection, DataSection


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
    accumulate: int = 1,
    skipped: SkipList | None = None,
    device: torch.device | str = "cpu",
) -> Loaders:
    """Build the loaders of a run.

    Loaders of rows with an index hold every sample: `accelerator.prepare` gives each process its share. Loaders of a
    stream must not be prepared. There the training loader holds this process's share and gives every process the same
    number of batches, starting over or stopping early where shares differ; validation and evaluation are read whole by
    every process, as their length is unknown beforehand, so their metrics need no gathering.

    Augmentation draws from the generators of `random`, NumPy and torch. For rows with an index they are seeded for each
    batch and then set back; for a stream they are the workers' own, seeded by process and epoch. torch's threads are
    lowered to the cores that the loader processes leave.

    Args:
        data: What `open_dataset` returned.
        section: The recipe's `data`; with `cache=device` the splits are decoded here.
        augment: The recipe's `augment`.
        input: What the model expects.
        batch_size: Samples of one process and micro step.
        accelerator_shards: Index of this process, number of processes.
        seed: Decides the order of the training samples and the workers' augmentation.
        accumulate: Micro steps of an optimizer step.
        skipped: Lists the images that are skipped; in no file by default.
        device: Where the network runs, and where `data.cache=device` keeps the images.

    Raises:
        ValueError: If the training split is smaller than one batch of all processes or of unknown length, if an odd
            batch is to be mixed, if Pillow was told to accept truncated images, or if `cache_splits` raises it.
    """
    check_pillow()
    process, processes = accelerator_shards
    steps = _steps_per_epoch(data, augment, batch_size, processes)
    splits = data.by_use()
    skip_list = None if section.on_error == "raise" else skipped or SkipList()
    collates: dict[Use, Collate] = {}
    for use, split in splits.items():
        transform = train_transform(augment, input) if use == "training" else eval_transform(input)
        class_index = split.class_index if isinstance(split, StreamSplit) else None
        collates[use] = Collate(use, split.name, MODES[input.channels], transform, skip_list, class_index)
    device = torch.device(device)
    caches = section.cache == "device"  # which is filled before anything computes
    workers = loader_processes(section.stream_workers if caches else section.workers, device.type)
    fit_threads(beside=0 if caches else workers)
    cached: dict[Use, CachedSplit] = {}
    if caches:
        indexed = {use: split for use, split in splits.items() if isinstance(split, ImageSplit)}
        cached = cache_splits(
            indexed, collates, device, augment.auto_augment, seed=seed, workers=workers, show_progress=process == 0
        )
    order = None
    if isinstance(data.train, ImageSplit):
        balanced = section.sampling == "balanced"
        order = TrainingOrder(data.train.targets, batch_size, processes, accumulate, seed, balanced)
    loaders: dict[Use, DataLoader[Any]] = {}
    for use, split in splits.items():
        training = use == "training"
        options: dict[str, Any] = {"batch_size": batch_size, "drop_last": training}
        if training and order is not None:
            options = {"batch_sampler": order}
        # Its own, because starting a loader draws a number: from the global generator, that would change what training
        # draws next.
        options["generator"] = torch.Generator().manual_seed(seed)
        if use in cached:
            # Without workers: other processes could not use the device.
            loaders[use] = DataLoader(cached[use], **options, collate_fn=lambda batch: batch)
            continue
        options |= {"collate_fn": collates[use], "pin_memory": torch.cuda.is_available()}
        if isinstance(split, ImageSplit):
            options |= worker_options(workers, partial(_seed_worker, process=process))
            samples = DrawnSamples(split, seed) if training else split
            loaders[use] = DataLoader(samples, **options, persistent_workers=workers > 0)
        elif training:
            rows = split.rows.shuffle(seed=seed, buffer_size=section.shuffle_buffer)
            rows = split_dataset_by_node(rows, rank=process, world_size=processes)
            # Its workers are started and seeded in every epoch, so that one can be repeated.
            options |= _stream_options(rows, section, process)
            loaders[use] = _SteadyLoader(_Stream(rows, data.name, split.name), steps, seed, **options)
        else:
            options |= _stream_options(split.rows, section, process)
            stream = _Stream(split.rows, data.name, split.name)
            loaders[use] = DataLoader(stream, **options, persistent_workers=options["num_workers"] > 0)
    return Loaders(loaders["training"], loaders.get("validation"), loaders["evaluation"], steps, order)


def _stream_options(rows: datasets.IterableDataset, section: DataSection, process: int) -> dict[str, Any]:
    # A shard is read by one worker. There are as many on any machine, as the order depends on them.
    shares = min(section.stream_workers, rows.num_shards)
    fit_threads(beside=shares)
    return worker_options(shares, partial(_seed_worker, process=process))


def _steps_per_epoch(data: ImageData, augment: AugmentSection, batch_size: int, processes: int) -> int:
    if augment.mixes and batch_size % 2:
        raise ValueError(f"Mixup and CutMix need an even batch size per process and micro step, received {batch_size}.")
    size = data.train.size
    if size is None:
        raise ValueError(f"The stream {data.name} does not know the length of its training split: set data.train_size.")
    steps = size // (batch_size * processes)
    if steps == 0:
        raise ValueError(
            f"The training split has {size} samples, less than one batch of {batch_size} for each of {processes} "
            "process(es)."
        )
    return steps


class _Stream(IterableDataset[dict[str, Any]]):
    """The samples of a stream; where it breaks off, the error says which stream."""

    def __init__(self, rows: datasets.IterableDataset, data: str, split: str) -> None:
        self.rows, self.name = rows, f"{data}, split {split!r}"

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

    def __init__(self, stream: _Stream, steps: int, seed: int, **options: Any) -> None:
        super().__init__(stream, **options)
        self.stream, self.steps, self.seed = stream, steps, seed

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
        self.stream.rows.set_epoch(epoch)
        words = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        self.generator.manual_seed(int(words[0]))


def _seed_worker(worker: int, *, process: int) -> None:
    """Seed a worker's generators; torch alone would give worker i of every process the same seed."""
    seed_generators([torch.initial_seed(), process])
