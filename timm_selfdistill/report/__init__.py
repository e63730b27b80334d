"""The scalable-depth report: what every exit costs and how good it is."""

from timm_selfdistill.report.report_content import Report, build_report, device_name, versions
from timm_selfdistill.report.report_page import draw_report, format_markdown, format_table, write_report

__all__ = [
    "Report",
    "build_report",
    "device_name",
    "draw_report",
    "format_markdown",
    "format_table",
    "versions",
    "write_report",
]
