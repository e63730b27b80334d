"""The scalable-depth report: what every exit costs and how good it is."""

from timm_selfdistill.report.report_content import Report as Report
from timm_selfdistill.report.report_content import build_report as build_report
from timm_selfdistill.report.report_content import device_name as device_name
from timm_selfdistill.report.report_content import versions as versions
from timm_selfdistill.report.report_page import draw_report as draw_report
from timm_selfdistill.report.report_page import format_markdown as format_markdown
from timm_selfdistill.report.report_page import format_table as format_table
from timm_selfdistill.report.report_page import write_report as write_report
