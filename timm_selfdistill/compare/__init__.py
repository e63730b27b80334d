"""Losses side by side: the same recipe, budget and seeds, one table and one picture."""

from timm_selfdistill.compare.run import add_arguments, compare, main, run_command
from timm_selfdistill.compare.summary import Comparison, summarize
from timm_selfdistill.compare.write import format_comparison

__all__ = ["Comparison", "add_arguments", "compare", "format_comparison", "main", "run_command", "summarize"]
