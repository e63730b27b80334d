"""The command `timm-selfdistill`: argument parsing only."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_selfdistill.recipe import list_recipes
from timm_selfdistill.report import format_table
from timm_selfdistill.train import add_arguments, evaluate_folder, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, or 2 for arguments that cannot work."""
    parser = argparse.ArgumentParser(prog="timm-selfdistill", description="Turn a timm backbone into its own teacher.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train from a recipe (the same as accelerate launch's module)")
    add_arguments(train)
    train.set_defaults(run=run_command)

    evaluate = commands.add_parser("evaluate", help="report every exit of a trained model on a data set")
    evaluate.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")
    evaluate.add_argument("--data", help="data set: a hub name or a path; the run's own by default")
    evaluate.add_argument("--output", type=Path, help="folder for report.json, report.md and report.png")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section, such as eval_split=val"
    )
    evaluate.set_defaults(run=_evaluate)

    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(run=_recipes)

    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes key=value only in one place; here they may stand behind an option too.
    unknown = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    status: int = parsed.run(parsed)
    return status


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        report = evaluate_folder(arguments.folder, arguments.data, arguments.overrides, arguments.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(report))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    print("\n".join(list_recipes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
