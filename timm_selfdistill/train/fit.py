"""The only training loop."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.checkpoint import CheckpointError
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import SelfDistillationTask, unwrapped_model
from timm_selfdistill.train.agreement import Agreement
from timm_selfdistill.train.batch_norm import share_buffers
from timm_selfdistill.train.evaluation import evaluate_model
from timm_selfdistill.train.feed import Feed
from timm_selfdistill.train.guard import LossGuard
from timm_selfdistill.train.optim import build_optimizer, build_scheduler
from timm_selfdistill.train.parallel import Parallelism
from timm_selfdistill.train.phases import Phase
from timm_selfdistill.train.progress import Progress
from timm_selfdistill.train.resume import find_checkpoint
from timm_selfdistill.train.run_folder import CHECKPOINTS
from timm_selfdistill.train.run_record import ENTRY, RunRecord
from timm_selfdistill.train.running import RunningTerms
from timm_selfdistill.train.state import PhaseState
from timm_selfdistill.train.writer import CheckpointWriter

_logger = logging.getLogger(__name__)

_LOG_INTERVAL = 20  # optimizer steps between two lines of metrics.jsonl


@dataclass
class _Training:
    """What takes the steps of a phase.

    Args:
        prepared: The task, its network spread over the processes.
        task: The task.
        optimizer: The optimizer as Accelerate prepared it.
        scheduler: timm's scheduler, or None.
        state: What a checkpoint holds of it.
        epochs: Epochs of the phase.
        rate: The learning rate of the last step.
    """

    prepared: nn.Module
    task: SelfDistillationTask
    optimizer: Any
    scheduler: Any
    state: PhaseState
    epochs: int
    rate: float = 0.0


class Fit:
    """Train one network through its phases, saving checkpoints from which a run goes on as if nothing had happened.

    Args:
        name: Name of the network in logs and checkpoints, such as "self-distilled".
        model: The wrapped model, on the accelerator's device.
        phases: What to train, in order.
        feed: The data.
        recipe: The recipe.
        parallelism: How the network is spread over the processes.
        folder: The run's folder; checkpoints go to `checkpoints/<name>` in it.
        record: What the run is, which each checkpoint tells.
        signals: Tells when to stop.
        on_epoch: Called after every epoch with the model as it would be evaluated, the number of epochs done and that
            of all; given to all processes or to none.
    """

    def __init__(
        self,
        name: str,
        model: SelfDistillModel,
        phases: Sequence[Phase],
        feed: Feed,
        recipe: Recipe,
        parallelism: Parallelism,
        folder: Path,
        record: RunRecord,
        signals: StopSignals,
        on_epoch: Callable[[SelfDistillModel, int, int], None] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.phases = phases
        self.feed = feed
        self.recipe = recipe
        self.parallelism = parallelism
        self.accelerator = accelerator = parallelism.accelerator
        self.folder = folder
        self.record = record
        self.signals = signals
        self.on_epoch = on_epoch
        self.checkpoints = folder / CHECKPOINTS / name
        self.progress = Progress()
        self.agreement = Agreement(accelerator, at_once=recipe.optimizer.on_nonfinite == "skip")
        self.guard = LossGuard(name, feed, recipe, folder, accelerator.process_index)
        self.total_epochs = sum(phase.epochs for phase in phases) + recipe.schedule.cooldown_epochs
        self.updates_per_epoch = feed.steps_per_epoch // recipe.optimizer.accumulate
        self.writer = CheckpointWriter(self.checkpoints, recipe.checkpoint.keep)
        self._saved_epoch, self._saved_step = -1, -1
        if self.updates_per_epoch < 1:
            raise ValueError(
                f"optimizer.accumulate: {recipe.optimizer.accumulate} micro batches make one step, but an epoch has "
                f"only {feed.steps_per_epoch}."
            )

    def run(self) -> SelfDistillModel:
        """Train to the end, from the newest checkpoint if there is one, and return the trained model.

        Raises:
            Interrupted: If a signal stops it; what was trained is saved.
            NonFiniteLossError: If the loss is no number and the recipe does not skip such steps.
            CheckpointError: If a checkpoint cannot be used.
            OSError: If a signal stops it and the last checkpoint cannot be written.
        """
        saved = find_checkpoint(self.recipe.resume, self.checkpoints, self.accelerator)
        if saved is not None:
            self.progress = Progress(**saved["progress"])
            self._saved_epoch, self._saved_step = self.progress.epoch, self.progress.step
            self._compare_processes(len(saved["random"]), saved.get("in_parts", False))
        result = self.model
        try:
            for index, phase in enumerate(self.phases):
                if index >= self.progress.phase:
                    result = self._run_phase(index, phase, saved)
                    saved = None
        finally:
            try:
                self.writer.close()
            except OSError as error:
                # What was trained is in memory, and the model needs less room than a checkpoint.
                _logger.warning("%s. If training is done, the model is saved all the same.", error)
        if self.progress.best_weights:
            result.load_state_dict(self.progress.best_weights)
        return result.eval()

    def _run_phase(self, index: int, phase: Phase, saved: dict[str, Any] | None) -> SelfDistillModel:
        """Train one phase, from what was saved in it if anything, and return the model or its average."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        self.model = self.parallelism.whole(self.model)
        task = SelfDistillationTask(self.model, phase.loss, phase.regime, device=accelerator.device, verbose=False)
        if recipe.compile:
            task.compile()
        prepared = self.parallelism.prepare(task, recipe.ema)
        optimizer = build_optimizer(self.model, phase.loss, recipe)
        cooldown = recipe.schedule.cooldown_epochs if phase is self.phases[-1] else 0
        scheduler, epochs = build_scheduler(optimizer, recipe, phase.epochs, cooldown, self.updates_per_epoch)
        self.feed.arrange(task.needs.batches)
        state = PhaseState(self.model, task, optimizer, scheduler, self.parallelism)
        training = _Training(prepared, task, accelerator.prepare(optimizer), scheduler, state, epochs)
        if saved is not None:
            self._restore(state, saved)
        else:
            progress.phase, progress.first_epoch, progress.first_step = index, progress.epoch, progress.step
        while progress.epoch - progress.first_epoch < epochs:
            start = time.monotonic()
            with self.signals.deferred():
                stopped = self._train_epoch(training, saved)
                saved = None
                progress.seconds += time.monotonic() - start
                # Before the validation, which a resumed run repeats: a signal may then end it at once.
                self._save(state)
            self._stop_if_asked(stopped)
            metrics = self._validate(task, phase)
            if metrics is not None:
                self._log("validation", _flatten(metrics))
            progress.epoch, progress.micro, progress.running = progress.epoch + 1, 0, None
            if scheduler is not None:
                scheduler.step(progress.epoch - progress.first_epoch)
            if self.on_epoch is not None:
                self.on_epoch(self._trained(task), progress.epoch, self.total_epochs)
        if phase is self.phases[-1]:
            # With what the last validation found: a network that is done is not validated again.
            with self.signals.deferred():
                self._save(state)
            self._stop_if_asked(False)
        return self._trained(task)

    def _restore(self, state: PhaseState, saved: dict[str, Any]) -> None:
        """Load what was saved of a phase."""
        try:
            state.restore(saved)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CheckpointError(
                f"The checkpoint of step {self.progress.step} in {self.checkpoints} is not one of this network "
                f"({'; '.join(lines[:2])})."
            ) from error

    def _trained(self, task: SelfDistillationTask) -> SelfDistillModel:
        """Return the model or its average, with all its weights."""
        return self.parallelism.whole(unwrapped_model(task.get_trainable_module(ema=self.recipe.ema is not None)))

    def _stop_if_asked(self, stopped: bool) -> None:
        """End the run, with everything saved, if a signal stopped the steps or came since."""
        if stopped or self.signals.received is not None:
            self.writer.finish()
            if stopped:
                # All of them stop: a launcher kills the others soon after the first has ended.
                self.accelerator.wait_for_everyone()
            raise self.signals.interruption()

    def _train_epoch(self, training: _Training, saved: dict[str, Any] | None) -> bool:
        """Take the optimizer steps that are left of one epoch; return whether a signal ended it before."""
        progress, accumulate = self.progress, self.recipe.optimizer.accumulate
        training.prepared.train()
        title = f"{self.name} {progress.epoch + 1}/{self.total_epochs}"
        done = progress.micro // accumulate
        running = RunningTerms(title, self.updates_per_epoch, done, self.recipe.batch_size, self.accelerator)
        if progress.running is not None:
            running.load_state_dict(progress.running)
        left = self.updates_per_epoch - done
        batches = self.feed.batches(progress.epoch, progress.micro) if left else iter(())
        if saved is not None:
            # Last of all, as finding the place in a stream draws random numbers.
            training.state.restore_random(saved)
        stopped = any(self._step(training, running, batches) for _ in range(left))
        stopped |= self._settle()
        progress.running = running.state_dict()
        running.close()
        return stopped

    def _step(self, training: _Training, running: RunningTerms, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """Take one optimizer step; return whether all processes are to stop behind it."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        accumulate, optimizer = recipe.optimizer.accumulate, training.optimizer
        memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
        skipping = recipe.optimizer.on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self.model.buffers()] if skipping else []
        done = progress.micro / (self.updates_per_epoch * accumulate)
        training.task.set_time(progress.epoch - progress.first_epoch + done, training.epochs)
        parts: list[dict[str, Tensor]] = []
        for micro in range(accumulate):
            images, targets = next(batches)
            images = images.to(accelerator.device, memory_format=memory_format)
            targets = targets.to(accelerator.device)
            if self.feed.mixup is not None:
                images, targets = self.feed.mixup(images, targets)
            with self.parallelism.micro_step(training.prepared, first=micro == 0, last=micro + 1 == accumulate):
                terms = training.prepared(images, targets)
                accelerator.backward(terms["loss"] / accumulate)
            parts.append({name: value.detach() for name, value in terms.items() if name != "output"})
        progress.micro += accumulate
        progress.step += 1
        bad = ~torch.stack([part["loss"] for part in parts]).isfinite().all()
        verdict = self.agreement.ask(progress.step, self.signals.received is not None, bad)
        stop = verdict is not None and verdict.stop
        if self.guard.judge(verdict, progress):
            optimizer.zero_grad()
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        else:
            self._update(training)
            running.add(parts)
        if training.scheduler is not None:
            training.scheduler.step_update(progress.step - progress.first_step)
        running.advance()
        is_last = running.updates == self.updates_per_epoch
        if progress.step % _LOG_INTERVAL == 0 or is_last:
            self._log("train", running.read() | {"lr": training.rate})
        every = recipe.checkpoint.every_steps
        if every is not None and progress.step % every == 0 and not is_last:
            stop |= self._settle()
            progress.running = running.state_dict()
            self._save(training.state)
        return stop

    def _settle(self) -> bool:
        """Learn what is not known yet about the last step; return whether all processes are to stop."""
        verdict = self.agreement.settle()
        self.guard.judge(verdict, self.progress)
        return verdict is not None and verdict.stop

    def _update(self, training: _Training) -> None:
        """Let the optimizer take its step."""
        recipe, optimizer = self.recipe, training.optimizer
        if recipe.optimizer.clip_grad is not None:
            self.accelerator.unscale_gradients(optimizer)
            mode = recipe.optimizer.clip_mode
            parameters = training.task.get_clip_parameters(exclude_head=mode == "agc")
            self.parallelism.clip(parameters, recipe.optimizer.clip_grad, mode)
        training.rate = max(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        if training.task.needs.ema or training.task.needs.past:
            # So that the average or the past model, here a teacher, is the same in every process.
            share_buffers(self.model, self.accelerator)
        training.task.update_ema(self.progress.step)

    def _validate(self, task: SelfDistillationTask, phase: Phase) -> ExitMetricsResult | None:
        """Evaluate on the validation split, if there is one, and remember the weights if they are the best so far."""
        eval_model = task.get_eval_model(ema=self.recipe.ema is not None)
        model = unwrapped_model(eval_model)
        share_buffers(model, self.accelerator)
        if self.feed.validation is None or eval_model is None:
            return None
        num_exits = model.num_exits if task.needs_exits else 0
        metrics = evaluate_model(
            eval_model,
            self.feed.validation,
            self.accelerator,
            num_exits=num_exits,
            gather=not self.feed.streaming,
            title="validate",
        )
        top1 = metrics["exits"][-1]["top1"]
        is_last_phase = phase is self.phases[-1]
        if self.recipe.schedule.select == "best" and is_last_phase and top1 > self.progress.best_top1:
            self.progress.best_top1 = top1
            weights = self.parallelism.whole(model).state_dict()
            self.progress.best_weights = {key: value.cpu().clone() for key, value in weights.items()}
        return metrics

    def _save(self, state: PhaseState) -> None:
        """Begin to write a checkpoint, on the main process, unless nothing has changed since the last."""
        progress = self.progress
        if (progress.epoch, progress.step) == (self._saved_epoch, self._saved_step):
            return
        self._saved_epoch, self._saved_step = progress.epoch, progress.step
        # Behind the last step of an epoch, whose validation is still to come.
        is_last = progress.micro >= self.updates_per_epoch * self.recipe.optimizer.accumulate
        record = replace(self.record, epochs_done=progress.epoch + is_last, epochs=self.total_epochs)
        captured = {ENTRY: record.to_json(), "progress": vars(progress), **state.capture()}
        if self.accelerator.is_main_process:
            self.writer.save(captured, progress.step)

    def _compare_processes(self, before: int, were_in_parts: bool) -> None:
        """Say what other processes change, and leave an epoch of a stream that cannot be entered again."""
        now, are_in_parts = self.accelerator.num_processes, self.parallelism.in_parts
        if (before, were_in_parts) == (now, are_in_parts):
            return
        where = f"behind step {self.progress.step}, with the images that are left of the epoch"
        if self.feed.streaming and before != now:
            self.progress.leave_epoch(self.updates_per_epoch, self.recipe.optimizer.accumulate)
            where = f"at the end of epoch {self.progress.epoch + 1}, as the shares of the stream are others"
        if self.accelerator.is_main_process:
            _logger.warning(
                "%s was trained by %d process(es)%s and goes on with %d%s, %s. It will not end in the same bits as an "
                "undisturbed run: dropout, Mixup, batch statistics and the order of sums depend on the processes.",
                self.name,
                before,
                " in parts" * were_in_parts,
                now,
                " in parts" * are_in_parts,
                where,
            )

    def _log(self, kind: str, values: dict[str, float]) -> None:
        """Give the trackers the values of the present epoch, under names that no other network has."""
        progress = self.progress
        named = {f"{self.name}/{kind}/{name}": value for name, value in values.items()}
        self.accelerator.log({f"{self.name}/epoch": progress.epoch + 1, **named}, step=progress.step)
        progress.logged += 1


def _flatten(metrics: ExitMetricsResult) -> dict[str, float]:
    """Return the metrics under names such as "top1/0" and "top1/ensemble", and how many images were skipped."""
    outputs = {str(index): dict(output) for index, output in enumerate(metrics["exits"])}
    if metrics["ensemble"] is not None:
        outputs["ensemble"] = dict(metrics["ensemble"])
    flat = {f"{name}/{key}": value for key, output in outputs.items() for name, value in output.items()}
    return {**flat, "num_skipped": metrics["num_skipped"]}  # type: ignore[dict-item]
