"""Losses for a model with exits."""

from timm_selfdistill.losses.divergences import Divergence, list_divergences, register_divergence
from timm_selfdistill.losses.protocol import Needs, TrainingTime, get_loss, list_losses, needs_of, register_loss
from timm_selfdistill.losses.self_distillation import SelfDistillationLoss
from timm_selfdistill.losses.teachers import Teacher, list_teachers, register_teacher
from timm_selfdistill.losses.without_exits import CSKD, DLB, PSKD
from timm_selfdistill.recipe.loss_settings import PRESETS, SelfDistillationConfig, list_presets

__all__ = [
    "CSKD",
    "DLB",
    "PRESETS",
    "PSKD",
    "Divergence",
    "Needs",
    "SelfDistillationConfig",
    "SelfDistillationLoss",
    "Teacher",
    "TrainingTime",
    "get_loss",
    "list_divergences",
    "list_losses",
    "list_presets",
    "list_teachers",
    "needs_of",
    "register_divergence",
    "register_loss",
    "register_teacher",
]
