"""Training from a recipe, with Accelerate."""

from timm_selfdistill.stop import Interrupted
from timm_selfdistill.train.command import main
from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model, finish_folder
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import train
from timm_selfdistill.train.run_folder import finished_report
from timm_selfdistill.train.saved_run import opened_run

__all__ = [
    "Interrupted",
    "build_loss",
    "evaluate_folder",
    "evaluate_model",
    "finish_folder",
    "finished_report",
    "main",
    "opened_run",
    "train",
]
