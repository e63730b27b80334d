"""Networks that end at an exit, as files for use elsewhere."""

from timm_selfdistill.export.errors import ExportError
from timm_selfdistill.export.graphs import METADATA
from timm_selfdistill.export.run import FORMATS, export_folder, export_model

__all__ = ["FORMATS", "METADATA", "ExportError", "export_folder", "export_model"]
