"""The command `timm-selfdistill`: its subcommands, each a module with `add_arguments(parser)` and `run(arguments)`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from timm_selfdistill.program import run_program
from timm_selfdistill.stop import leave_on_signals

# By name, the line in the help. A command's module in this folder has its name, except for those below.
COMMANDS: Final = {
    "train": "train from a recipe (the same as accelerate launch's module)",
    "finish": "make the report and the model of a run that was stopped",
    "compare": "train a recipe with several losses and seeds, side by side",
    "evaluate": "report every exit of a trained model on a data set",
    "calibrate": "choose when a trained model answers early, by images that it was not trained on",
    "analyze": "measure on a trained model why the method works: noise on weights, gradients, features",
    "predict": "classify image files",
    "export": "write the network up to an exit as safetensors, torch.export or ONNX",
    "push": "push a trained model to the Hugging Face Hub",
    "exits": "show where exits could hang on a timm model, and what they would cost",
    "recipes": "list the shipped recipes",
}
# accelerate launch also starts these as programs of their own.
_PROGRAMS: Final = {"train": "timm_selfdistill.train.command", "compare": "timm_selfdistill.compare.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, or another that docs/train.md lists; of predict also 1."""
    if arguments is None:
        # Importing torch takes seconds, in which Ctrl-C would end in a traceback.
        leave_on_signals()
    words = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="timm-selfdistill", description="Turn a timm backbone into its own teacher.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name == chosen:
            module = import_module(_PROGRAMS.get(name, f"timm_selfdistill.cli.{name}"))
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return run_program(parser, arguments)
