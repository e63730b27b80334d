"""From a recipe's data section to batches: open and split a data set, transform its images, load them."""

from timm_selfdistill.lazy import attach

# Decoding and transforms do without `datasets`, which is loaded when a data set is opened.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
