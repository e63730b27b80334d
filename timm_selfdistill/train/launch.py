"""Start a run: Accelerate and its precision, the launches that are refused, and what a run says of itself."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, DynamoBackend, is_bf16_available, parse_flag_from_env, patch_environment
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from timm_selfdistill.compat import accelerate_states, cpu_computes_bf16
from timm_selfdistill.data import ImageData
from timm_selfdistill.data.splits import ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.losses import needs_of
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.report import device_name
from timm_selfdistill.report.render import with_prefix
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

# timm's optimizers that step weights in parts as they step whole ones (the slow tests of test_sharding compare them).
# Others raise an error, or, as muon, do something else.
OPTIMIZERS = (
    *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adamwlegacy", "adan", "adanw"),
    *("adopt", "adoptw", "lamb", "lambc", "lambw", "laprop", "larc", "lars", "lion", "madgrad", "madgradw", "momentum"),
    *("nadam", "nadamlegacy", "nadamw", "nesterov", "nesterovw", "radam", "radamw", "rmsprop"),
    *("rmsproptf", "rmsproptfw", "sgd", "sgdw"),
)

_REPLICATE = "Without FSDP, distributed_type MULTI_GPU leaves the network whole."


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
                f"recipes/accelerate/fsdp2.yaml. {_REPLICATE}"
            )
    return True


def refuse_optimizer(name: str) -> None:
    """Refuse an optimizer that is not known to step weights in parts as it would step whole ones."""
    if name.lower() not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name: {name} is not known to work where each process has a part of the network (FSDP2); "
            f"allowed there are {', '.join(OPTIMIZERS)}."
        )


def refuse_loss(loss: nn.Module) -> None:
    """Refuse, for FSDP2, a loss that has parameters, or for which another network or the network again is run."""
    needs = needs_of(loss)
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"The loss {type(loss).__name__} has parameters of its own, which are not trained where each process has a "
            f"part of the network (FSDP2). {_REPLICATE}"
        )
    if needs.ema or needs.past or needs.batches == "paired":
        raise ValueError(
            f"The loss {type(loss).__name__} has {needs}, which is not done where each process has a part of the "
            f"network (FSDP2); allowed there are losses without ema, past and paired batches. {_REPLICATE}"
        )


def _join_again() -> None:
    """Let the processes of a restarted launch find one another, not their predecessors.

    The launcher's store outlives a restart, and torch looks there under the same names: a process that reads the
    address of one that is gone fails or waits forever.
    """
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
    """Return an accelerator of a recipe's precision.

    Args:
        precision: "auto" for what suits the device, else what Accelerate calls it.
        **options: Further arguments of `Accelerator`.

    Raises:
        ValueError: If the device cannot compute in the precision.
    """
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


def header(
    model: SelfDistillModel,
    data: ImageData,
    recipe: Recipe,
    accelerator: Accelerator,
    networks: Sequence[str],
    input_config: InputConfig,
    batches_per_epoch: int,
) -> list[str]:
    """Return the lines that stand above those of the epochs.

    Args:
        model: The network with its exits.
        data: The data of the run.
        recipe: The recipe.
        accelerator: The accelerator of the run.
        networks: The names of the networks that are trained, in order.
        input_config: What images are made into.
        batches_per_epoch: Training batches of a process in an epoch.
    """
    size = " x ".join(map(str, (input_config.channels, *input_config.image_size)))
    exits = ", ".join(f"{point.name} ({100 * point.cost:.0f} % of the cost)" for point in model.points)
    whole, plain = (sum(each.numel() for each in part.parameters()) for part in (model, model.backbone))
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    processes = accelerator.num_processes
    epochs, steps = recipe.epochs + recipe.schedule.cooldown_epochs, batches_per_epoch // recipe.optimizer.accumulate
    return [
        f"model   {recipe.model.name}, {with_prefix(plain)} parameters, {with_prefix(whole)} with exits",
        f"exits   {exits}",
        f"data    {data.name}: {_images(data.train)} training images, {_images(data.validation)} held out, "
        f"{_images(data.eval)} to report on; {model.num_classes} classes, {size} pixels",
        f"device  {device_name(accelerator.device)}, {precision}"
        + (f", {processes} processes" if processes > 1 else ""),
        f"plan    {' and '.join(networks)}: {epochs} epochs of {steps} steps, batches of {recipe.batch_size}",
        f"output  {recipe.output_dir}",
    ]


def _images(split: ImageSplit | StreamSplit | None) -> str:
    """Return how many images a split has, as far as it is known."""
    if split is None:
        return "no"
    count = len(split.indices) if isinstance(split, ImageSplit) else split.size
    return "an unknown number of" if count is None else f"{count:,}"
