"""What a run trains, phase by phase: the loss, the parts it reaches, and for how many epochs."""

from dataclasses import dataclass

from torch import nn

from timm_selfdistill.losses import Needs, SelfDistillationLoss, get_loss, needs_of
from timm_selfdistill.recipe import LossSection, Recipe
from timm_selfdistill.task import Regime

_OVERRIDES = (
    "temperature",
    "kd_weight",
    "hint_weight",
    "ce_weight",
    "deepest_ce_weight",
    "t_squared",
    "divergence",
    "teacher",
    "hint_distance",
    "divergence_kwargs",
    "standardize_logits",
    "kd_warmup_epochs",
    "exit_weights",
)


@dataclass(frozen=True)
class Phase:
    """Epochs that share a loss, an optimizer and a learning-rate schedule.

    Args:
        loss: Maps an `ExitOutput` and a target to a dict of terms.
        regime: Which parts train.
        epochs: Number of epochs.
    """

    loss: nn.Module
    regime: Regime
    epochs: int


def self_distillation_phases(recipe: Recipe) -> list[Phase]:
    """Return the phases of the self-distilled network.

    Raises:
        ValueError: If the loss, its preset or one of its settings is unknown, or the recipe has not what it needs.
    """
    loss = build_loss(recipe)
    _check_needs(needs_of(loss), recipe)
    alone = recipe.schedule.backbone_epochs
    if recipe.schedule.regime == "mixed" and alone is not None:
        return [Phase(backbone_loss(recipe), "joint", alone), Phase(loss, "joint", recipe.epochs - alone)]
    return [Phase(loss, "frozen" if recipe.schedule.regime == "frozen" else "joint", recipe.epochs)]


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
    overrides = {name: getattr(section, name) for name in _OVERRIDES if getattr(section, name) is not None}
    if cls is not SelfDistillationLoss:
        if overrides:
            raise ValueError(
                f"loss: {', '.join(overrides)} are settings of self-distillation; those of {section.name!r} go into "
                "loss.kwargs."
            )
        return cls(**section.kwargs)
    return SelfDistillationLoss.from_preset(
        _preset(section), **overrides, label_smoothing=0.0 if recipe.augment.mixes else label_smoothing(section)
    )


def backbone_loss(recipe: Recipe) -> nn.Module:
    """Build the loss of the backbone alone, with the recipe's label smoothing."""
    return SelfDistillationLoss.from_preset(
        "none", label_smoothing=0.0 if recipe.augment.mixes else label_smoothing(recipe.loss)
    )


def label_smoothing(section: LossSection) -> float:
    """Return the label smoothing of a run; with Mixup or CutMix it goes into the mixed targets, not into the loss."""
    if section.label_smoothing is not None:
        return section.label_smoothing
    if get_loss(section.name) is not SelfDistillationLoss:
        return 0.0
    return SelfDistillationLoss.from_preset(_preset(section)).config.label_smoothing


def _check_needs(needs: Needs, recipe: Recipe) -> None:
    """Refuse a recipe that has not what its loss needs."""
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
    return section.preset
