"""Choose temperatures and thresholds of early exit on held-out images, and report what they give on others."""

from timm_selfdistill.lazy import needs_extra

with needs_extra(__name__):
    from timm_selfdistill.calibration.calibrate import calibrate_folder as calibrate_folder
    from timm_selfdistill.calibration.calibration_images import held_out_images as held_out_images
    from timm_selfdistill.calibration.calibration_page import format_calibration as format_calibration
    from timm_selfdistill.calibration.calibration_report import CalibrationReport as CalibrationReport
    from timm_selfdistill.calibration.choose_settings import CONFIDENCE as CONFIDENCE
    from timm_selfdistill.calibration.choose_settings import Choice as Choice
    from timm_selfdistill.calibration.choose_settings import Goal as Goal
    from timm_selfdistill.calibration.choose_settings import choose_settings as choose_settings
    from timm_selfdistill.early_exit import PathCosts as PathCosts
    from timm_selfdistill.early_exit import measure_path_macs as measure_path_macs
    from timm_selfdistill.early_exit import measure_path_seconds as measure_path_seconds
    from timm_selfdistill.early_exit import replay as replay
    from timm_selfdistill.exit_logits import ExitLogits as ExitLogits
    from timm_selfdistill.exit_logits import collect_logits as collect_logits
    from timm_selfdistill.exit_logits import fit_temperatures as fit_temperatures
