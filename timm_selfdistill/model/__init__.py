"""The self-distilling model: a timm backbone with classifiers on its intermediate features."""

from timm_selfdistill.model.ensemble import Ensemble
from timm_selfdistill.model.network import ExitOutput, SelfDistillModel, WrapConfig
from timm_selfdistill.model.wrapping import create_backbone, wrap

__all__ = ["Ensemble", "ExitOutput", "SelfDistillModel", "WrapConfig", "create_backbone", "wrap"]
