"""What the method's paper explains its gain by, measured on a saved model: flat minima, gradients, features."""

from timm_selfdistill.analysis.gradients import find_stages, measure_gradients
from timm_selfdistill.analysis.noise import measure_noise
from timm_selfdistill.analysis.report import Analysis
from timm_selfdistill.analysis.run import DRAWS, IMAGES, SIGMAS, analyze_folder
from timm_selfdistill.analysis.separability import collect_features, measure_scatter, project
from timm_selfdistill.analysis.write import format_analysis

__all__ = [
    "DRAWS",
    "IMAGES",
    "SIGMAS",
    "Analysis",
    "analyze_folder",
    "collect_features",
    "find_stages",
    "format_analysis",
    "measure_gradients",
    "measure_noise",
    "measure_scatter",
    "project",
]
