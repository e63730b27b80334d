"""The only training loop."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.output import duration, tell
from timm_selfdistill.task import SelfDistillationTask, unwrapped_model
from timm_selfdistill.train.builders import Phase
from timm_selfdistill.train.checkpoint import CheckpointWriter
from timm_selfdistill.train.checkpoint_format import CheckpointError
from timm_selfdistill.train.evaluation import evaluate_model
from timm_selfdistill.train.parallelism import FlagExchange, share_buffers
from timm_selfdistill.train.run_folder import CHECKPOINTS, RECORD_KEY
from timm_selfdistill.train.steps import NonFiniteGuard, PhaseState, PhaseStepper, Progress, RunContext, find_checkpoint
from timm_selfdistill.train.tracking import RunningTerms

_logger = logging.getLogger(__name__)

_LOG_INTERVAL = 20  # optimizer steps between two lines of metrics.jsonl


class Trainer:
    """Trains one network through its phases, saving checkpoints from which a run goes on as if nothing had happened.

    `on_epoch` is called after every epoch with the model that would be evaluated, the number of epochs done and that of
    all; it is given to all processes or to none. `first_step` is how many steps the networks before it take.
    """

    def __init__(
        self,
        context: RunContext,
        name: str,
        model: SelfDistillModel,
        phases: Sequence[Phase],
        on_epoch: Callable[[SelfDistillModel, int, int], None] | None = None,
        first_step: int = 0,
    ) -> None:
        self.context, self.name, self.model, self.phases, self.on_epoch = context, name, model, phases, on_epoch
        self.first_step = first_step
        self.progress = Progress()
        self._shown: dict[str, float] = {}  # the newest terms
        self._seconds: list[float] = []  # of the epochs of this process
        self.guard = NonFiniteGuard(context, name)
        self.flags = FlagExchange(context.accelerator, at_once=self.guard.skips)
        self.checkpoints = context.folder / CHECKPOINTS / name
        self.writer = CheckpointWriter(self.checkpoints, context.recipe.checkpoint.keep)
        self._saved = (-1, -1)  # epoch and step of the newest checkpoint
        self.total_epochs = sum(phase.epochs for phase in phases) + context.recipe.schedule.cooldown_epochs
        self.accumulate = context.recipe.optimizer.accumulate
        self.updates_per_epoch = context.feed.steps_per_epoch // self.accumulate
        if self.updates_per_epoch < 1:
            raise ValueError(
                f"optimizer.accumulate: {self.accumulate} micro batches make one step, but an epoch has only "
                f"{context.feed.steps_per_epoch}."
            )

    def run(self) -> SelfDistillModel:
        """Train to the end, from the newest checkpoint if there is one, and return the trained model."""
        saved = find_checkpoint(self.context.recipe.resume, self.checkpoints, self.context.accelerator)
        if saved is not None:
            self.progress = Progress(**saved["progress"])
            self._saved = (self.progress.epoch, self.progress.step)
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
        progress, signals, is_last = self.progress, self.context.signals, phase is self.phases[-1]
        self.model = self.context.parallelism.whole(self.model)
        cooldown = self.context.recipe.schedule.cooldown_epochs if is_last else 0
        stepper = PhaseStepper(self.model, phase, self.context, cooldown, self.updates_per_epoch)
        if saved is not None:
            self._restore(stepper.state, saved)
        else:
            progress.phase, progress.first_epoch, progress.first_step = index, progress.epoch, progress.step
        while progress.epoch - progress.first_epoch < stepper.epochs:
            start = time.monotonic()
            with signals.deferred():
                stopped = self._train_epoch(stepper, saved)
                saved = None
                progress.seconds += time.monotonic() - start
                # Before the validation, which a resumed run repeats: a signal may then end it at once.
                self._save(stepper.state)
            self._stop_if_asked(stopped)
            metrics = self._validate(stepper.task, is_last)
            if metrics is not None:
                self._log("validation", _flatten(metrics))
            progress.epoch, progress.micro, progress.running = progress.epoch + 1, 0, None
            self._tell_epoch(metrics, time.monotonic() - start)
            if stepper.scheduler is not None:
                stepper.scheduler.step(progress.epoch - progress.first_epoch)
            if self.on_epoch is not None:
                self.on_epoch(self._trained(stepper.task), progress.epoch, self.total_epochs)
        if is_last:
            # With what the last validation found: a network that is done is not validated again.
            with signals.deferred():
                self._save(stepper.state)
            self._stop_if_asked(False)
        return self._trained(stepper.task)

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
        trained = task.get_trainable_module(ema=self.context.recipe.ema is not None)
        return self.context.parallelism.whole(unwrapped_model(trained))

    def _stop_if_asked(self, stopped: bool) -> None:
        """End the run, with everything saved, if a signal stopped the steps or came since."""
        if stopped or self.context.signals.received is not None:
            self.writer.finish()
            if stopped:
                # All of them stop: a launcher kills the others soon after the first has ended.
                self.context.accelerator.wait_for_everyone()
            raise self.context.signals.interruption()

    def _train_epoch(self, stepper: PhaseStepper, saved: dict[str, Any] | None) -> bool:
        """Take the optimizer steps that are left of one epoch; return whether a signal ended it early."""
        progress, context = self.progress, self.context
        stepper.prepared.train()
        title = f"{self.name} {progress.epoch + 1}/{self.total_epochs}"
        done = progress.micro // self.accumulate
        running = RunningTerms(
            title, self.updates_per_epoch, done, progress.running, context.recipe.batch_size, context.accelerator
        )
        left = self.updates_per_epoch - done
        batches = context.feed.batches(progress.epoch, progress.micro) if left else iter(())
        if saved is not None:
            # Last of all, as finding the place in a stream draws random numbers.
            stepper.state.restore_random(saved)
        stopped = any(self._step(stepper, running, batches) for _ in range(left))
        stopped |= self._receive_flags()
        progress.running = running.state_dict()
        running.bar.close()
        return stopped

    def _step(self, stepper: PhaseStepper, running: RunningTerms, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """Take one optimizer step; return whether all processes are to stop after it."""
        progress = self.progress
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.guard.skips else []
        done = progress.micro / (self.updates_per_epoch * self.accumulate)
        stepper.task.set_time(progress.epoch - progress.first_epoch + done, stepper.epochs)
        parts = stepper.backward(batches)
        progress.micro += self.accumulate
        progress.step += 1
        nonfinite = ~torch.stack([part["loss"] for part in parts]).isfinite().all()
        flags = self.flags.exchange(progress.step, self.context.signals.received is not None, nonfinite)
        stop = flags is not None and flags.stop
        if self.guard.must_skip(flags, progress):
            stepper.skip(buffers)
        else:
            stepper.update(progress.step)
            running.add(parts)
        if stepper.scheduler is not None:
            stepper.scheduler.step_update(progress.step - progress.first_step)
        running.advance()
        is_last = running.updates == self.updates_per_epoch
        if progress.step % _LOG_INTERVAL == 0 or is_last:
            self._shown = running.read() | {"lr": stepper.rate}
            self._log("train", self._shown)
        every = self.context.recipe.checkpoint.every_steps
        if every is not None and progress.step % every == 0 and not is_last:
            stop |= self._receive_flags()
            progress.running = running.state_dict()
            self._save(stepper.state)
        return stop

    def _receive_flags(self) -> bool:
        """Wait for what is not known yet about the last step; return whether all processes are to stop."""
        flags = self.flags.receive()
        self.guard.must_skip(flags, self.progress)
        return flags is not None and flags.stop

    def _validate(self, task: SelfDistillationTask, is_last_phase: bool) -> ExitMetricsResult | None:
        """Evaluate on the validation split, if there is one, and remember the weights if they are the best so far."""
        recipe, feed, accelerator = self.context.recipe, self.context.feed, self.context.accelerator
        eval_model = task.get_eval_model(ema=recipe.ema is not None)
        model = unwrapped_model(eval_model)
        share_buffers(model, accelerator)
        if feed.validation is None or eval_model is None:
            return None
        num_exits, gather = model.num_exits if task.needs.exits else 0, not feed.streaming
        metrics = evaluate_model(
            eval_model, feed.validation, accelerator, num_exits=num_exits, gather=gather, title="validate"
        )
        top1 = metrics["exits"][-1]["top1"]
        if recipe.schedule.select == "best" and is_last_phase and top1 > self.progress.best_top1:
            self.progress.best_top1 = top1
            weights = self.context.parallelism.whole(model).state_dict()
            self.progress.best_weights = {key: value.cpu().clone() for key, value in weights.items()}
        return metrics

    def _save(self, state: PhaseState) -> None:
        """Begin to write a checkpoint, on the main process, unless nothing has changed since the last."""
        progress, record = self.progress, self.context.record
        if (progress.epoch, progress.step) == self._saved:
            return
        self._saved = (progress.epoch, progress.step)
        # After the last step of an epoch, whose validation is still to come.
        is_last = progress.micro >= self.updates_per_epoch * self.accumulate
        record = replace(record, epochs_done=progress.epoch + is_last, epochs=self.total_epochs)
        captured = {RECORD_KEY: record.to_json(), "progress": vars(progress), **state.capture()}
        if self.context.accelerator.is_main_process:
            self.writer.save(captured, progress.step)

    def _compare_processes(self, before: int, were_in_parts: bool) -> None:
        """Say what other processes change, and leave an epoch of a stream that cannot be entered again."""
        now, are_in_parts = self.context.accelerator.num_processes, self.context.parallelism.in_parts
        if (before, were_in_parts) == (now, are_in_parts):
            return
        where = f"after step {self.progress.step}, with the images that are left of the epoch"
        if self.context.feed.streaming and before != now:
            self.progress.step += self.updates_per_epoch - self.progress.micro // self.accumulate
            self.progress.micro = self.updates_per_epoch * self.accumulate
            where = f"at the end of epoch {self.progress.epoch + 1}, as the shares of the stream are others"
        if self.context.accelerator.is_main_process:
            _logger.warning(
                f"{self.name} was trained by {before} process(es){' in parts' * were_in_parts} and goes on with "
                f"{now}{' in parts' * are_in_parts}, {where}. It will not end in the same bits as an undisturbed run: "
                "dropout, Mixup, batch statistics and the order of sums depend on the processes."
            )

    def _tell_epoch(self, metrics: ExitMetricsResult | None, seconds: float) -> None:
        """Write the line of an epoch that stays."""
        self._seconds.append(seconds)
        if not self.context.accelerator.is_main_process:
            return
        parts = [f"{self.name} {self.progress.epoch}/{self.total_epochs}"]
        parts += [
            f"{name} {self._shown[key]:.3g}" for key, name in (("loss", "loss"), ("lr", "rate")) if key in self._shown
        ]
        if metrics is not None:
            top1 = " ".join(f"{row['top1']:.1f}" for row in metrics["exits"])
            pool = metrics["fitted_ensemble"] or metrics["ensemble"]
            parts.append(f"top-1 {top1}" if pool is None else f"top-1 {top1}, ensemble {pool['top1']:.1f}")
        left = (self.total_epochs - self.progress.epoch) * sum(self._seconds) / len(self._seconds)
        parts += [duration(seconds), f"{duration(left)} left"] if left else [duration(seconds)]
        tell("  ".join(parts))

    def _log(self, kind: str, values: dict[str, float]) -> None:
        """Give the trackers the values of the present epoch, under names that no other network has."""
        progress = self.progress
        named = {f"{self.name}/{kind}/{name}": value for name, value in values.items()}
        own = {f"{self.name}/epoch": progress.epoch + 1, f"{self.name}/step": progress.step}
        # Trackers want steps that only rise, also where a second network follows.
        self.context.accelerator.log({**own, **named}, step=self.first_step + progress.step)
        progress.logged += 1


def _flatten(metrics: ExitMetricsResult) -> dict[str, float]:
    """Return the metrics under names such as "top1/0" and "top1/ensemble", and how many images were skipped."""
    outputs: dict[str, Mapping[str, Any]] = {str(index): output for index, output in enumerate(metrics["exits"])}
    if metrics["ensemble"] is not None:
        outputs["ensemble"] = metrics["ensemble"]
    flat = {f"{name}/{key}": value for key, output in outputs.items() for name, value in output.items()}
    return {**flat, "num_skipped": metrics["num_skipped"]}
