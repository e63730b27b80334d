"""Start a run: Accelerate, its precision, the launches that are refused, and the data spread over the processes."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, DynamoBackend, is_bf16_available, parse_flag_from_env, patch_environment
from timm.data import Mixup
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, DistributedSampler

from timm_selfdistill.compat import accelerate_states, cpu_computes_bf16
from timm_selfdistill.data import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.batches import Arrangement, TrainingOrder
from timm_selfdistill.data.loaders import Loaders
from timm_selfdistill.data.transforms import build_mixup
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train.builders import label_smoothing
from timm_selfdistill.train.refusals import REPLICATE, refuse_optimizer
from timm_selfdistill.train.tracking import JsonLinesTracker, check_trackers

_logger = logging.getLogger(__name__)

# What leaves each process with a part of the network, in ways that the loop does not know.
_UNKNOWN_PARTS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

# What `accelerate launch` sets for a configuration with distributed_type FSDP, and which values work here.
_FSDP_VALUES = {
    "FSDP_VERSION": ("2",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_AUTO_WRAP_POLICY": ("no_wrap",),
    "FSDP_IGNORED_MODULES": (),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false",),
}


# What gives each process its share of the data, which Accelerate does already.
_SHARDING_SAMPLERS = (DistributedSampler, OrderedDistributedSampler, RepeatAugSampler)


def start_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Return the accelerator of a run, its trackers not yet started; refuse a launch that would do something else."""
    check_trackers(recipe)
    sharding = asks_for_sharding()
    _join_again()
    # `Sharded` shards, not Accelerate.
    with patch_environment(accelerate_use_fsdp="false"):
        accelerator = make_accelerator(
            recipe.precision,
            log_with=[JsonLinesTracker(folder / "metrics.jsonl"), *recipe.trackers],
            project_dir=str(folder),
        )
    launched, processes, device = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes, accelerator.device
    if launched != processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate joined {processes}: each would train alone and write "
            "over the others. On CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes N."
        )
    if accelerator.distributed_type in _UNKNOWN_PARTS:
        raise ValueError(
            f"Accelerate was told to use {accelerator.distributed_type.value}, which leaves each process with a part "
            "of the network; allowed are distributed_type MULTI_GPU, NO for one process, and FSDP with fsdp_version 2."
        )
    if sharding and processes > 1:
        refuse_optimizer(recipe.optimizer.name)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerate was told to accumulate {accelerator.gradient_accumulation_steps} steps, which would divide "
            "the loss a second time: leave that to the recipe's optimizer.accumulate."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("Accelerate was told to compile (dynamo_backend): leave that to the recipe's compile: true.")
    if recipe.sync_batchnorm and processes > 1 and device.type == "cpu":
        raise ValueError(
            f"sync_batchnorm: torch synchronises batch norm on GPUs only, received {processes} processes on the CPU; "
            "allowed there is false."
        )
    return accelerator


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Let the body start Accelerate as if nothing in this process had done so, and put the former state back.

    Accelerate keeps precision and device for the whole program, and refuses others: each run in a notebook has its
    own. Processes that were launched together stay together.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.distributed.is_initialized()
    states = accelerate_states(of_processes=alone)
    former = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, former, strict=True):
            if values:
                state.clear()
                state.update(values)


def per_process_batch(recipe: Recipe, num_processes: int) -> int:
    """Return how many samples each process takes in a micro step; raises `ValueError` if they cannot be divided."""
    parts = num_processes * recipe.optimizer.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size: {recipe.batch_size} cannot be divided over {num_processes} processes with "
            f"optimizer.accumulate={recipe.optimizer.accumulate}; allowed are multiples of {parts}."
        )
    return recipe.batch_size // parts


