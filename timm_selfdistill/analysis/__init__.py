"""What the method's paper explains its gain by, measured on a saved model: flat minima, gradients, features."""

from timm_selfdistill.lazy import attach

# So that what is missing is named together with the extra that installs it.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
