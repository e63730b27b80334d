"""timm's optimizer and learning-rate schedule, as a recipe asks for them."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe


def build_optimizer(model: SelfDistillModel, loss: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer with timm's parameter groups, and one without weight decay for the loss.

    Args:
        model: The wrapped model.
        loss: The loss, whose own parameters, if it has any, train along.
        recipe: The recipe.

    Raises:
        ValueError: If timm does not know the optimizer or one of its arguments.
    """
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
    if own := list(loss.parameters()):
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, cooldown_epochs: int, updates_per_epoch: int
) -> tuple[Any, int]:
    """Build timm's scheduler, None for a constant rate, and return it with the number of epochs it asks for.

    Args:
        optimizer: The optimizer.
        recipe: The recipe.
        epochs: Epochs of the phase.
        cooldown_epochs: Epochs at the lowest rate behind them.
        updates_per_epoch: Optimizer steps in an epoch.
    """
    section = recipe.schedule
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched=section.name,
        num_epochs=epochs,
        decay_epochs=section.decay_epochs,
        decay_milestones=list(section.decay_milestones),
        decay_rate=section.decay_rate,
        min_lr=section.min_lr,
        warmup_lr=section.warmup_lr,
        warmup_epochs=section.warmup_epochs,
        cooldown_epochs=cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    if scheduler is not None:
        scheduler.step_update(0)
    return scheduler, total
