"""Turn any timm backbone into its own teacher: self-distillation with shallow exits.

The public names are in `__init__.pyi`. Each is imported when it is first used, so that `timm-selfdistill --help`
needs neither torch nor timm.
"""

from timm_selfdistill.lazy import attach, import_after

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach(__name__, __file__)

# timm.create_model knows our CIFAR networks once both packages are imported, in whichever order.
import_after("timm", "timm_selfdistill.backbones")
