"""Accuracy and calibration of classifiers, of one output and of every exit."""

from timm_selfdistill.metrics.classification import ExpectedCalibrationError, TopKAccuracy
from timm_selfdistill.metrics.exits import IGNORED, ExitMetrics, ExitMetricsResult, OutputMetrics

__all__ = [
    "IGNORED",
    "ExitMetrics",
    "ExitMetricsResult",
    "ExpectedCalibrationError",
    "OutputMetrics",
    "TopKAccuracy",
]
