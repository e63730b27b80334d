"""`timm-selfdistill predict`: classify image files."""

import argparse

from timm_selfdistill.cli.options import add_model_source, exit_choice, model_source
from timm_selfdistill.predict import BATCH_SIZE, print_predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    parser.add_argument("images", nargs="+", help="files, folders, or - for a list on the standard input, one a line")
    answering = parser.add_mutually_exclusive_group()
    answering.add_argument(
        "--exit",
        type=exit_choice,
        metavar="K|ensemble",
        help="index of the one exit that answers, 0 the shallowest, or ensemble: all together",
    )
    answering.add_argument(
        "--threshold", type=float, help="let images leave at any exit with this confidence, whatever is saved"
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="print the N most likely classes")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images at a time")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode images")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    with model_source(arguments) as source:
        return print_predictions(
            source,
            arguments.images,
            exit=arguments.exit,
            threshold=arguments.threshold,
            top_k=arguments.top_k,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            as_json=arguments.json,
        )
