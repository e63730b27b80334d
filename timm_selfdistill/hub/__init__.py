"""Save and load a wrapped model: a folder, or a repository on the Hugging Face Hub, that plain timm loads too."""

from timm_selfdistill.hub.card import Evaluation, model_card
from timm_selfdistill.hub.folder import BACKBONE, CARD, CONFIG, EXITS, save_pretrained
from timm_selfdistill.hub.remote import HubError, from_pretrained, make_repository, push_folder, push_to_hub

__all__ = [
    "BACKBONE",
    "CARD",
    "CONFIG",
    "EXITS",
    "Evaluation",
    "HubError",
    "from_pretrained",
    "make_repository",
    "model_card",
    "push_folder",
    "push_to_hub",
    "save_pretrained",
]
