"""Start Accelerate for a recipe, and refuse launches that would silently do something else."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import DistributedType, DynamoBackend, patch_environment
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DataLoader, DistributedSampler

from timm_selfdistill.files import replace_file
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train.sharding import asks_for_sharding, refuse_optimizer

_logger = logging.getLogger(__name__)

# What hands each process its share of the data, which Accelerate does already.
_SHARDING_SAMPLERS = (DistributedSampler, OrderedDistributedSampler, RepeatAugSampler)
# What leaves each process with a part of the network, in ways that the loop does not know.
_UNKNOWN_PARTS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class JsonLinesTracker(GeneralTracker):  # type: ignore[misc]
    """Appends each set of logged values to a file, as one JSON object a line.

    Args:
        path: The file; its folder is made when the first line is written.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: the recipe is saved beside the file."""

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Append one line, which tells the network and the epoch under keys of their own too.

        Args:
            values: Values by "NETWORK/NAME", "NETWORK/epoch" among them.
            step: Optimizer steps that the network has taken.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        network = next(iter(values)).partition("/")[0]
        epoch = values[f"{network}/epoch"]
        others = {name: value for name, value in values.items() if name != f"{network}/epoch"}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "network": network, "epoch": epoch, **others}) + "\n")

    @on_main_process  # type: ignore[untyped-decorator]
    def keep(self, network: str, count: int) -> None:
        """Keep the first lines of a network only: those behind a checkpoint, a resumed run will write again.

        Args:
            network: Name of the network.
            count: How many lines it had written at the checkpoint.
        """
        if not self.path.is_file():
            return
        lines, seen = [], 0
        for line in self.path.read_text().splitlines():
            owner = _network_of(line)
            seen += owner == network
            if owner is not None and not (owner == network and seen > count):
                lines.append(line)
        replace_file(self.path, "".join(f"{line}\n" for line in lines).encode())


def start_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Return the accelerator of a run, its trackers not yet started.

    Args:
        recipe: The recipe.
        folder: The run's folder.

    Raises:
        ValueError: If the launch, precision or a tracker would not do what was asked.
    """
    available = sorted(str(name) for name in get_available_trackers())
    missing = [name for name in recipe.trackers if name not in available]
    if missing:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(
            f"trackers: {', '.join(missing)} cannot be used: unknown, or the package is not installed. "
            f"Installed are {', '.join(available) or 'none'}; Accelerate knows {known}. "
            "metrics.jsonl is always written."
        )
    sharding = asks_for_sharding()
    _join_again()
    # Sharding is not Accelerate's: see `sharding`.
    with patch_environment(accelerate_use_fsdp="false"):
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            log_with=[JsonLinesTracker(folder / "metrics.jsonl"), *recipe.trackers],
            project_dir=str(folder),
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate joined {accelerator.num_processes}: each would train "
            "alone and write over the others. On CPU, launch with ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N."
        )
    if accelerator.distributed_type in _UNKNOWN_PARTS:
        raise ValueError(
            f"Accelerate was told to use {accelerator.distributed_type.value}, which leaves each process with a part "
            "of the network; allowed are distributed_type MULTI_GPU, NO for one process, and FSDP with fsdp_version 2."
        )
    if sharding and accelerator.num_processes > 1:
        refuse_optimizer(recipe.optimizer.name)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerate was told to accumulate {accelerator.gradient_accumulation_steps} steps, which would divide "
            "the loss a second time: leave that to the recipe's optimizer.accumulate."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("Accelerate was told to compile (dynamo_backend): leave that to the recipe's compile: true.")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision: fp16 does nothing on a CPU; allowed there are no and bf16.")
    if recipe.precision == "bf16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision: this GPU cannot compute in bf16; allowed are no and fp16.")
    if recipe.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ValueError(
            f"sync_batchnorm: torch synchronises batch norm on GPUs only, received {accelerator.num_processes} "
            "processes on the CPU; allowed there is false."
        )
    return accelerator


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Let the body start Accelerate as if nothing in this process had done so, and put the former state back.

    Accelerate keeps precision and device for all of a process, and refuses others: each run in a notebook has its own.
    Processes that were launched together stay together.
    """
    states: list[Any] = [AcceleratorState, GradientState]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.distributed.is_initialized():
        states.append(PartialState)
    former = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, former, strict=True):
            if values:
                state._shared_state.clear()
                state._shared_state.update(values)


def refuse_sharding_loader(loader: object) -> None:
    """Refuse a loader that Accelerate would pass on as it is, or that is sharded already.

    Raises:
        ValueError: If processes would all see all data, or each a share of its share.
    """
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


def per_process_batch(recipe: Recipe, num_processes: int) -> int:
    """Return how many samples each process takes in a micro step.

    Raises:
        ValueError: If the global batch does not divide evenly.
    """
    parts = num_processes * recipe.optimizer.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size: {recipe.batch_size} cannot be divided over {num_processes} processes with "
            f"optimizer.accumulate={recipe.optimizer.accumulate}; allowed are multiples of {parts}."
        )
    return recipe.batch_size // parts


def _join_again() -> None:
    """Let the processes of a restarted launch find one another, not their predecessors.

    The launcher's store outlives a restart, and torch looks there under the same names: a process that reads the
    address of one that is gone fails or waits for ever.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if attempt == 0 or alone or torch.distributed.is_initialized():
        return
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=torch.distributed.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
    )


def _network_of(line: str) -> str | None:
    """Return whose line it is, or None if it was torn by a kill in the middle of writing."""
    try:
        return str(json.loads(line)["network"])
    except (json.JSONDecodeError, LookupError, TypeError):
        return None
