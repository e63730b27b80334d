"""`timm-selfdistill recipes`: the names of the shipped recipes."""

import argparse

from timm_selfdistill.recipe import list_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(arguments: argparse.Namespace) -> None:
    print("\n".join(list_recipes()))
