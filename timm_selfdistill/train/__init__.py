"""Training from a recipe, with Accelerate."""

from timm_selfdistill.train.evaluation import evaluate_folder, evaluate_model
from timm_selfdistill.train.run import add_arguments, main, run_command, train

__all__ = ["add_arguments", "evaluate_folder", "evaluate_model", "main", "run_command", "train"]
