"""The classifiers that hang on a backbone's taps: each maps its tap to the teacher's feature width, then to logits."""

from timm_selfdistill.heads.bodies import HEADS, list_heads, register_head
from timm_selfdistill.heads.exit_head import ExitHead, choose_head
from timm_selfdistill.heads.reading import as_map, as_tokens, pooled

__all__ = ["HEADS", "ExitHead", "as_map", "as_tokens", "choose_head", "list_heads", "pooled", "register_head"]
