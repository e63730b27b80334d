"""The command `timm-selfdistill`: argument parsing only."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from timm_selfdistill import compare
from timm_selfdistill.analysis import DRAWS, IMAGES, SIGMAS, analyze_folder, format_analysis
from timm_selfdistill.background import in_background
from timm_selfdistill.calibration import CONFIDENCE, Goal, calibrate_folder, format_calibration
from timm_selfdistill.early_exit import FALLBACKS, list_rules
from timm_selfdistill.escape import printable
from timm_selfdistill.export import FORMATS, ExportError, export_folder
from timm_selfdistill.hub import push_folder
from timm_selfdistill.predict import BATCH_SIZE, print_predictions
from timm_selfdistill.preview import format_preview, preview_exits
from timm_selfdistill.recipe import list_recipes, read_settings
from timm_selfdistill.report import format_table
from timm_selfdistill.train import (
    add_arguments,
    end_program,
    evaluate_folder,
    finish_folder,
    opened_run,
    run_command,
    run_safely,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, or another that docs/train.md lists; of predict also 1."""
    parser = argparse.ArgumentParser(prog="timm-selfdistill", description="Turn a timm backbone into its own teacher.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train from a recipe (the same as accelerate launch's module)")
    add_arguments(train)
    train.set_defaults(run=run_command)

    finish = commands.add_parser("finish", help="make the report and the model of a run that was stopped")
    finish.add_argument("folder", type=Path, help="the run's folder")
    finish.set_defaults(run=_finish)

    comparison = commands.add_parser("compare", help="train a recipe with several losses and seeds, side by side")
    compare.add_arguments(comparison)
    comparison.set_defaults(run=compare.run_command)

    evaluate = commands.add_parser("evaluate", help="report every exit of a trained model on a data set")
    evaluate.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")
    evaluate.add_argument("--data", help="data set: a hub name or a path; the run's own by default")
    evaluate.add_argument("--output", type=Path, help="folder for report.json, report.md and report.png")
    evaluate.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section, such as eval_split=val"
    )
    evaluate.set_defaults(run=_evaluate)

    calibrate = commands.add_parser(
        "calibrate", help="choose when a trained model answers early, by images that it was not trained on"
    )
    calibrate.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")
    goal = calibrate.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="as cheap as possible, at most so many percentage points of top-1 accuracy below the backbone's own "
        "classifier on the calibration split",
    )
    goal.add_argument("--speedup", type=float, help="as accurate as possible, so many times cheaper")
    goal.add_argument("--macs-budget", type=float, metavar="MACS", help="the same for mean MACs of an image")
    goal.add_argument(
        "--risk",
        type=float,
        help="as cheap as possible, and certainly (see --confidence) at most this share of new images answered wrong "
        "that the backbone's own classifier gets right",
    )
    calibrate.add_argument("--confidence", type=float, help=f"confidence of --risk; {CONFIDENCE} by default")
    calibrate.add_argument("--split", help="split to calibrate on; what the run held out for validation by default")
    calibrate.add_argument("--data", help="data set of both splits: a hub name or a path; the run's own by default")
    calibrate.add_argument("--rule", choices=list_rules(), default="max-softmax", help="what confidence is")
    calibrate.add_argument("--fallback", choices=FALLBACKS, default="last", help="who answers when no exit is sure")
    calibrate.add_argument(
        "--by-time", type=int, metavar="N", help="choose by the time of batches of N images here, in place of MACs"
    )
    calibrate.add_argument("--output", type=Path, help="folder for calibration.json, .md, .png; the run's by default")
    calibrate.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )
    calibrate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section, such as eval_split=val"
    )
    calibrate.set_defaults(run=_calibrate)

    analyze = commands.add_parser(
        "analyze", help="measure on a trained model why the method works: noise on weights, gradients, features"
    )
    analyze.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")
    analyze.add_argument("--data", help="data set: a hub name or a path; the run's own by default")
    analyze.add_argument(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="a run whose backbone to draw beside; the run's own baseline by default, if its checkpoint is there",
    )
    analyze.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"at most so many; {IMAGES} by default"
    )
    analyze.add_argument(
        "--sigmas",
        type=_numbers,
        default=SIGMAS,
        metavar="S,S,...",
        help=f"standard deviations of the noise; by default 0 to {SIGMAS[-1]:g} in steps of {SIGMAS[1]:g}",
    )
    analyze.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the noise; {DRAWS} by default")
    analyze.add_argument("--seed", type=int, default=0, help="of the noise")
    analyze.add_argument("--output", type=Path, help="folder for analysis.json, .md, .png; the run's by default")
    analyze.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section, such as eval_split=val"
    )
    analyze.set_defaults(run=_analyze)

    predict = commands.add_parser("predict", help="classify image files")
    predict.add_argument("folder", help="a run's folder, the model folder in it, or a repository on the Hub")
    predict.add_argument("images", nargs="+", help="files, folders, or - for a list on the standard input, one a line")
    exit = predict.add_mutually_exclusive_group()
    exit.add_argument("--exit", type=int, metavar="K", help="index of the one exit that answers, 0 the shallowest")
    exit.add_argument("--threshold", type=float, help="let images leave at any exit that is so sure, whatever is saved")
    predict.add_argument("--top-k", type=int, default=1, metavar="N", help="print the N most likely classes")
    predict.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images at a time")
    predict.add_argument("--workers", type=int, metavar="N", help="processes that decode images")
    predict.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )
    predict.add_argument("--json", action="store_true", help="print one JSON object a line")
    predict.set_defaults(run=_predict)

    export = commands.add_parser("export", help="write the network up to an exit as safetensors, torch.export or ONNX")
    export.add_argument("folder", help="a run's folder, the model folder in it, or a repository on the Hub")
    export.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    export.add_argument("--exit", type=int, metavar="K", help="index of the exit; the backbone's own by default")
    export.add_argument("--dynamic-batch", action="store_true", help="take batches of any size, not only one image")
    export.add_argument("--image-size", type=_size, metavar="N or HxW", help="side of the image in pixels, or both")
    export.add_argument("--output", type=Path, help="where to write; by default exit-K with an ending, in the folder")
    export.add_argument(
        "--from-checkpoint", action="store_true", help="take the newest checkpoint of a run that was stopped"
    )
    export.add_argument("--force", action="store_true", help="replace what an earlier export wrote there")
    export.set_defaults(run=_export)

    push = commands.add_parser("push", help="push a trained model to the Hugging Face Hub")
    push.add_argument("folder", type=Path, help="a run's folder, or the model folder in it")
    push.add_argument("repo", help="the repository, as namespace/name; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.add_argument("--pr", action="store_true", help="open a pull request")
    push.add_argument("--revision", help="branch to push to; the main branch by default")
    push.add_argument("--message", help="what the commit says")
    push.add_argument("--license", help="licence of the weights, by its identifier on the Hub, such as apache-2.0")
    push.set_defaults(run=_push)

    exits = commands.add_parser("exits", help="show where exits could hang on a timm model, and what they would cost")
    exits.add_argument("model", help="name of a timm model")
    exits.add_argument("--num", type=int, help="how many exits to mark; by default three, or fewer on a small backbone")
    exits.add_argument("--image-size", type=_size, metavar="N or HxW", help="side of the image in pixels, or both")
    exits.add_argument("--num-classes", type=int, help="number of classes; the model's default otherwise")
    exits.add_argument("--head", default="auto", help="head of every exit; by default chosen by the tapped tensor")
    exits.add_argument(
        "overrides", nargs="*", metavar="key=value", help="arguments of timm.create_model, such as in_chans=1"
    )
    exits.set_defaults(run=_exits)

    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(run=_recipes)

    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes key=value only in one place; here they may stand behind an option too.
    unknown = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    status = run_safely(partial(_run, parsed))
    if arguments is None:
        end_program(status)
    return status


def _run(parsed: argparse.Namespace) -> int:
    try:
        status: int = parsed.run(parsed)
    except ExportError as error:
        raise ValueError(str(error)) from error
    return status


def _finish(arguments: argparse.Namespace) -> int:
    def finish() -> None:
        print(format_table(finish_folder(arguments.folder)))
        print(f"\nWritten to {arguments.folder}: report.json, report.md, report.png, model/")

    return run_safely(finish)


def _evaluate(arguments: argparse.Namespace) -> int:
    report = evaluate_folder(
        arguments.folder,
        arguments.data,
        arguments.overrides,
        arguments.output,
        from_checkpoint=arguments.from_checkpoint,
    )
    print(format_table(report))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    if arguments.confidence is not None and arguments.risk is None:
        raise ValueError("--confidence is that of --risk, which is not given.")
    goal = Goal(
        max_accuracy_drop=arguments.max_accuracy_drop,
        speedup=arguments.speedup,
        macs_budget=arguments.macs_budget,
        risk=arguments.risk,
        confidence=CONFIDENCE if arguments.confidence is None else arguments.confidence,
    )
    report = calibrate_folder(
        arguments.folder,
        goal,
        data_path=arguments.data,
        split=arguments.split,
        overrides=arguments.overrides,
        rule=arguments.rule,
        fallback=arguments.fallback,
        time_batch_size=arguments.by_time,
        output=arguments.output,
        from_checkpoint=arguments.from_checkpoint,
    )
    print(format_calibration(report))
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
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
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    with _model_source(arguments) as source:
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


def _export(arguments: argparse.Namespace) -> int:
    with _model_source(arguments) as source:
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
    return 0


@contextmanager
def _model_source(arguments: argparse.Namespace) -> Iterator[str]:
    """Give the body the folder or repository of the model that the arguments name."""
    if not arguments.from_checkpoint:
        yield arguments.folder
        return
    with opened_run(Path(arguments.folder), from_checkpoint=True) as saved:
        yield str(saved.model_folder)


def _push(arguments: argparse.Namespace) -> int:
    push = partial(
        push_folder,
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.pr,
        commit_message=arguments.message,
        license=arguments.license,
    )
    print(printable(in_background(push, "push").result()))
    return 0


def _size(text: str) -> tuple[int, int]:
    """Read "224" or "224x192" as height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or two as in 224x192, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None


def _exits(arguments: argparse.Namespace) -> int:
    preview = preview_exits(
        arguments.model,
        exits=arguments.num,
        head=arguments.head,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        model_kwargs=read_settings(arguments.overrides),
    )
    print(format_preview(preview))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    print("\n".join(list_recipes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
