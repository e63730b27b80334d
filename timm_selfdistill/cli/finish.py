"""`timm-selfdistill finish`: the report and the model of a run that was stopped."""

import argparse
from pathlib import Path

from timm_selfdistill.report import format_table
from timm_selfdistill.train import finish_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the run's folder")


def run(arguments: argparse.Namespace) -> None:
    print(format_table(finish_folder(arguments.folder)))
    print(f"\nWritten to {arguments.folder}: report.json, report.md, report.png, model/")
