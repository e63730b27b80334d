"""What the method's paper explains its gain by, measured on a saved model: flat minima, gradients, features."""

from timm_selfdistill.analysis.analysis_page import Analysis, format_analysis
from timm_selfdistill.analysis.folder_analysis import DRAWS, IMAGES, SIGMAS, analyze_folder

__all__ = ["DRAWS", "IMAGES", "SIGMAS", "Analysis", "analyze_folder", "format_analysis"]
