"""What a run trains, phase by phase: the loss, the teacher from outside, the parts that train, and for how long."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from timm_selfdistill.data import ImageSplit, StreamSplit
from timm_selfdistill.hub import BACKBONE, CONFIG, KEY, fetch, from_pretrained, read_json
from timm_selfdistill.losses import OutsideTeacher, SelfDistillationLoss, get_loss, needs_of
from timm_selfdistill.recipe import REPO_ID, LossSection, Recipe, TeacherSection
from timm_selfdistill.recipe.training_sections import LOCAL_MODEL
from timm_selfdistill.task import Regime


@dataclass(frozen=True)
class Phase:
    """Epochs that share a loss, an optimizer and a learning-rate schedule.

    Args:
        loss: Maps an `ExitOutput` and a target to a dict of terms.
        regime: Which parts train.
        epochs: Number of epochs.
        teacher: A model from outside that teaches too.
    """

    loss: nn.Module
    regime: Regime
    epochs: int
    teacher: OutsideTeacher | None = None


def self_distillation_phases(recipe: Recipe) -> list[Phase]:
    """Return the phases of the self-distilled network.

    Raises:
        ValueError: If the loss, its preset or one of its settings is unknown, or the recipe lacks what it needs.
    """
    loss = build_loss(recipe)
    _check_needs(loss, recipe)
    teacher = build_teacher(recipe)
    alone = recipe.schedule.backbone_epochs
    if recipe.schedule.regime == "mixed" and alone is not None:
        return [Phase(backbone_loss(recipe), "joint", alone), Phase(loss, "joint", recipe.epochs - alone, teacher)]
    return [Phase(loss, "frozen" if recipe.schedule.regime == "frozen" else "joint", recipe.epochs, teacher)]


def baseline_phases(recipe: Recipe) -> list[Phase]:
    """Return the phase of the plain backbone, which trains for the same number of epochs."""
    return [Phase(backbone_loss(recipe), "joint", recipe.epochs)]


def build_loss(recipe: Recipe) -> nn.Module:
    """Build the recipe's loss.

    Raises:
        ValueError: If the loss, its preset or one of its settings is unknown.
    """
    section = recipe.loss
    cls = get_loss(section.name)
    if cls is SelfDistillationLoss:
        smoothing = 0.0 if recipe.augment.mixes else label_smoothing(section)
        return SelfDistillationLoss.from_preset(_preset(section), **section.changes | {"label_smoothing": smoothing})
    # Label smoothing is also that of the baseline.
    if wrong := section.changes.keys() - {"label_smoothing"}:
        raise ValueError(
            f"loss: {', '.join(sorted(wrong))} are settings of self-distillation; those of {section.name!r} go into "
            "loss.kwargs."
        )
    return cls(**section.kwargs)


def backbone_loss(recipe: Recipe) -> nn.Module:
    """Build the loss of the backbone alone, with the recipe's label smoothing and weights of the classes."""
    smoothing = 0.0 if recipe.augment.mixes else label_smoothing(recipe.loss)
    weights = recipe.loss.changes.get("class_weights")
    return SelfDistillationLoss.from_preset("none", label_smoothing=smoothing, class_weights=weights)


def with_balanced_classes(phases: Sequence[Phase], train: ImageSplit | StreamSplit, num_classes: int) -> list[Phase]:
    """Return phases whose losses weigh each class by the inverse of its number of training images.

    Raises:
        ValueError: If the training images are a stream, or a loss has no weights of classes.
    """
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


def _check_needs(loss: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError if a recipe lacks what its loss needs."""
    needs = needs_of(loss)
    if recipe.teacher is not None and recipe.teacher.teaches != "backbone" and not needs.exits:
        raise ValueError("teacher.teaches: must be backbone for this loss, which does not run the exits.")
    if needs.ema and recipe.ema is None:
        raise ValueError(
            "ema: must not be null for this loss, which learns from the average of the weights; such as "
            "ema='{decay: 0.999}'."
        )
    if needs.batches == "plain":
        return
    if recipe.data.streaming:
        raise ValueError(
            f"data.streaming: must be false for this loss, whose {needs.batches} batches need images by their index."
        )
    if recipe.augment.mixes:
        raise ValueError(
            f"augment: must not mix images for this loss, which compares those of its {needs.batches} batches; set "
            "mixup_alpha and cutmix_alpha to 0 and cutmix_minmax to null."
        )


def _preset(section: LossSection) -> str:
    if section.preset is None:
        raise ValueError("loss.preset: must be the name of a preset for the loss self-distillation.")
    return str(section.preset)


def build_teacher(recipe: Recipe) -> OutsideTeacher | None:
    """Load the recipe's teacher from outside, or return None where it has none.

    Nothing that was fetched is unpickled or executed: a model of this library is checked as `from_pretrained` does it,
    and timm loads weights only.

    Raises:
        ValueError: If there is no such model, it has another number of classes than `model.num_classes`, or it would
            teach what does not run or train.
        HubError: If its repository cannot be read.
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
