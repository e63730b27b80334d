"""Write networks for use without this package: one exit or all in one graph, or early exit."""

from timm_selfdistill.export.early_exit_graphs import export_early_exit as export_early_exit
from timm_selfdistill.export.graphs import METADATA as METADATA
from timm_selfdistill.export.graphs import ExportError as ExportError
from timm_selfdistill.export.one_graph import FORMATS as FORMATS
from timm_selfdistill.export.one_graph import export_folder as export_folder
from timm_selfdistill.export.one_graph import export_model as export_model
