"""Choose temperatures and thresholds of early exit on held-out images, and report what they give on others."""

from timm_selfdistill.lazy import attach

# So that what is missing is named together with the extra that installs it.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
