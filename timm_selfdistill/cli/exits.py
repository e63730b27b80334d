"""`timm-selfdistill exits`: where exits could hang on a timm model."""

import argparse

from timm_selfdistill.cli.options import add_image_size
from timm_selfdistill.preview import format_preview, preview_exits
from timm_selfdistill.recipe import read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument(
        "--num", type=int, help="how many exits to mark; by default three, or fewer on a small backbone"
    )
    add_image_size(parser)
    parser.add_argument("--num-classes", type=int, help="number of classes; the model's default otherwise")
    parser.add_argument("--head", default="auto", help="head of every exit; by default chosen by the tapped tensor")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="arguments of timm.create_model, such as in_chans=1"
    )


def run(arguments: argparse.Namespace) -> None:
    preview = preview_exits(
        arguments.model,
        exits=arguments.num,
        head=arguments.head,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        model_kwargs=read_settings(arguments.overrides),
    )
    print(format_preview(preview))
