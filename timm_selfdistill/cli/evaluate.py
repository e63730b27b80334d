"""`timm-selfdistill evaluate`: a report of every exit on a data set."""

import argparse
from pathlib import Path

from timm_selfdistill.cli.options import add_data_overrides, add_from_checkpoint, add_run_folder
from timm_selfdistill.report import format_table
from timm_selfdistill.train import evaluate_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    parser.add_argument("--data", help="data set: a hub name or a path; the run's own by default")
    parser.add_argument("--output", type=Path, help="folder for report.json, report.md and report.png")
    add_from_checkpoint(parser)
    add_data_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    report = evaluate_folder(
        arguments.folder,
        arguments.data,
        arguments.overrides,
        arguments.output,
        from_checkpoint=arguments.from_checkpoint,
    )
    print(format_table(report))
