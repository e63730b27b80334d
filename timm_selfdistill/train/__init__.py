"""Training from a recipe, with Accelerate."""

from timm_selfdistill.train.claim import finished_report
from timm_selfdistill.train.command import add_arguments, log_to_error_output, main, run_command, run_safely
from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import train

__all__ = [
    "add_arguments",
    "build_loss",
    "evaluate_folder",
    "evaluate_model",
    "finished_report",
    "log_to_error_output",
    "main",
    "run_command",
    "run_safely",
    "train",
]
