"""`timm-selfdistill analyze`: measure on a trained model why the method works."""

import argparse
from pathlib import Path

from timm_selfdistill.analysis import DRAWS, IMAGES, SIGMAS, analyze_folder, format_analysis
from timm_selfdistill.cli.options import add_data_overrides, add_run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    parser.add_argument("--data", help="data set: a hub name or a path; the run's own by default")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="a run whose backbone to draw beside; the run's own baseline by default, if its checkpoint is there",
    )
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"at most N; {IMAGES} by default")
    parser.add_argument(
        "--sigmas",
        type=_numbers,
        default=SIGMAS,
        metavar="S,S,...",
        help=f"standard deviations of the noise; by default 0 to {SIGMAS[-1]:g} in steps of {SIGMAS[1]:g}",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the noise; {DRAWS} by default")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="folder for analysis.json, .md, .png; the run's by default")
    add_data_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    analysis = analyze_folder(
        arguments.folder,
        arguments.data,
        arguments.overrides,
        baseline=arguments.baseline,
        images=arguments.images,
        sigmas=arguments.sigmas,
        draws=arguments.draws,
        seed=arguments.seed,
        output=arguments.output,
    )
    print(format_analysis(analysis))


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None