def asks_for_sharding() -> bool:
    """Return whether the launch asks for FSDP2, as Accelerate's environment variables say; refuse other FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    asked = {"FSDP_VERSION": "1"} | {name: os.environ[name] for name in _FSDP_VALUES if name in os.environ}
    for name, value in asked.items():
        if value.lower() not in _FSDP_VALUES[name]:
            allowed = " or ".join(_FSDP_VALUES[name]) or "nothing: leave it out"
            raise ValueError(
                f"Accelerate was told to use FSDP with {name}={value}; allowed is {allowed}, as in "
                f"recipes/accelerate/fsdp2.yaml. {REPLICATE}"
            )
    return True


def _join_again() -> None:
    """Let the processes of a restarted launch find one another, not their predecessors."""
    # The launcher's store outlives a restart, and torch looks there under the same names: a process that reads the
    # address of one that is gone fails or waits forever.
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if attempt == 0 or alone or torch.distributed.is_initialized():
        return
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    store, rank, world_size = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
    )


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """Return an accelerator of a recipe's precision; one that the device cannot compute in is a `ValueError`."""
    # As Accelerator makes it, which it leaves as it is then.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device = state.device
    if precision == "auto":
        precision, reason = suitable_precision(device)
        if state.is_main_process:
            _logger.info("Precision %s: %s.", precision, reason)
    elif precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: fp16 does nothing on a CPU; allowed there are auto, no and bf16.")
    elif precision == "bf16" and not computes_bf16(device):
        if device.type == "cuda":
            raise ValueError("precision: this GPU cannot compute in bf16; allowed are auto, no and fp16.")
        if state.is_main_process:
            _logger.warning(
                "precision: bf16 is emulated on this %s device, so training takes longer than in float32 (up to three "
                "times as long on a CPU without AVX-512); precision=auto chooses what suits the device.",
                device.type,
            )
    return Accelerator(mixed_precision=precision, **options)


def suitable_precision(device: torch.device) -> tuple[str, str]:
    """Return the fastest precision that a device computes in natively, and why it is that one."""
    if computes_bf16(device):
        return "bf16", f"the {device.type} device computes in bf16"
    if device.type == "cuda":
        return "fp16", "this GPU computes in half precision, but not in bf16"
    return "no", f"this {device.type} device is fastest in float32"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 itself, without emulating it."""
    if device.type == "cpu":
        return cpu_computes_bf16()
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported is true of older GPUs too, which emulate it.
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(is_bf16_available(ignore_tpu=False))


@dataclass
class Feed:
    """The data of a run; loaders that shard by themselves, or that Accelerate does not shard, are a `ValueError`."""

    train: Any  # training batches of this process
    validation: DataLoader[Any] | None
    steps_per_epoch: int  # training batches of this process in an epoch
    mixup: Mixup | None
    split: ImageSplit | StreamSplit  # the training split
    order: TrainingOrder | None  # None for a stream
    batch_size: int  # of one process and micro batch
    process: int
    processes: int

    def __post_init__(self) -> None:
        for loader in (self.train, self.validation):
            if loader is not None:
                _check_loader(loader)

    @property
    def streaming(self) -> bool:
        """Whether every process reads all validation batches, and a share of the training ones."""
        return self.order is None

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose what training batches hold beside the samples that they draw; a stream can only be "plain"."""
        if self.order is not None:
            self.order.arrange(arrangement)
        elif arrangement != "plain":
            raise ValueError(f"A stream cannot give {arrangement} batches.")

    def batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the training batches of an epoch that are left when `done` of them were taken before."""
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
        """Return which rows of the training split are in a batch of this process; None for a stream, which has none."""
        if self.order is None or not isinstance(self.split, ImageSplit):
            return None
        first = (batch * self.processes + self.process) * self.batch_size
        rows: list[int] = self.split.indices[next(self.order.batches(epoch, first))].tolist()
        return rows


def build_feed(
    loaders: Loaders, data: ImageData, recipe: Recipe, accelerator: Accelerator, batch_size: int
) -> tuple[Feed, DataLoader[Any]]:
    """Shard the loaders over the processes unless they are, and return the training's data and the evaluation's."""
    train, evaluation, validation = loaders.train, loaders.eval, loaders.validation
    if not data.streaming:
        train, evaluation = accelerator.prepare(train, evaluation)
        validation = None if validation is None else accelerator.prepare(validation)
    num_classes = recipe.model.num_classes or len(data.class_names)
    feed = Feed(
        train=train,
        validation=validation,
        steps_per_epoch=loaders.steps_per_epoch,
        mixup=build_mixup(recipe.augment, num_classes, label_smoothing(recipe.loss)),
        split=data.train,
        order=loaders.order,
        batch_size=batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return feed, evaluation


def _check_loader(loader: object) -> None:
    """Refuse a loader that Accelerate would pass on unchanged, or that is sharded already."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Accelerate shards a torch.utils.data.DataLoader only, received {type(loader).__name__}, of which every "
            "process would see all data (timm's create_loader(use_prefetcher=True) makes such a one)."
        )
    sampler: Any = loader
    while sampler is not None:
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
        if isinstance(sampler, _SHARDING_SAMPLERS):
            raise ValueError(
                f"The loader's {type(sampler).__name__} gives each process its share, of which Accelerate would give "
                "it a share again; allowed is a loader of all samples (timm's create_loader(distributed=False))."
            )
