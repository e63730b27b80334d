"""Training from a recipe, with Accelerate."""

from timm_selfdistill.train.command import add_arguments, main, run_command, run_safely
from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import train
from timm_selfdistill.train.run_folder import finished_report

__all__ = [
    "add_arguments",
    "build_loss",
    "evaluate_folder",
    "evaluate_model",
    "finished_report",
    "main",
    "run_command",
    "run_safely",
    "train",
]
