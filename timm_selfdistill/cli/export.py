"""`timm-selfdistill export`: write the network up to an exit for use elsewhere."""

import argparse
from pathlib import Path

from timm_selfdistill.cli.options import add_image_size, add_model_source, exit_choice, model_source
from timm_selfdistill.escape import printable
from timm_selfdistill.export import FORMATS, export_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    parser.add_argument(
        "--exit",
        type=exit_choice,
        metavar="K|ensemble",
        help="index of the exit, or ensemble: all together; the backbone's own by default",
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="take batches of any size, not only one image")
    add_image_size(parser)
    parser.add_argument(
        "--output", type=Path, help="where to write; by default exit-K or ensemble with an ending, in the folder"
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier export wrote there")


def run(arguments: argparse.Namespace) -> None:
    with model_source(arguments) as source:
        path = export_folder(
            source,
            arguments.exit,
            arguments.output,
            format=arguments.format,
            dynamic_batch=arguments.dynamic_batch,
            image_size=arguments.image_size,
            overwrite=arguments.force,
            default_folder=arguments.folder,
        )
    print(printable(path))
