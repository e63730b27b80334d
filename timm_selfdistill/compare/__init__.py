"""Losses side by side: the same recipe, budget and seeds, one table and one picture."""

from timm_selfdistill.compare.run import compare
from timm_selfdistill.compare.summary import Comparison, summarize
from timm_selfdistill.compare.write import format_comparison

__all__ = ["Comparison", "compare", "format_comparison", "summarize"]
