"""The steps of a phase: gradients and updates, losses that are not finite, and what a run needs to go on."""

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.program import NonFiniteLossError
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import SelfDistillationTask, unscaled_rate
from timm_selfdistill.train.builders import Phase, build_optimizer, build_scheduler
from timm_selfdistill.train.checkpoint import latest_checkpoint, load_checkpoint
from timm_selfdistill.train.launch import Feed
from timm_selfdistill.train.parallelism import Parallelism, StepFlags, share_buffers
from timm_selfdistill.train.run_folder import NONFINITE, RunRecord
from timm_selfdistill.train.tracking import JsonLinesTracker

_logger = logging.getLogger(__name__)

_MAX_SKIPS = 20  # in a row; skipping more cannot help


@dataclass(frozen=True)
class RunContext:
    """What the networks of a run share."""

    recipe: Recipe
    folder: Path
    record: RunRecord  # each checkpoint holds it
    feed: Feed
    parallelism: Parallelism
    signals: StopSignals

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator."""
        return self.parallelism.accelerator


class PhaseStepper:
    """Takes the optimizer steps of a phase; the model it is given is whole and on the device."""

    def __init__(
        self, model: SelfDistillModel, phase: Phase, context: RunContext, cooldown_epochs: int, updates_per_epoch: int
    ) -> None:
        recipe, accelerator, parallelism = context.recipe, context.accelerator, context.parallelism
        self.context, self.model = context, model
        self.task = SelfDistillationTask(
            model, phase.loss, phase.regime, phase.teacher, device=accelerator.device, verbose=False
        )
        if recipe.compile:
            self.task.compile()
        self.prepared = parallelism.prepare(self.task, recipe.ema)
        optimizer = build_optimizer(model, phase.loss, recipe)
        self.scheduler, self.epochs = build_scheduler(
            optimizer, recipe, phase.epochs, cooldown_epochs, updates_per_epoch
        )
        context.feed.arrange(self.task.needs.batches)
        self.state = PhaseState(model, self.task, optimizer, self.scheduler, parallelism)
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.rate = 0.0  # the learning rate of the last step

    def backward(self, batches: Iterator[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        """Compute the gradients of one optimizer step, and return the terms of each micro batch, detached."""
        recipe, accelerator, mixup = self.context.recipe, self.context.accelerator, self.context.feed.mixup
        accumulate = recipe.optimizer.accumulate
        memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
        parts: list[dict[str, Tensor]] = []
        for micro in range(accumulate):
            images, targets = next(batches)
            images = images.to(accelerator.device, memory_format=memory_format)
            targets = targets.to(accelerator.device)
            if mixup is not None:
                images, targets = mixup(images, targets)
            last = micro + 1 == accumulate
            with self.context.parallelism.micro_step(self.prepared, first=micro == 0, last=last):
                terms = self.prepared(images, targets)
                accelerator.backward(terms["loss"] / accumulate)
            parts.append({name: value.detach() for name, value in terms.items() if name != "output"})
        return parts

    def update(self, step: int) -> None:
        """Let the optimizer take its step, the one of this number."""
        section = self.context.recipe.optimizer
        if section.clip_grad is not None:
            self.context.accelerator.unscale_gradients(self.optimizer)
            for parameters in self.task.get_clip_groups(exclude_head=section.clip_mode == "agc"):
                self.context.parallelism.clip(parameters, section.clip_grad, section.clip_mode)
        self.rate = unscaled_rate(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.task.needs.ema or self.task.needs.past:
            # So that the average or the past model, here a teacher, is the same in every process.
            share_buffers(self.model, self.context.accelerator)
        self.task.update_ema(step)

    def skip(self, buffers: list[Tensor]) -> None:
        """Drop the gradients, and put back the values that the buffers had before the step."""
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)


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


class NonFiniteGuard:
    """Stops a run, or skips a step, if the loss is not finite, and writes down which images were in the batch."""

    def __init__(self, context: RunContext, network: str) -> None:
        self._context, self._network = context, network
        self._path = context.folder / NONFINITE
        self.skips = context.recipe.optimizer.on_nonfinite == "skip"

    def must_skip(self, flags: StepFlags | None, progress: Progress) -> bool:
        """Return whether to skip the step that the flags are about, or raise `NonFiniteLossError`."""
        if flags is None:
            return False
        if not flags.nonfinite:
            progress.skipped = 0
            return False
        progress.skipped += 1
        if flags.nonfinite_here:
            self._write(flags, progress)
        at = f"{self._network}, epoch {progress.epoch + 1}, step {flags.step}"
        if not self.skips:
            raise NonFiniteLossError(
                f"The loss is not finite ({at}); {self._path} lists the rows of the batch. A smaller optimizer.lr, "
                "optimizer.clip_grad or precision=no may help; optimizer.on_nonfinite=skip leaves such steps out. The "
                "checkpoints before it are kept."
            )
        if progress.skipped == _MAX_SKIPS:
            raise NonFiniteLossError(
                f"The loss was not finite in {progress.skipped} steps in a row ({at}), where skipping does not help; "
                f"{self._path} lists the rows of the batches. The checkpoints before them are kept."
            )
        _logger.warning("Skipped a step, as the loss is not finite (%s).", at)
        return True

    def _write(self, flags: StepFlags, progress: Progress) -> None:
        accumulate = self._context.recipe.optimizer.accumulate
        first = progress.micro - (progress.step - flags.step + 1) * accumulate
        batches = [self._context.feed.rows(progress.epoch, first + micro) for micro in range(accumulate)]
        entry = {
            "network": self._network,
            "epoch": progress.epoch + 1,
            "step": flags.step,
            "process": self._context.accelerator.process_index,
            "rows": None if None in batches else [row for batch in batches for row in batch or ()],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def find_checkpoint(resume: str, checkpoints: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the state of the checkpoint to go on from, or None to start afresh; drop what was logged after it.

    All processes call it together. The folder of a network's checkpoints has its name.
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
