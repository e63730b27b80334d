"""Choose temperatures and thresholds of early exit on held-out images, and report what they give on others."""

from timm_selfdistill.calibration.calibrate import calibrate_folder
from timm_selfdistill.calibration.calibration_page import format_calibration
from timm_selfdistill.calibration.calibration_report import CalibrationReport
from timm_selfdistill.calibration.choose_settings import CONFIDENCE, Choice, Goal, choose_settings
from timm_selfdistill.calibration.path_costs import PathCosts, measure_path_macs, measure_path_seconds
from timm_selfdistill.early_exit import replay
from timm_selfdistill.exit_logits import ExitLogits, collect_logits, fit_temperatures

__all__ = [
    "CONFIDENCE",
    "CalibrationReport",
    "Choice",
    "ExitLogits",
    "Goal",
    "PathCosts",
    "calibrate_folder",
    "choose_settings",
    "collect_logits",
    "fit_temperatures",
    "format_calibration",
    "measure_path_macs",
    "measure_path_seconds",
    "replay",
]
