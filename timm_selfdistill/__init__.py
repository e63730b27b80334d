"""Turn any timm backbone into its own teacher: self-distillation with shallow exits."""

from timm_selfdistill.early_exit import (
    EarlyExit,
    EarlyExitConfig,
    EarlyExitOutput,
    list_rules,
    register_rule,
)
from timm_selfdistill.exit_logits import fit_ensemble
from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.export import ExportError, export_model
from timm_selfdistill.heads import list_heads, register_head
from timm_selfdistill.hub import HubError, from_pretrained, load_early_exit, load_exported, push_to_hub, save_pretrained
from timm_selfdistill.losses import (
    SelfDistillationConfig,
    SelfDistillationLoss,
    list_divergences,
    list_losses,
    list_presets,
    list_teachers,
    register_divergence,
    register_loss,
    register_teacher,
)
from timm_selfdistill.model import Ensemble, ExitOutput, SelfDistillModel, wrap
from timm_selfdistill.predict import Prediction, predict_images
from timm_selfdistill.recipe import list_recipes, load_recipe
from timm_selfdistill.task import SelfDistillationTask
from timm_selfdistill.truncation import TruncatedModel, truncate

__version__ = "0.1.0"

__all__ = [
    "EarlyExit",
    "EarlyExitConfig",
    "EarlyExitOutput",
    "Ensemble",
    "ExitOutput",
    "ExitPoint",
    "ExportError",
    "HubError",
    "Prediction",
    "SelfDistillModel",
    "SelfDistillationConfig",
    "SelfDistillationLoss",
    "SelfDistillationTask",
    "Tap",
    "TruncatedModel",
    "export_model",
    "fit_ensemble",
    "from_pretrained",
    "list_divergences",
    "list_heads",
    "list_losses",
    "list_presets",
    "list_recipes",
    "list_rules",
    "list_teachers",
    "load_early_exit",
    "load_exported",
    "load_recipe",
    "predict_images",
    "push_to_hub",
    "register_divergence",
    "register_head",
    "register_loss",
    "register_rule",
    "register_teacher",
    "save_pretrained",
    "truncate",
    "wrap",
]
