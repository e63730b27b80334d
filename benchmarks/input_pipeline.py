"""Measure images per second of a recipe's input, image by image and kept on the device, and of training fed by each.

Run from the repository root, with the package installed: python benchmarks/input_pipeline.py RECIPE [key=value ...]
What rows and columns mean is told in benchmarks/README.md.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_selfdistill import SelfDistillationTask
from timm_selfdistill.data.loaders import build_loaders
from timm_selfdistill.data.splits import open_dataset
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.measure import synchronize
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.train.builders import build_loss, build_model, label_smoothing

WARM_UP_STEPS = 3
WAYS = ("image by image", "cache=device", "one fixed batch")
USES = ("input alone", "plain timm", "self-distillation")

Batch = tuple[Tensor, Tensor]


class Step:
    """One training step: forward, loss, backward, SGD.

    Args:
        task: The network and its loss, on the device.
        recipe: Its precision, memory layout and optimizer's momentum.
        device: The device.
    """

    def __init__(self, task: TrainingTask, recipe: Recipe, device: torch.device) -> None:
        self.task, self.device = task.train(), device
        self.bf16 = recipe.precision == "bf16"
        self.memory_format = torch.channels_last if recipe.model.channels_last else torch.contiguous_format
        self.optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def __call__(self, images: Tensor, targets: Tensor) -> None:
        """Train on a batch."""
        images = images.to(self.device, memory_format=self.memory_format)
        targets = targets.to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.task(images, targets)["loss"]
        loss.backward()
        self.optimizer.step()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--batches", type=int, default=20, help="batches of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each cell, all cells in turns")
    parser.add_argument("--only-input", action="store_true", help="train nothing")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch's number of CPU threads")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time: for a busy machine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.precision == "fp16" or recipe.augment.mixes:
        parser.error("this benchmark neither scales losses for precision=fp16 nor mixes images")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    batches, steps = _prepare(recipe, arguments.device)
    uses = USES[:1] if arguments.only_input else USES
    cells = [(way, use) for use in uses for way in WAYS if (way, use) != (WAYS[2], USES[0])]
    for way, use in cells:
        _rate(batches[way], steps.get(use), WARM_UP_STEPS, arguments.device, clock)
    rates: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
    for _ in range(arguments.rounds):
        for way, use in cells:
            rates[way, use].append(_rate(batches[way], steps.get(use), arguments.batches, arguments.device, clock))
    _print(rates, recipe, arguments)
    return 0


def _prepare(recipe: Recipe, device: torch.device) -> tuple[dict[str, Iterator[Batch]], dict[str, Step]]:
    """Return endless batches of each way, and the training steps."""
    torch.manual_seed(recipe.seed)
    data = open_dataset(recipe.data, recipe.seed)
    model = build_model(recipe, data.class_names, data.name).to(device)
    input = InputConfig.from_model(model.backbone, recipe.data)
    ways: dict[str, Iterator[Batch]] = {}
    for way, cache in zip(WAYS, (None, "device"), strict=False):
        section = recipe.data.model_copy(update={"cache": cache})
        sizes: dict[str, Any] = {"batch_size": recipe.batch_size, "accelerator_shards": (0, 1), "seed": recipe.seed}
        ways[way] = _endless(build_loaders(data, section, recipe.augment, input, device=device, **sizes).train)
    images, targets = next(ways[WAYS[1]])
    ways[WAYS[2]] = repeat((images, targets))
    # Of equal weights, but apart from the wrapped network.
    plain = build_model(recipe, data.class_names, data.name).to(device).backbone
    smoothing = label_smoothing(recipe.loss)
    tasks = {
        "plain timm": ClassificationTask(
            plain, nn.CrossEntropyLoss(label_smoothing=smoothing), device=device, verbose=False
        ),
        "self-distillation": SelfDistillationTask(model, build_loss(recipe), device=device, verbose=False),
    }
    if recipe.compile:
        for task in tasks.values():
            task.compile()
    return ways, {name: Step(task, recipe, device) for name, task in tasks.items()}


def _endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    while True:
        yield from loader


def _rate(
    batches: Iterator[Batch], step: Step | None, count: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """Return the images per second of a number of batches, which a step trains on, if any."""
    synchronize(device)
    start, images = clock(), 0
    for _ in range(count):
        batch = next(batches)
        images += len(batch[0])
        if step is not None:
            step(*batch)
    synchronize(device)
    return images / (clock() - start)


def _print(rates: dict[tuple[str, str], list[float]], recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the medians and, in brackets, over image by image of the same column, round by round."""
    uses = list(dict.fromkeys(use for _, use in rates))
    print(f"| images/s | {' | '.join(uses)} |\n|---|{'---:|' * len(uses)}")
    for way in WAYS:
        cells = [_cell(rates.get((way, use)), rates[WAYS[0], use]) for use in uses]
        if any(cells):
            print(f"| {way} | {' | '.join(cells)} |")
    if "self-distillation" in uses:
        ours, theirs = rates[WAYS[1], "self-distillation"], rates[WAYS[0], "plain timm"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"\nself-distillation with cache=device over plain timm image by image: {ratio:.2f}")
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"\n{recipe.model.name} {recipe.model.kwargs}, batch {recipe.batch_size}, {recipe.precision}, channels_last "
        f"{recipe.model.channels_last}, compile {recipe.compile}, workers {recipe.data.workers}; "
        f"{arguments.rounds} rounds of {arguments.batches} batches; torch {torch.__version__}, timm "
        f"{timm.__version__}, {device.type} ({name}, {os.cpu_count()} CPU cores), {torch.get_num_threads()} threads"
    )
    print(f"command: python {shlex.join(sys.argv)}")


def _cell(rates: list[float] | None, base: list[float]) -> str:
    if rates is None:
        return ""
    ratio = statistics.median(a / b for a, b in zip(rates, base, strict=True))
    return f"{statistics.median(rates):.0f} ({ratio:.2f})"


if __name__ == "__main__":
    sys.exit(main())
