"""Build what a recipe trains: the network, its phases with loss and outside teacher, optimizer and schedule."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_selfdistill.compat import copy_hooks
from timm_selfdistill.data import ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.exits import unchanged
from timm_selfdistill.hub import BACKBONE, CONFIG, KEY, fetch, from_pretrained, read_json
from timm_selfdistill.hub.start_weights import load_start_weights
from timm_selfdistill.losses import OutsideTeacher, SelfDistillationLoss, get_loss, needs_of
from timm_selfdistill.model import SelfDistillModel, wrap
from timm_selfdistill.recipe import REPO_ID, LossSection, Recipe, TeacherSection
from timm_selfdistill.recipe.training_sections import LOCAL_MODEL
from timm_selfdistill.task import Regime, scale_heads_lr
from timm_selfdistill.train.refusals import check_needs

_logger = logging.getLogger(__name__)

# Of heads, which are new, on a backbone that is trained already; docs/gain.md has what it gives.
_NEW_HEADS_LR_SCALE = 5.0


@dataclass(frozen=True)
class Phase:
    """Epochs that share a loss, an optimizer and a learning-rate schedule."""

    loss: nn.Module  # maps an `ExitOutput` and a target to a dict of terms
    regime: Regime  # which parts train
    epochs: int
    teacher: OutsideTeacher | None = None  # from outside, beside the loss


def self_distillation_phases(recipe: Recipe) -> list[Phase]:
    """Return the phases of the self-distilled network; what the recipe lacks or has wrong for it is a `ValueError`."""
    loss = build_loss(recipe)
    check_needs(loss, recipe)
    teacher = build_teacher(recipe)
    alone = recipe.schedule.backbone_epochs
    if recipe.schedule.regime == "mixed" and alone is not None:
        return [Phase(backbone_loss(recipe), "joint", alone), Phase(loss, "joint", recipe.epochs - alone, teacher)]
    return [Phase(loss, "frozen" if recipe.schedule.regime == "frozen" else "joint", recipe.epochs, teacher)]


def baseline_phases(recipe: Recipe) -> list[Phase]:
    """Return the phase of the plain backbone, which trains for the same number of epochs."""
    return [Phase(backbone_loss(recipe), "joint", recipe.epochs)]


def build_loss(recipe: Recipe) -> nn.Module:
    """Build the recipe's loss; a name or setting that is unknown is a `ValueError`."""
    section = recipe.loss
    cls = get_loss(section.name)
    if cls is SelfDistillationLoss:
        changes = section.changes | {"label_smoothing": _smoothing_in_loss(recipe)}
        return SelfDistillationLoss.from_preset(_preset(section), **changes)
    # Label smoothing is also that of the baseline.
    if wrong := section.changes.keys() - {"label_smoothing"}:
        raise ValueError(
            f"loss: {', '.join(sorted(wrong))} are settings of self-distillation; those of {section.name!r} go into "
            "loss.kwargs."
        )
    return cls(**section.kwargs)


def backbone_loss(recipe: Recipe) -> nn.Module:
    """Build the loss of the backbone alone, with the recipe's label smoothing and weights of the classes."""
    weights = recipe.loss.changes.get("class_weights")
    return SelfDistillationLoss.from_preset("none", label_smoothing=_smoothing_in_loss(recipe), class_weights=weights)


def with_balanced_classes(phases: Sequence[Phase], train: ImageSplit | StreamSplit, num_classes: int) -> list[Phase]:
    """Return phases whose losses weigh each class by the inverse of its number of training images."""
    if not isinstance(train, ImageSplit):
        raise ValueError("loss.class_weights: must be null or a list for a stream, whose classes cannot be counted.")
    counts = np.bincount(train.targets, minlength=num_classes)
    shares = len(train) / np.count_nonzero(counts) / np.maximum(counts, 1)
    weights = tuple(np.where(counts > 0, shares, 1.0).tolist())
    found = []
    for phase in phases:
        if not isinstance(phase.loss, SelfDistillationLoss):
            raise ValueError("loss.class_weights: must be null for a loss that is not self-distillation.")
        found.append(replace(phase, loss=SelfDistillationLoss(replace(phase.loss.config, class_weights=weights))))
    return found


def label_smoothing(section: LossSection) -> float:
    """Return the label smoothing of a run; with Mixup or CutMix it goes into the mixed targets, not into the loss."""
    if section.label_smoothing is not None:
        return float(section.label_smoothing)
    if get_loss(section.name) is not SelfDistillationLoss:
        return 0.0
    return SelfDistillationLoss.from_preset(_preset(section)).config.label_smoothing


def build_teacher(recipe: Recipe) -> OutsideTeacher | None:
    """Load the recipe's teacher from outside, or return None where it has none.

    Nothing that was fetched is unpickled or executed: a model of this library is checked as `from_pretrained` does it,
    and timm loads weights only. A teacher that does not fit is a `ValueError`, an unreadable repository a `HubError`.
    """
    section = recipe.teacher
    if section is None:
        return None
    if recipe.schedule.regime == "frozen" and section.teaches != "exits":
        raise ValueError("teacher.teaches: must be exits where the backbone is frozen, by schedule.regime=frozen.")
    try:
        teacher = _load(section)
        if recipe.model.num_classes is not None:
            teacher.check_classes(recipe.model.num_classes)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    return teacher


