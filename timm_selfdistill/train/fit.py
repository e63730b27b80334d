"""The only training loop."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_selfdistill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.task import SelfDistillationTask, unwrapped_model
from timm_selfdistill.train.evaluation import evaluate_model, share_buffers
from timm_selfdistill.train.launch import JsonLinesTracker
from timm_selfdistill.train.optim import build_optimizer, build_scheduler
from timm_selfdistill.train.phases import Phase
from timm_selfdistill.train.running import RunningTerms
from timm_selfdistill.train.state import PhaseState

_logger = logging.getLogger(__name__)

_LOG_INTERVAL = 20  # optimizer steps between two lines of metrics.jsonl


@dataclass
class Feed:
    """The data of a run, as the loop takes it.

    Args:
        train: Training batches of this process.
        validation: Validation batches, or None.
        steps_per_epoch: Training batches of this process in an epoch.
        mixup: Mixes a training batch and its targets, or None.
        sharded: Whether each process sees a share of the validation batches, to be gathered.
    """

    train: DataLoader[Any]
    validation: DataLoader[Any] | None
    steps_per_epoch: int
    mixup: Mixup | None
    sharded: bool


@dataclass
class _Progress:
    """How far a network's training has come; saved with each checkpoint.

    Epochs and steps are counted over all phases; `first_epoch` and `first_step` are those before the present one.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    first_epoch: int = 0
    first_step: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class Fit:
    """Train one network through its phases, saving a checkpoint after every epoch.

    Args:
        name: Name of the network in logs and checkpoints, such as "self-distilled".
        model: The wrapped model, on the accelerator's device; trained in place.
        phases: What to train, in order.
        feed: The data.
        recipe: The recipe.
        accelerator: The accelerator.
        folder: The run's folder; checkpoints go to `checkpoints/<name>` in it.
        on_epoch: Called after every epoch, when its checkpoint is written, with the model as it would be evaluated, the
            number of epochs done and that of all.
    """

    def __init__(
        self,
        name: str,
        model: SelfDistillModel,
        phases: Sequence[Phase],
        feed: Feed,
        recipe: Recipe,
        accelerator: Accelerator,
        folder: Path,
        on_epoch: Callable[[SelfDistillModel, int, int], None] | None = None,
    ) -> None:
        self.on_epoch = on_epoch
        self.name = name
        self.model = model
        self.phases = phases
        self.feed = feed
        self.recipe = recipe
        self.accelerator = accelerator
        self.checkpoints = folder / "checkpoints" / name
        self.progress = _Progress()
        self.total_epochs = sum(phase.epochs for phase in phases) + recipe.schedule.cooldown_epochs
        self.updates_per_epoch = feed.steps_per_epoch // recipe.optimizer.accumulate
        if self.updates_per_epoch < 1:
            raise ValueError(
                f"optimizer.accumulate: {recipe.optimizer.accumulate} micro batches make one step, but an epoch has "
                f"only {feed.steps_per_epoch}."
            )

    def run(self) -> SelfDistillModel:
        """Train to the end, from the newest checkpoint if there is one, and return the trained model."""
        saved = self._load()
        if saved is not None:
            self.progress = _Progress(**saved["progress"])
        result = self.model
        for index, phase in enumerate(self.phases):
            if index < self.progress.phase:
                continue
            result = self._run_phase(index, phase, saved)
            saved = None
        if self.progress.best_weights:
            result.load_state_dict(self.progress.best_weights)
        return result.eval()

    def _run_phase(self, index: int, phase: Phase, saved: dict[str, Any] | None) -> SelfDistillModel:
        """Train one phase, from what was saved in it if anything, and return the model or its average."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        task = SelfDistillationTask(self.model, phase.loss, phase.regime, device=accelerator.device, verbose=False)
        if recipe.compile:
            task.compile()
        optimizer = build_optimizer(self.model, recipe)
        cooldown = recipe.schedule.cooldown_epochs if phase is self.phases[-1] else 0
        scheduler, epochs = build_scheduler(optimizer, recipe, phase.epochs, cooldown, self.updates_per_epoch)
        prepared, wrapped = accelerator.prepare(task, optimizer)
        if recipe.ema:
            task.setup_ema(decay=recipe.ema.decay, use_warmup=recipe.ema.warmup, device=accelerator.device)
        state = PhaseState(self.model, task, optimizer, scheduler, accelerator)
        if saved is not None:
            state.restore(saved)
        else:
            progress.phase, progress.first_epoch, progress.first_step = index, progress.epoch, progress.step
        while progress.epoch - progress.first_epoch < epochs:
            start = time.monotonic()
            self._train_epoch(prepared, task, wrapped, scheduler)
            progress.epoch += 1
            progress.seconds += time.monotonic() - start
            metrics = self._validate(task, phase)
            if scheduler is not None:
                scheduler.step(progress.epoch - progress.first_epoch)
            # Logged before it is saved: a resumed run removes lines behind its checkpoint, and cannot add lost ones.
            if metrics is not None:
                accelerator.log(self._values("validation", progress.epoch, _flatten(metrics)), step=progress.step)
            self._save(state)
            if self.on_epoch is not None:
                trained = unwrapped_model(task.get_eval_model(ema=recipe.ema is not None))
                self.on_epoch(trained, progress.epoch, self.total_epochs)
        return unwrapped_model(task.get_trainable_module(ema=recipe.ema is not None))

    def _train_epoch(self, prepared: nn.Module, task: SelfDistillationTask, optimizer: Any, scheduler: Any) -> None:
        """Take every optimizer step of one epoch."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        accumulate = recipe.optimizer.accumulate
        prepared.train()
        _set_epoch(self.feed.train, progress.epoch)
        title = f"{self.name} {progress.epoch + 1}/{self.total_epochs}"
        running = RunningTerms(title, self.updates_per_epoch, recipe.batch_size, accelerator)
        memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
        for micro, (images, targets) in enumerate(self.feed.train):
            if micro >= self.updates_per_epoch * accumulate:
                break  # micro batches that do not make up a whole step
            images = images.to(accelerator.device, memory_format=memory_format)
            targets = targets.to(accelerator.device)
            if self.feed.mixup is not None:
                images, targets = self.feed.mixup(images, targets)
            steps_now = (micro + 1) % accumulate == 0
            with nullcontext() if steps_now else accelerator.no_sync(prepared):
                terms = prepared(images, targets)
                accelerator.backward(terms["loss"] / accumulate)
            running.add(terms)
            if not steps_now:
                continue
            if recipe.optimizer.clip_grad is not None:
                accelerator.unscale_gradients(optimizer)
                exclude_head = recipe.optimizer.clip_mode == "agc"
                parameters = task.get_clip_parameters(exclude_head=exclude_head)
                dispatch_clip_grad(parameters, recipe.optimizer.clip_grad, recipe.optimizer.clip_mode)
            rate = max(group["lr"] for group in optimizer.param_groups)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            if scheduler is not None:
                scheduler.step_update(progress.step - progress.first_step)
            task.update_ema(progress.step)
            running.advance()
            if progress.step % _LOG_INTERVAL == 0 or running.updates == self.updates_per_epoch:
                values = running.read() | {"lr": rate}
                accelerator.log(self._values("train", progress.epoch + 1, values), step=progress.step)
        running.close()

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
            gather=self.feed.sharded,
            title="validate",
        )
        top1 = metrics["exits"][-1]["top1"]
        is_last_phase = phase is self.phases[-1]
        if self.recipe.schedule.select == "best" and is_last_phase and top1 > self.progress.best_top1:
            self.progress.best_top1 = top1
            self.progress.best_weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        return metrics

    def _save(self, state: PhaseState) -> None:
        """Write a checkpoint, on the main process."""
        captured = {"progress": vars(self.progress), **state.capture()}
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoints, captured, self.progress.step)
        self.accelerator.wait_for_everyone()

    def _load(self) -> dict[str, Any] | None:
        """Return the newest checkpoint's state, or None to start afresh."""
        resume = self.recipe.resume
        if resume == "never":
            return None
        # A checkpoint that is named belongs to one of the run's networks; the others go on from their newest.
        named = None if resume == "auto" else Path(resume)
        newest = latest_checkpoint(self.checkpoints)
        path = named if named is not None and named.parent.name == self.name else newest
        if path is not None and newest is not None and path.resolve() != newest.resolve():
            raise ValueError(
                f"resume: {path} is older than {newest}, which would be lost: move the later checkpoints away, or copy "
                "the run to another output_dir."
            )
        found = gather_object([None if path is None else path.name])
        if len(set(found)) > 1:
            raise ValueError(
                f"resume: the processes do not see the same checkpoints of {self.name} ({found}): output_dir must be "
                "on storage that all machines share."
            )
        if path is None:
            return None
        saved: dict[str, Any] = load_checkpoint(path)
        if self.accelerator.is_main_process:
            _logger.warning("Resuming %s from %s.", self.name, path)
        tracker = self.accelerator.get_tracker("jsonl")
        if isinstance(tracker, JsonLinesTracker):
            tracker.forget_after(self.name, saved["progress"]["step"])
        return saved

    def _values(self, kind: str, epoch: int, values: dict[str, float]) -> dict[str, Any]:
        return {
            "network": self.name,
            "epoch": epoch,
            **{f"{kind}/{name}": value for name, value in values.items()},
        }


def _set_epoch(loader: Any, epoch: int) -> None:
    """Give the sampler its epoch, so that a resumed run draws the order that an undisturbed one would."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    elif hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def _flatten(metrics: ExitMetricsResult) -> dict[str, float]:
    """Return the metrics under names such as "top1/0" and "top1/ensemble", and how many images were skipped."""
    outputs = {str(index): dict(output) for index, output in enumerate(metrics["exits"])}
    if metrics["ensemble"] is not None:
        outputs["ensemble"] = dict(metrics["ensemble"])
    flat = {f"{name}/{key}": value for key, output in outputs.items() for name, value in output.items()}
    return {**flat, "num_skipped": metrics["num_skipped"]}  # type: ignore[dict-item]
