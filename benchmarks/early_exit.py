"""Measure the throughput of a trained network: plain timm, cut at each exit, and with early exit, in turns.

Run from the repository root, with the package installed: python benchmarks/early_exit.py RUN
What each column means is told in benchmarks/README.md.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.calibration import (
    ExitLogits,
    Goal,
    PathCosts,
    choose_settings,
    collect_logits,
    measure_path_macs,
    measure_path_seconds,
)
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import replay
from timm_selfdistill.measure import seconds_of
from timm_selfdistill.recipe import Recipe, load_recipe

DROPS = (0.0, 0.5, 1.0)


@dataclass
class Way:
    """One way to classify images.

    Args:
        name: What the table calls it.
        run: From images to an answer.
        top1: Accuracy in percent on the whole evaluation split.
        macs: Mean multiply-accumulates of an image.
    """

    name: str
    run: Callable[[Tensor], object]
    top1: float
    macs: float


@torch.inference_mode()
def main() -> int:
    """Print one table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that held out images for validation")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--images", type=int, default=1024, help="images to time, from the evaluation split's start")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way classifies them")
    parser.add_argument("--rule", default="max-softmax", help="what confidence is")
    parser.add_argument("--fallback", default="last", help="who answers for images that no exit is sure of")
    parser.add_argument("--by-time", action="store_true", help="choose thresholds by time, for each batch size")
    parser.add_argument("--channels-last", action="store_true", help="keep images and weights in that memory layout")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    recipe = load_recipe(arguments.run / "recipe.yaml")
    model = sd.from_pretrained(arguments.run / "model").to(arguments.device, memory_format=layout)
    input = InputConfig.from_model(model.backbone, recipe.data)
    loaders = load(recipe, input)
    assert loaders.validation is not None, "the run held out no images for validation"
    validation, evaluation = collect_logits(model, loaders.validation), collect_logits(model, loaders.eval)
    macs = measure_path_macs(model, (input.channels, *input.image_size))
    baseline = baseline_accuracy(arguments.run)
    images = first_images(loaders, arguments.images).to(arguments.device)
    fixed = fixed_ways(model, evaluation, macs, baseline["test"])
    for batch_size in arguments.batch_sizes:
        size = (input.channels, *input.image_size)
        costs = measure_path_seconds(model, size, batch_size) if arguments.by_time else macs
        ways = [*fixed, *early_exit_ways(model, validation, evaluation, macs, costs, baseline["validation"], arguments)]
        few = images[: min(len(images), max(128, 4 * batch_size))]
        print_table(ways, [part.contiguous(memory_format=layout) for part in few.split(batch_size)], arguments.rounds)
    print(
        f"\n{model.pretrained_cfg['architecture']}, {recipe.data.image_size} px, float32, {arguments.device}, "
        f"{'channels_last' if arguments.channels_last else 'channels first'}; thresholds chosen on "
        f"{len(validation):,} held-out images, accuracy on {len(evaluation):,} others; rule {arguments.rule}, fallback "
        f"{arguments.fallback}, by {'time' if arguments.by_time else 'MACs'}"
    )
    versions = f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads"
    print(f"{versions}, {platform.processor() or platform.machine()}\ncommand: python {shlex.join(sys.argv)}")
    return 0


def load(recipe: Recipe, input: InputConfig) -> Loaders:
    """Return the loaders of a run's data."""
    data = open_dataset(recipe.data, recipe.seed)
    return build_loaders(
        data, recipe.data, recipe.augment, input, batch_size=128, accelerator_shards=(0, 1), seed=recipe.seed
    )


def first_images(loaders: Loaders, count: int) -> Tensor:
    """Return the first images of the evaluation split."""
    batches, found = [], 0
    for images, _ in loaders.eval:
        batches.append(images)
        found += len(images)
        if found >= count:
            break
    return torch.cat(batches)[:count]


def baseline_accuracy(run: Path) -> dict[str, float | None]:
    """Return the top-1 accuracy in percent of the plain backbone that was trained beside, if there is one."""
    report = json.loads((run / "report.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line["baseline/validation/top1/0"] for line in lines if "baseline/validation/top1/0" in line]
    test = None if report["baseline"] is None else report["baseline"]["top1"]
    return {"test": test, "validation": validated[-1] if validated else None}


def fixed_ways(
    model: sd.SelfDistillModel, evaluation: ExitLogits, macs: PathCosts, baseline: float | None
) -> list[Way]:
    """Return plain timm, of which the time counts only (it has the accuracy of its own training), and each exit."""
    top1 = [100 * float(right.double().mean()) for right in evaluation.correct]
    plain: nn.Module = sd.truncate(model, model.num_exits)
    ways = [Way("plain timm", plain, float("nan") if baseline is None else baseline, macs.full)]
    ways += [
        Way(f"exit {index}", sd.truncate(model, index), top1[index], macs.exit(index))
        for index in range(model.num_exits)
    ]
    return [*ways, Way("backbone", model, top1[-1], macs.full)]


def early_exit_ways(
    model: sd.SelfDistillModel,
    validation: ExitLogits,
    evaluation: ExitLogits,
    macs: PathCosts,
    costs: PathCosts,
    baseline: float | None,
    arguments: argparse.Namespace,
) -> list[Way]:
    """Return early exit for each drop in accuracy, from the network's own backbone and from the baseline's."""
    own = 100 * float(validation.correct[-1].double().mean())
    goals = [(f"early exit, -{drop:g}", drop) for drop in DROPS]
    if baseline is not None and own > baseline:
        goals.append(("early exit, as baseline", own - baseline))
    ways = []
    for name, drop in goals:
        goal = Goal(max_accuracy_drop=drop)
        config = choose_settings(validation, costs, goal, rule=arguments.rule, fallback=arguments.fallback).config
        answers = replay(config, evaluation.logits, evaluation.ensemble)
        top1 = 100 * float((answers.logits.argmax(-1) == evaluation.targets).double().mean())
        ways.append(Way(name, sd.EarlyExit.from_config(model, config), top1, macs.mean(config, answers.exit_index)))
    return ways


def print_table(ways: list[Way], batches: list[Tensor], rounds: int) -> None:
    """Time all ways on the same images, batch by batch in turns, and print a row for each."""
    for way in ways:
        way.run(batches[0])
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        totals = [0.0] * len(ways)
        for batch in batches:
            for index, way in enumerate(ways):
                totals[index] += seconds_of(partial(way.run, batch), batch.device)
        for taken, total in zip(seconds, totals, strict=True):
            taken.append(total)
    count = sum(map(len, batches))
    print(f"\nbatch size {len(batches[0])}, {count} images, {rounds} rounds")
    print(f"{'':>24}  {'top-1 %':>7}  {'images/s':>8}  {'speed-up':>8}  {'range':>11}  {'by MACs':>7}  {'share %':>7}")
    for way, taken in zip(ways, seconds, strict=True):
        ratios = [plain / own for plain, own in zip(seconds[0], taken, strict=True)]
        ratio, possible = statistics.median(ratios), ways[0].macs / way.macs
        print(
            f"{way.name:>24}  {way.top1:>7.2f}  {count / statistics.median(taken):>8.1f}  {ratio:>7.2f}x  "
            f"{min(ratios):>5.2f}-{max(ratios):.2f}  {possible:>6.2f}x  {100 * ratio / possible:>7.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
