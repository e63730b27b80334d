"""The command `timm-selfdistill` and its subcommands, whose modules are imported when they are run."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from timm_selfdistill import __version__
from timm_selfdistill.escape import printable
from timm_selfdistill.lazy import MissingExtraError, needs_extra
from timm_selfdistill.program import run_program
from timm_selfdistill.recipe import list_recipes, read_shipped, summary_of
from timm_selfdistill.stop import leave_on_signals

# By name, where a command is and its line in the help. A module's `COMMANDS` holds for each a function that adds its
# arguments to a parser, and one that takes their values by name and returns an exit status, or None for 0.
_COMMANDS: Final = {
    "init": ("starter", "look at your images and write a recipe that suits them"),
    "train": ("train.run", "train from a recipe (the same as accelerate launch's module)"),
    "finish": ("cli_commands", "make the report and the model of a run that was stopped"),
    "compare": ("compare", "train a recipe with several losses and seeds, side by side"),
    "evaluate": ("cli_commands", "report every exit of a trained model on a data set"),
    "calibrate": ("cli_commands", "choose when a trained model answers early, by images that it was not trained on"),
    "analyze": (
        "cli_commands",
        "measure on a trained model why the method works: noise on weights, gradients, features",
    ),
    "predict": ("cli_commands", "classify image files"),
    "export": ("cli_commands", "write the network up to an exit as safetensors, torch.export or ONNX"),
    "push": ("cli_commands", "push a trained model to the Hugging Face Hub"),
    "exits": ("cli_commands", "show where a timm model can have exits, and what they would cost"),
    "recipes": ("cli", "list the shipped recipes, print or copy one"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, or another that docs/train.md lists; of predict also 1."""
    if arguments is None:
        # Importing torch takes seconds, in which Ctrl-C would end in a traceback.
        leave_on_signals()
    words = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="timm-selfdistill", description="Turn a timm backbone into its own teacher.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, line) in _COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name == chosen:
            try:
                with needs_extra(f"timm-selfdistill {name}"):
                    add_arguments, run = import_module(f"timm_selfdistill.{module}").COMMANDS[name]
                    add_arguments(command)
            except MissingExtraError as error:
                command.exit(2, f"error: {error}\n")
            command.set_defaults(run=run)
    return run_program(parser, arguments)


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this recipe in place of the list")
    parser.add_argument(
        "--copy",
        dest="copy_to",
        nargs="?",
        const="",
        metavar="FILE",
        help="copy it to a file that is not there yet, by default NAME.yaml",
    )


def _recipes(name: str | None, copy_to: str | None) -> None:
    """List the shipped recipes, or print or copy one."""
    if name is None:
        if copy_to is not None:
            raise ValueError("--copy needs the name of a recipe.")
        width = max(map(len, list_recipes()))
        for each in list_recipes():
            print(f"{each:<{width}}  {summary_of(each)}")
        return
    text = read_shipped(name)
    if copy_to is None:
        print(text, end="")
        return
    file = Path(copy_to or f"{name}.yaml").expanduser()
    try:
        with file.open("x", encoding="utf-8") as copied:
            copied.write(text)
    except FileExistsError:
        raise ValueError(f"{file} is there already: give --copy another file.") from None
    print(f"Written to {printable(file)}. Train with:\n  timm-selfdistill train {printable(file)}")


COMMANDS: Final = {"recipes": (_add_recipes, _recipes)}

if __name__ == "__main__":
    sys.exit(main())
