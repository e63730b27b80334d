"""Losses for a model with exits."""

from .divergences import Divergence, list_divergences, register_divergence
from .presets import PRESETS, SelfDistillationConfig, list_presets
from .self_distillation import SelfDistillationLoss, get_loss, list_losses, register_loss
from .teachers import Teacher, list_teachers, register_teacher

__all__ = [
    "PRESETS",
    "Divergence",
    "SelfDistillationConfig",
    "SelfDistillationLoss",
    "Teacher",
    "get_loss",
    "list_divergences",
    "list_losses",
    "list_presets",
    "list_teachers",
    "register_divergence",
    "register_loss",
    "register_teacher",
]
