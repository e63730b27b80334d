"""Classify image files, from Python and from the command line."""

from timm_selfdistill.predict.command import find_images, print_predictions
from timm_selfdistill.predict.images import BATCH_SIZE, Prediction, predict_images

__all__ = ["BATCH_SIZE", "Prediction", "find_images", "predict_images", "print_predictions"]
