"""The self-distilling model: a timm backbone with classifiers on its intermediate features."""

from timm_selfdistill.model.ensemble import Ensemble as Ensemble
from timm_selfdistill.model.network import ExitOutput as ExitOutput
from timm_selfdistill.model.network import SelfDistillModel as SelfDistillModel
from timm_selfdistill.model.network import wrap as wrap
from timm_selfdistill.model.timm_models import create_backbone as create_backbone
from timm_selfdistill.model.timm_models import with_image_size as with_image_size
