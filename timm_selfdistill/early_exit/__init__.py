"""Early exit: each image leaves the network at the first exit that is confident enough of its class."""

from timm_selfdistill.early_exit.early_exit import EarlyExit, EarlyExitOutput, exit_confidence, first_confident, replay
from timm_selfdistill.early_exit.rules import (
    FALLBACKS,
    EarlyExitConfig,
    Rule,
    RuleState,
    get_rule,
    list_rules,
    register_rule,
)

__all__ = [
    "FALLBACKS",
    "EarlyExit",
    "EarlyExitConfig",
    "EarlyExitOutput",
    "Rule",
    "RuleState",
    "exit_confidence",
    "first_confident",
    "get_rule",
    "list_rules",
    "register_rule",
    "replay",
]
