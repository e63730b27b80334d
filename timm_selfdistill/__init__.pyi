"""Turn any timm backbone into its own teacher: self-distillation with shallow exits."""

from timm_selfdistill.early_exit import EarlyExit as EarlyExit
from timm_selfdistill.early_exit import EarlyExitConfig as EarlyExitConfig
from timm_selfdistill.early_exit import EarlyExitOutput as EarlyExitOutput
from timm_selfdistill.early_exit import list_rules as list_rules
from timm_selfdistill.early_exit import register_rule as register_rule
from timm_selfdistill.exit_logits import fit_ensemble as fit_ensemble
from timm_selfdistill.exits import ExitPoint as ExitPoint
from timm_selfdistill.exits import Tap as Tap
from timm_selfdistill.export import ExportError as ExportError
from timm_selfdistill.export import export_early_exit as export_early_exit
from timm_selfdistill.export import export_model as export_model
from timm_selfdistill.heads import list_heads as list_heads
from timm_selfdistill.heads import register_head as register_head
from timm_selfdistill.hub import HubError as HubError
from timm_selfdistill.hub import from_pretrained as from_pretrained
from timm_selfdistill.hub import load_early_exit as load_early_exit
from timm_selfdistill.hub import load_exported as load_exported
from timm_selfdistill.hub import push_to_hub as push_to_hub
from timm_selfdistill.hub import save_pretrained as save_pretrained
from timm_selfdistill.losses import OutsideTeacher as OutsideTeacher
from timm_selfdistill.losses import OutsideTeacherConfig as OutsideTeacherConfig
from timm_selfdistill.losses import SelfDistillationConfig as SelfDistillationConfig
from timm_selfdistill.losses import SelfDistillationLoss as SelfDistillationLoss
from timm_selfdistill.losses import list_divergences as list_divergences
from timm_selfdistill.losses import list_losses as list_losses
from timm_selfdistill.losses import list_presets as list_presets
from timm_selfdistill.losses import list_teachers as list_teachers
from timm_selfdistill.losses import register_divergence as register_divergence
from timm_selfdistill.losses import register_loss as register_loss
from timm_selfdistill.losses import register_teacher as register_teacher
from timm_selfdistill.model import Ensemble as Ensemble
from timm_selfdistill.model import ExitOutput as ExitOutput
from timm_selfdistill.model import SelfDistillModel as SelfDistillModel
from timm_selfdistill.model import wrap as wrap
from timm_selfdistill.onnx import OnnxEarlyExit as OnnxEarlyExit
from timm_selfdistill.predict import Prediction as Prediction
from timm_selfdistill.predict import predict_images as predict_images
from timm_selfdistill.recipe import list_recipes as list_recipes
from timm_selfdistill.recipe import load_recipe as load_recipe
from timm_selfdistill.task import SelfDistillationTask as SelfDistillationTask
from timm_selfdistill.task import scale_heads_lr as scale_heads_lr
from timm_selfdistill.train import train as train
from timm_selfdistill.truncation import TruncatedModel as TruncatedModel
from timm_selfdistill.truncation import truncate as truncate

__version__: str
