"""Measure what checkpoints and metrics.jsonl cost a training: the time spent on them, and an epoch with and without.

Run from the repository root, with the package installed: python benchmarks/checkpoint_cost.py --data FOLDER
What each column means is told in benchmarks/README.md.
"""

import argparse
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import train
from timm_selfdistill.train.checkpoint import CheckpointWriter
from timm_selfdistill.train.tracking import JsonLinesTracker

SETTINGS = (
    "model.kwargs={channels: [16, 32, 64, 128]}",
    "precision=bf16",
    "baseline=false",
    "data.workers=0",
    "data.validation=0.0",
    "data.max_eval=100",
)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar100", help="CIFAR-100: a name on the Hub, or a folder")
    parser.add_argument("--images", type=int, default=50000, help="training images of an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each kind, in turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            "cifar100-resnet18",
            [
                *SETTINGS,
                f"data.path={arguments.data}",
                f"data.max_train={arguments.images}",
                f"epochs={2 * arguments.epochs + 1}",
                "schedule={name: none, decay_milestones: []}",
                f"output_dir={folder}/run",
            ],
        )
        times, spent = _time_epochs(recipe)
    kept, plain = times[0::2], times[1::2]
    shares = [100 * seconds / epoch for seconds, epoch in zip(spent, kept, strict=True)]
    ratios = [one / other for one, other in zip(kept, plain, strict=True)]
    steps = arguments.images // recipe.batch_size
    print(f"{'':>9}  {'with s':>8}  {'spent s':>8}  {'share %':>8}  {'without s':>9}  {'ratio':>6}")
    for name, pick in (("median", statistics.median), ("lowest", min), ("highest", max)):
        print(
            f"{name:>9}  {pick(kept):>8.2f}  {pick(spent):>8.3f}  {pick(shares):>8.3f}  {pick(plain):>9.2f}  "
            f"{pick(ratios):>6.3f}"
        )
    print(f"\nepochs of each kind: {len(kept)}")
    print(f"{steps} steps of {recipe.batch_size} images an epoch, {recipe.model.name} {recipe.model.kwargs}, bf16")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"command: python {shlex.join(sys.argv)}")
    return 0


def _time_epochs(recipe: Any) -> tuple[list[float], list[float]]:
    """Train, with checkpoints and log in every other epoch only.

    Nothing is left to the background: the time of an epoch holds all of the writing of its checkpoint.

    Returns:
        Seconds of each epoch but the first, and seconds spent on checkpoint and log in each epoch that has them.
    """
    marks = [0.0]
    spent = [0.0]
    saved, logged, finish = CheckpointWriter.save, JsonLinesTracker.log, CheckpointWriter.finish

    def keeping() -> bool:
        return len(marks) % 2 == 0

    def save(self: CheckpointWriter, state: Any, step: int) -> None:
        start = time.perf_counter()
        if keeping():
            saved(self, state, step)
            finish(self)
        marks.append(time.perf_counter())
        spent[-1] += marks[-1] - start
        spent.append(0.0)

    def log(self: JsonLinesTracker, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        start = time.perf_counter()
        if keeping():
            logged(self, values, step, **kwargs)
        spent[-1] += time.perf_counter() - start

    with _fresh(), patch.object(CheckpointWriter, "save", save), patch.object(JsonLinesTracker, "log", log):
        train(recipe)
    del marks[-1]  # the last checkpoint, of no epoch
    return [later - earlier for earlier, later in pairwise(marks[1:])], spent[1 : len(marks) - 1 : 2]


@contextmanager
def _fresh() -> Iterator[None]:
    """Forget Accelerate's state of an earlier training in this process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


if __name__ == "__main__":
    sys.exit(main())
