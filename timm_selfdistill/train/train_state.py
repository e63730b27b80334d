"""What a run needs to go on: its progress, the state of all that trains, and the checkpoint to start from."""

import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.task import SelfDistillationTask
from timm_selfdistill.train.checkpoint import latest_checkpoint, load_checkpoint
from timm_selfdistill.train.parallelism import Parallelism
from timm_selfdistill.train.tracking import JsonLinesTracker

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a network's training has come, over all phases; saved with each checkpoint."""

    phase: int = 0  # index of the present phase
    epoch: int = 0  # epochs done
    micro: int = 0  # micro batches done in the present epoch
    step: int = 0  # optimizer steps done, skipped ones included
    first_epoch: int = 0  # epochs done before the present phase
    first_step: int = 0  # steps done before it
    seconds: float = 0.0  # time spent on training steps
    skipped: int = 0  # steps in a row, up to the last, whose loss was not finite
    logged: int = 0  # lines of metrics.jsonl written
    running: dict[str, Any] | None = None  # sums of the terms since the last of these lines
    best_top1: float = -1.0  # on the validation images, in percent
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class PhaseState:
    """What a checkpoint holds of a phase beside the progress: weights, loss, optimizer, schedule, random states."""

    def __init__(
        self,
        model: SelfDistillModel,
        task: SelfDistillationTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        parallelism: Parallelism,
    ) -> None:
        self.parallelism = parallelism
        self.accelerator = parallelism.accelerator
        ema = task.get_trainable_module(ema=True) if task.has_ema() else None
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "past": task.past}
        parts["scaler"] = self.accelerator.scaler
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.loss, self.gate = task.get_submodule("criterion"), model.gate

    def capture(self) -> dict[str, Any]:
        """Return the state of every part, and of all processes the random states and the loss's.

        A loss may have seen other images in each process. All processes call it together; only the main process may
        use what is returned.
        """
        random_state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}),
            "heads": {kind: state.cpu() for kind, state in self.gate.random.items()},
        }
        of_processes = {"random": gather_object([random_state])}
        if state := self.loss.state_dict():
            on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
            of_processes["loss"] = gather_object([on_cpu])
        parts = {name: self.parallelism.state_dict(part) for name, part in self.parts.items()}
        return {**of_processes, "in_parts": self.parallelism.in_parts, **parts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Load the state of every part; of the loss only its parameters if there were other processes."""
        for name, part in self.parts.items():
            self.parallelism.load_state_dict(part, saved[name])
        if not self.loss.state_dict():
            return
        if len(saved["loss"]) == self.accelerator.num_processes:
            self.loss.load_state_dict(saved["loss"][self.accelerator.process_index])
        else:
            # These are the same in all processes, and what the optimizer remembers is about them.
            own = {name: saved["loss"][0][name] for name, _ in self.loss.named_parameters()}
            self.loss.load_state_dict(own, strict=False)

    def restore_random(self, saved: dict[str, Any]) -> None:
        """Load the random state of this process, if there are as many as when it was saved."""
        if len(saved["random"]) != self.accelerator.num_processes:
            return
        state = saved["random"][self.accelerator.process_index]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        self.gate.random = state.get("heads", {})
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def find_checkpoint(resume: str, checkpoints: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the state of the checkpoint to go on from, or None to start afresh; drop what was logged after it.

    All processes call it together. The network's folder of checkpoints has its name.
    """
    path = None if resume == "never" else _choose(resume, checkpoints, accelerator)
    saved = None if path is None else load_checkpoint(path)
    if saved is not None and accelerator.is_main_process:
        _logger.warning("Resuming %s from %s.", checkpoints.name, path)
    tracker = accelerator.get_tracker("jsonl")
    if isinstance(tracker, JsonLinesTracker):
        tracker.keep(checkpoints.name, 0 if saved is None else saved["progress"]["logged"])
    return saved


def _choose(resume: str, checkpoints: Path, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to go on from, the same in all processes, or None."""
    # A checkpoint that is named belongs to one of the run's networks; the others go on from their newest.
    named = None if resume == "auto" else Path(resume)
    newest = latest_checkpoint(checkpoints)
    path = named if named is not None and named.parent.name == checkpoints.name else newest
    if path is not None and newest is not None and path.resolve() != newest.resolve():
        raise ValueError(
            f"resume: {path} is older than {newest}, which would be lost: move the later checkpoints away, or copy "
            "the run to another output_dir."
        )
    found = gather_object([None if path is None else path.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"resume: the processes do not see the same checkpoints of {checkpoints.name} ({found}): output_dir must "
            "be on storage that all machines share."
        )
    return path
