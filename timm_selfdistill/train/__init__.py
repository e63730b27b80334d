"""Training from a recipe, with Accelerate: `timm_selfdistill.train(recipe)`, or `python -m timm_selfdistill.train`."""

from timm_selfdistill.lazy import attach, make_callable

__getattr__, __dir__, __all__ = attach(__name__, __file__)

make_callable(__name__, "train")
