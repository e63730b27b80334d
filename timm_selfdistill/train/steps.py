"""The steps of a phase: gradients, update, what all processes must know of a step, and losses that are not finite."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.program import NonFiniteLossError
from timm_selfdistill.progress import progress_bar
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import SelfDistillationTask, unscaled_rate
from timm_selfdistill.train.builders import Feed, build_optimizer, build_scheduler
from timm_selfdistill.train.parallelism import Parallelism, share_buffers
from timm_selfdistill.train.phases import Phase
from timm_selfdistill.train.run_folder import NONFINITE, RunRecord
from timm_selfdistill.train.train_state import PhaseState, Progress

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


@dataclass(frozen=True)
class StepFlags:
    """What counts for all processes if it is so in one of them."""

    step: int
    stop: bool  # whether a process is to stop
    nonfinite: bool  # whether the loss of a process was not finite
    nonfinite_here: bool  # whether the loss of this process was not finite


class FlagExchange:
    """Exchanges the flags of each step between the processes.

    On a CPU the answer is about the step itself. On other devices it is about the step before, so that no process waits
    for the device, unless `at_once`.
    """

    def __init__(self, accelerator: Accelerator, at_once: bool = False) -> None:
        self._device = accelerator.device
        self._alone = accelerator.num_processes == 1
        self._at_once = at_once or accelerator.device.type == "cpu"
        self._pending: tuple[int, Tensor, Tensor, Any] | None = None

    def exchange(self, step: int, stop: bool, nonfinite: Tensor) -> StepFlags | None:
        """Send the flags of a step, and return what is known; `nonfinite` is a tensor of one bool."""
        before = None if self._at_once else self.receive()
        mine = torch.stack([torch.tensor(stop, device=self._device), nonfinite]).to(torch.int32)
        everybody = mine.clone()
        handle = None
        if not self._alone:
            handle = torch.distributed.all_reduce(everybody, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = step, mine, everybody, handle
        return self.receive() if self._at_once else before

    def receive(self) -> StepFlags | None:
        """Wait for the flags of the last step, and return them, unless they were returned before."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, mine, everybody, handle = pending
        if handle is not None:
            handle.wait()
        stop, nonfinite = everybody.tolist()
        return StepFlags(step, bool(stop), bool(nonfinite), bool(mine[1]))


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


class RunningTerms:
    """The progress bar and the running means of one epoch's terms, read rarely because reading waits for the GPU."""

    def __init__(
        self,
        title: str,
        updates: int,
        done: int,
        saved: dict[str, Any] | None,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        self.bar = progress_bar(title=title, show=accelerator.is_main_process, total=updates, initial=done, unit="step")
        self.updates = self._done_before = done
        sums = {} if saved is None else saved["sums"]
        self._sums: dict[str, Tensor] = {name: total.to(accelerator.device) for name, total in sums.items()}
        self._count: int = 0 if saved is None else saved["count"]
        self._batch_size, self._start = batch_size, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading, which the next one of the run may go on from."""
        return {"sums": self._sums, "count": self._count}

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """Add the terms of the micro batches of a step, detached."""
        for terms in parts:
            self._count += 1
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def read(self) -> dict[str, float]:
        """Return the mean of every term since the last reading, and images per second since the bar began."""
        values = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        rate = (self.updates - self._done_before) * self._batch_size / (time.monotonic() - self._start)
        self.bar.set_postfix({"loss": f"{values.get('loss', 0):.3g}", "img/s": f"{rate:.0f}"})
        return values | {"images_per_second": rate}

    def advance(self) -> None:
        """Count one optimizer step."""
        self.updates += 1
        self.bar.update()
