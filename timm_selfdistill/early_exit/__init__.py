"""Early exit: each image stops at the first exit that is sure of it."""

from timm_selfdistill.early_exit.network import EarlyExit, EarlyExitOutput
from timm_selfdistill.early_exit.settings import FALLBACKS, RULES, EarlyExitConfig, list_rules, register_rule

__all__ = ["FALLBACKS", "RULES", "EarlyExit", "EarlyExitConfig", "EarlyExitOutput", "list_rules", "register_rule"]
