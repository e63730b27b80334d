"""What the method's paper explains its gain by, measured on a saved model: flat minima, gradients, features."""

from timm_selfdistill.analysis.analysis_page import Analysis as Analysis
from timm_selfdistill.analysis.analysis_page import format_analysis as format_analysis
from timm_selfdistill.analysis.folder_analysis import DRAWS as DRAWS
from timm_selfdistill.analysis.folder_analysis import IMAGES as IMAGES
from timm_selfdistill.analysis.folder_analysis import SIGMAS as SIGMAS
from timm_selfdistill.analysis.folder_analysis import analyze_folder as analyze_folder
