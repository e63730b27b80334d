"""Training from a recipe, with Accelerate."""

from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import add_arguments, finished_report, main, run_command, run_safely, train

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
