"""Training from a recipe, with Accelerate."""

from timm_selfdistill.stop import Interrupted as Interrupted
from timm_selfdistill.train.builders import build_loss as build_loss
from timm_selfdistill.train.evaluation import evaluate_folder as evaluate_folder
from timm_selfdistill.train.evaluation import evaluate_model as evaluate_model
from timm_selfdistill.train.evaluation import finish_folder as finish_folder
from timm_selfdistill.train.run import main as main
from timm_selfdistill.train.run import train as train
from timm_selfdistill.train.run_folder import finished_report as finished_report
from timm_selfdistill.train.saved_run import as_begun as as_begun
from timm_selfdistill.train.saved_run import opened_run as opened_run