def build_model(recipe: Recipe, class_names: Sequence[str], dataset: str, *, tell: bool = False) -> SelfDistillModel:
    """Build the recipe's wrapped model, for the classes of the data set of this name; `tell` logs warnings."""
    section, exits = recipe.model, recipe.exits
    known = len(class_names)
    num_classes = section.num_classes or known
    if num_classes < known:
        raise ValueError(f"model.num_classes: {num_classes} is less than the {known} classes of {dataset}.")
    if tell and num_classes > known and not recipe.data.allow_empty_classes:
        _logger.warning(
            "model.num_classes: %d is more than the %d classes of %s: classes %d to %d have no training image. "
            "data.allow_empty_classes=true says that they may have none.",
            *(num_classes, known, dataset, known, num_classes - 1),
        )
    model = wrap(
        section.name,
        num_classes=num_classes,
        exits=exits.points,
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        head_budget=exits.head_budget,
        hint_adapter=exits.hint_adapter,
        small_stem=section.small_stem,
        image_size=recipe.data.image_size,
        pretrained=section.pretrained,
        model_kwargs=section.kwargs,
    )
    if section.weights is not None:
        for notice in load_start_weights(model, section.weights):
            if tell:
                _logger.warning("%s", notice)
    if section.grad_checkpointing:
        _checkpoint_gradients(model, section.name)
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


def _checkpoint_gradients(model: SelfDistillModel, name: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"model.grad_checkpointing: must be false for {name!r}, which timm cannot compute again in parts; a "
            "smaller batch_size or a larger optimizer.accumulate needs less memory too."
        ) from error


def synchronize_batch_norm(model: SelfDistillModel) -> SelfDistillModel:
    """Let every batch norm use the statistics of all processes' images; state dict and hooks are kept."""
    before = dict(model.named_modules(remove_duplicate=False))
    convert_sync_batchnorm(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not before[name]:
            copy_hooks(before[name], module)
    return model


def check_one_image(
    model: SelfDistillModel, input_config: InputConfig, phases: Iterable[Phase], recipe: Recipe, num_processes: int
) -> None:
    """Refuse a recipe that leaves a process one image at a time, where the network cannot train on one.

    Batch norm needs two values a channel: one image is enough only where its feature maps are larger than one
    position. So the network is tried, and left unchanged.
    """
    alone = num_processes == 1 or not recipe.sync_batchnorm
    if recipe.batch_size != num_processes * recipe.optimizer.accumulate or not alone:
        return
    images = torch.zeros(1, input_config.channels, *input_config.image_size)
    for phase in phases:
        needs = needs_of(phase.loss)
        if needs.batches == "paired":  # with a second image
            continue
        with unchanged(model, restore_tensors=True), torch.no_grad():
            model.train()
            if phase.regime == "frozen":
                model.backbone.eval()
            try:
                model(images, return_exits=needs.exits)
            except ValueError as error:  # of torch's batch norm, or of a head
                raise ValueError(
                    f"batch_size: {recipe.batch_size} leaves one image for each of {num_processes} process(es) and "
                    f"optimizer.accumulate={recipe.optimizer.accumulate} micro batch(es), which the batch norm of "
                    f"{recipe.model.name} cannot train on at {' x '.join(map(str, input_config.image_size))} pixels; "
                    f"allowed are multiples of {recipe.batch_size} from {2 * recipe.batch_size} on, or fewer micro "
                    "batches."
                ) from error


def build_optimizer(model: SelfDistillModel, loss: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer with timm's parameter groups, and one without weight decay for the loss's own."""
    section = recipe.optimizer
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            filter_bias_and_bn=not section.weight_decay_on_bias_and_norm,
            layer_decay=section.layer_decay,
            **section.kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer: timm cannot make {section.name!r} with {section.kwargs}: {error}") from error
    scale_heads_lr(optimizer, model, _heads_lr_scale(recipe))
    if own := list(loss.parameters()):
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def _heads_lr_scale(recipe: Recipe) -> float:
    if recipe.optimizer.heads_lr_scale is not None:
        return recipe.optimizer.heads_lr_scale
    trained = recipe.model.pretrained or recipe.model.weights is not None
    return _NEW_HEADS_LR_SCALE if trained and recipe.schedule.regime != "frozen" else 1.0


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, cooldown_epochs: int, updates_per_epoch: int
) -> tuple[Any, int]:
    """Build timm's scheduler, None for a constant rate; return it and the number of epochs, cool-down included."""
    same_names = {"decay_epochs", "decay_milestones", "decay_rate", "min_lr", "warmup_lr", "warmup_epochs"}
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule.name,
        num_epochs=epochs,
        cooldown_epochs=cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **recipe.schedule.model_dump(include=same_names),
    )
    if scheduler is not None:
        scheduler.step_update(0)
    return scheduler, total


def _smoothing_in_loss(recipe: Recipe) -> float:
    return 0.0 if recipe.augment.mixes else label_smoothing(recipe.loss)


def _preset(section: LossSection) -> str:
    if section.preset is None:
        raise ValueError("loss.preset: must be the name of a preset for the loss self-distillation.")
    return str(section.preset)


def _load(section: TeacherSection) -> OutsideTeacher:
    name, kwargs = section.name, dict(section.kwargs)
    if not os.path.isdir(name) and not REPO_ID.fullmatch(name):
        return OutsideTeacher(name, section.config, model_kwargs=kwargs)
    folder = fetch(name)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if isinstance(config, dict) and KEY in config:
        if kwargs:
            raise ValueError(f"kwargs are arguments of timm.create_model, but {name} is a model of this library.")
        return OutsideTeacher(from_pretrained(folder), section.config)
    # A repository may have its weights in a file that `fetch` leaves out.
    is_whole = os.path.isdir(name) or (folder / BACKBONE).is_file()
    return OutsideTeacher(
        f"{LOCAL_MODEL}{folder}" if is_whole else f"hf-hub:{name}", section.config, model_kwargs=kwargs
    )
