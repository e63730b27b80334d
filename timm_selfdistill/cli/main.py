"""The command `timm-selfdistill`: which module has which command. Each has `add_arguments(parser)` and `run(args)`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from timm_selfdistill.program import run_program
from timm_selfdistill.stop import leave_on_signals

# By the command's name: its module, and its line in the help.
COMMANDS: Final = {
    "train": (
        "timm_selfdistill.train.command",
        "train from a recipe (the same as accelerate launch's module)",
    ),
    "finish": (
        "timm_selfdistill.cli.finish",
        "make the report and the model of a run that was stopped",
    ),
    "compare": (
        "timm_selfdistill.compare.command",
        "train a recipe with several losses and seeds, side by side",
    ),
    "evaluate": (
        "timm_selfdistill.cli.evaluate",
        "report every exit of a trained model on a data set",
    ),
    "calibrate": (
        "timm_selfdistill.cli.calibrate",
        "choose when a trained model answers early, by images that it was not trained on",
    ),
    "analyze": (
        "timm_selfdistill.cli.analyze",
        "measure on a trained model why the method works: noise on weights, gradients, features",
    ),
    "predict": (
        "timm_selfdistill.cli.predict",
        "classify image files",
    ),
    "export": (
        "timm_selfdistill.cli.export",
        "write the network up to an exit as safetensors, torch.export or ONNX",
    ),
    "push": (
        "timm_selfdistill.cli.push",
        "push a trained model to the Hugging Face Hub",
    ),
    "exits": (
        "timm_selfdistill.cli.exits",
        "show where exits could hang on a timm model, and what they would cost",
    ),
    "recipes": (
        "timm_selfdistill.cli.recipes",
        "list the shipped recipes",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, or another that docs/train.md lists; of predict also 1."""
    if arguments is None:
        # Importing torch takes seconds, in which Ctrl-C would end in a traceback.
        leave_on_signals()
    words = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="timm-selfdistill", description="Turn a timm backbone into its own teacher.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module_name, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return run_program(parser, arguments)
