"""Choose temperatures and thresholds of early exit on held-out images, and report what they give on others."""

from timm_selfdistill.calibration.calibration_page import format_calibration
from timm_selfdistill.calibration.costs import PathCosts, measure_path_macs, measure_path_seconds
from timm_selfdistill.calibration.goal import CONFIDENCE, Choice, Goal, choose_settings
from timm_selfdistill.calibration.logits import ExitLogits, collect_logits, replay
from timm_selfdistill.calibration.report import CalibrationReport
from timm_selfdistill.calibration.run import calibrate_folder
from timm_selfdistill.calibration.search import Search
from timm_selfdistill.calibration.temperature import fit_temperatures

__all__ = [
    "CONFIDENCE",
    "CalibrationReport",
    "Choice",
    "ExitLogits",
    "Goal",
    "PathCosts",
    "Search",
    "calibrate_folder",
    "choose_settings",
    "collect_logits",
    "fit_temperatures",
    "format_calibration",
    "measure_path_macs",
    "measure_path_seconds",
    "replay",
]
