"""Save and load a wrapped model: a folder, or a repository on the Hugging Face Hub, that plain timm loads too."""

from timm_selfdistill.hub.build import check_finite
from timm_selfdistill.hub.card import Training, model_card
from timm_selfdistill.hub.folder import (
    BACKBONE,
    CARD,
    EXITS,
    is_exported,
    load_exported,
    read_early_exit,
    read_run,
    save_early_exit,
    save_exported,
    save_pretrained,
)
from timm_selfdistill.hub.push import make_repository, push_folder, push_to_hub
from timm_selfdistill.hub.remote import HubError, from_pretrained, load_early_exit, load_with_early_exit
from timm_selfdistill.hub.saved_config import CONFIG, class_names, complete_names

__all__ = [
    "BACKBONE",
    "CARD",
    "CONFIG",
    "EXITS",
    "HubError",
    "Training",
    "check_finite",
    "class_names",
    "complete_names",
    "from_pretrained",
    "is_exported",
    "load_early_exit",
    "load_exported",
    "load_with_early_exit",
    "make_repository",
    "model_card",
    "push_folder",
    "push_to_hub",
    "read_early_exit",
    "read_run",
    "save_early_exit",
    "save_exported",
    "save_pretrained",
]
