"""The scalable-depth report: what every exit costs and how good it is."""

from timm_selfdistill.report.build import EnsembleRow, ExitRow, Report, build_report, device_name
from timm_selfdistill.report.cost import seconds_of, synchronize
from timm_selfdistill.report.picture import draw_report
from timm_selfdistill.report.write import format_markdown, format_table, write_report

__all__ = [
    "EnsembleRow",
    "ExitRow",
    "Report",
    "build_report",
    "device_name",
    "draw_report",
    "format_markdown",
    "format_table",
    "seconds_of",
    "synchronize",
    "write_report",
]
