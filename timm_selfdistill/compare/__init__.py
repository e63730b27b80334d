"""Losses side by side: the same recipe, budget and seeds, one table and one picture."""

from timm_selfdistill.compare.comparison import Comparison, format_comparison, summarize
from timm_selfdistill.compare.run_losses import compare, list_variants

__all__ = ["Comparison", "compare", "format_comparison", "list_variants", "summarize"]
