"""The scalable-depth report: what every exit costs and how good it is."""

from timm_selfdistill.report.build import EnsembleRow, ExitRow, Report, build_report
from timm_selfdistill.report.picture import draw_report
from timm_selfdistill.report.write import format_markdown, format_table, replace_file, write_report

__all__ = [
    "EnsembleRow",
    "ExitRow",
    "Report",
    "build_report",
    "draw_report",
    "format_markdown",
    "format_table",
    "replace_file",
    "write_report",
]
