"""Training from a recipe, with Accelerate."""

from timm_selfdistill.program import run_safely
from timm_selfdistill.train.command import add_arguments, main, run_command
from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model, finish_folder
from timm_selfdistill.train.phases import build_loss
from timm_selfdistill.train.run import train
from timm_selfdistill.train.run_folder import finished_report
from timm_selfdistill.train.saved_run import opened_run
from timm_selfdistill.train.stop import Interrupted, end_program

__all__ = [
    "Interrupted",
    "add_arguments",
    "build_loss",
    "end_program",
    "evaluate_folder",
    "evaluate_model",
    "finish_folder",
    "finished_report",
    "main",
    "opened_run",
    "run_command",
    "run_safely",
    "train",
]
