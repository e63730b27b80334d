"""Training from a recipe, with Accelerate."""

from timm_selfdistill.train.command import main
from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model
from timm_selfdistill.train.finish import finish_folder
from timm_selfdistill.train.from_checkpoint import opened_run
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import train
from timm_selfdistill.train.run_folder import finished_report

__all__ = [
    "build_loss",
    "evaluate_folder",
    "evaluate_model",
    "finish_folder",
    "finished_report",
    "main",
    "opened_run",
    "train",
]
