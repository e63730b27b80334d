"""Measure what checkpoints and metrics.jsonl cost a training: an epoch with them, beside the same epoch without.

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
from timm_selfdistill.train.launch import JsonLinesTracker
from timm_selfdistill.train.writer import CheckpointWriter

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
        times = _time_epochs(recipe)
    kept, plain = times[0::2], times[1::2]
    ratios = [one / other for one, other in zip(kept, plain, strict=True)]
    steps = arguments.images // recipe.batch_size
    print(f"{'epochs':>6}  {'with s':>8}  {'without s':>9}  {'ratio':>6}  {'lowest':>6}  {'highest':>7}")
    print(
        f"{len(kept):>6}  {statistics.median(kept):>8.2f}  {statistics.median(plain):>9.2f}  "
        f"{statistics.median(ratios):>6.3f}  {min(ratios):>6.3f}  {max(ratios):>7.3f}"
    )
    print(f"\n{steps} steps of {recipe.batch_size} images an epoch, {recipe.model.name} {recipe.model.kwargs}, bf16")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"command: python {shlex.join(sys.argv)}")
    return 0


def _time_epochs(recipe: Any) -> list[float]:
    """Train, with checkpoints and log in every other epoch only; return the seconds of each epoch but the first.

    Nothing is left to the background: the time of an epoch holds all of the writing of its checkpoint.
    """
    marks = [0.0]
    saved, logged, finish = CheckpointWriter.save, JsonLinesTracker.log, CheckpointWriter.finish

    def keeping() -> bool:
        return len(marks) % 2 == 0

    def save(self: CheckpointWriter, state: Any, step: int) -> None:
        if keeping():
            saved(self, state, step)
            finish(self)
        marks.append(time.perf_counter())

    def log(self: JsonLinesTracker, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if keeping():
            logged(self, values, step, **kwargs)

    with _fresh(), patch.object(CheckpointWriter, "save", save), patch.object(JsonLinesTracker, "log", log):
        train(recipe)
    del marks[-1]  # the last checkpoint, of no epoch
    return [later - earlier for earlier, later in pairwise(marks[1:])]


@contextmanager
def _fresh() -> Iterator[None]:
    """Forget Accelerate's state of an earlier training in this process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


if __name__ == "__main__":
    sys.exit(main())
