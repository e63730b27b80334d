"""Compare ensembles of fewer exits of a trained network, on images that it was tested on and that it was trained on.

Run from the repository root, with the package installed: python benchmarks/ensembles.py RUN
What each line and column means is told in benchmarks/README.md.
"""

import argparse
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import collect_logits
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.loaders import build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.report.render import align


@torch.inference_mode()
def main() -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--train-images", type=int, default=10_000, help="how many images of the training split")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe's data section")
    arguments = parser.parse_intermixed_args()
    model = sd.from_pretrained(arguments.run / "model")
    recipe = load_recipe(arguments.run / "recipe.yaml", [f"data.{override}" for override in arguments.overrides])
    data = open_dataset(recipe.data, recipe.seed)
    if data.streaming:
        parser.error(
            f"{arguments.run} was trained on a stream, whose training images cannot be picked; allowed is a data set"
        )
    some = np.linspace(0, len(data.train), min(arguments.train_images, len(data.train)), endpoint=False, dtype=np.int64)
    columns = {}
    for name, split in (("test", data.eval), ("training", data.train.select(some))):
        loaders = build_loaders(
            # Read by the loader of the evaluation, which does not augment.
            replace(data, eval=split),
            recipe.data.model_copy(update={"cache": None}),
            recipe.augment,
            InputConfig.from_model(model.backbone, recipe.data),
            batch_size=recipe.batch_size,
            accelerator_shards=(0, 1),
            seed=recipe.seed,
        )
        found = collect_logits(model, loaders.eval, name)
        columns[f"{name} ({len(found):,})"] = top1_of_ensembles(found.logits, found.targets)
    names = list(next(iter(columns.values())))
    rows = [["top-1 %", *columns], *([name, *(f"{top1[name]:.2f}" for top1 in columns.values())] for name in names)]
    print("\n".join(align(rows)))
    versions = f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads"
    print(f"\n{arguments.run.name}; {versions}, {platform.machine()}\ncommand: python {shlex.join(sys.argv)}")
    return 0


def top1_of_ensembles(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the top-1 accuracy in percent of each exit alone, and of the mean of the deepest ones.

    Args:
        logits: Logits [K + 1, N, C], shallow to deep, the last the backbone's own.
        targets: Class indices [N].
    """
    last = len(logits) - 1
    members = {f"exit {index}" if index < last else "backbone": logits[index] for index in range(last + 1)}
    members |= {f"mean of {index} to backbone": logits[index:].mean(0) for index in reversed(range(last))}
    return {name: 100 * float((mean.argmax(-1) == targets).double().mean()) for name, mean in members.items()}


if __name__ == "__main__":
    sys.exit(main())
