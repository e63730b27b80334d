"""What self-distillation gives over the plain network: four tasks, several methods, paired seeds.

    python benchmarks/gain.py --data ../shared/data --weights FOLDER --output FOLDER --seeds 0,1,2
    python benchmarks/gain_report.py FOLDER

Run from the repository root, with the package installed. benchmarks/README.md tells what each task and method is. A
run that is complete is not run again, one that was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import collect_logits, measure_path_macs
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.exit_logits import ExitLogits
from timm_selfdistill.recipe import AugmentSection, Recipe, load_recipe
from timm_selfdistill.train import train
from timm_selfdistill.train.saved_run import evaluation_loaders

ANSWERS = "answers.safetensors"

CIFAR = {
    "image": "img",
    "target": "fine_label",
    "validation": 0.1,
    "mean": [0.5071, 0.4865, 0.4409],
    "std": [0.2673, 0.2564, 0.2762],
    "crop_pct": 1.0,
}
SGD = {"name": "momentum", "momentum": 0.9, "weight_decay": 5e-4}

# All exits together teach each of them, and the backbone; a part of the label's weight is theirs.
ENSEMBLE = ("loss.preset=ensemble-distillation", "loss.ce_weight=0.7")

# Keys of the recipe that differ from the task's.
METHODS = {
    "none": ("loss.preset=none",),
    "label-smoothing": ("loss.preset=none", "loss.label_smoothing=0.1"),
    "deep-supervision": ("loss.preset=deep-supervision",),
    "ensemble-distillation": ("loss.preset=ensemble-distillation",),
    "byot-iccv2019": ("loss.preset=byot-iccv2019", "exits.head=bottleneck"),
    "byot-proportional": ("loss.preset=byot-iccv2019",),
    "byot-tpami2021": ("loss.preset=byot-tpami2021", "exits.head=bottleneck", "exits.hint_adapter=true"),
    "ensemble": ENSEMBLE,
    "equilibrium-fade": ("loss.preset=deep-supervision", "loss.gate=equilibrium", "loss.gate_fade=0.4"),
    "ensemble-fade": (*ENSEMBLE, "loss.gate_fade=0.4"),
    "ps-kd": ("loss.name=ps-kd", "loss.preset=null"),
    "dlb": ("loss.name=dlb", "loss.preset=null"),
}


def tasks(data: Path, weights: Path) -> dict[str, dict[str, Any]]:
    """Return the recipe of each task.

    Args:
        data: Folder with cifar100/ and imagenette-mini/.
        weights: Folder with tf_efficientnet_lite0.safetensors.
    """
    cifar = {**CIFAR, "path": str(data / "cifar100")}
    crops = {"train_crop_mode": "pad", "crop_padding": 4, "hflip": 0.5}
    pretrained = {"file": str(weights / "tf_efficientnet_lite0.safetensors"), "hf_hub_id": None}
    found: dict[str, dict[str, Any]] = {
        "T1": {
            "model": {"name": "resnet18", "small_stem": True, "kwargs": {"channels": [16, 32, 64, 128]}},
            "data": {**cifar, "image_size": 32, "cache": "device"},
            "augment": crops,
            "optimizer": {**SGD, "lr": 0.1},
            "schedule": {"name": "cosine", "warmup_epochs": 3},
            "epochs": 15,
            "batch_size": 128,
        },
        "T2": {
            "model": {"name": "resnet18"},
            "data": {**cifar, "image_size": 32, "cache": "device"},
            "augment": crops,
            "optimizer": {**SGD, "lr": 0.1},
            "schedule": {"name": "cosine", "warmup_epochs": 3},
            "epochs": 20,
            "batch_size": 128,
        },
        "T3": {
            "model": {"name": "resnet18"},
            "data": {"path": str(data / "imagenette-mini"), "eval_split": "val", "validation": 0.1, "image_size": 96},
            "augment": {"scale": [0.35, 1.0], "hflip": 0.5},
            "optimizer": {**SGD, "lr": 0.05},
            "schedule": {"name": "cosine", "warmup_epochs": 3},
            "epochs": 30,
            "batch_size": 32,
        },
        "T4": {
            "model": {
                "name": "tf_efficientnet_lite0",
                "pretrained": True,
                "kwargs": {"pretrained_cfg_overlay": pretrained},
            },
            "data": {**cifar, "image_size": 96, "max_train": 2500, "mean": None, "std": None},
            "augment": {"scale": [0.5, 1.0], "hflip": 0.5},
            "optimizer": {**SGD, "lr": 0.02, "weight_decay": 1e-4},
            "schedule": {"name": "cosine", "warmup_epochs": 1},
            "epochs": 5,
            "batch_size": 64,
        },
    }
    one_rate = {"optimizer": {**found["T4"]["optimizer"], "heads_lr_scale": 1}}
    return {**found, "T4-one-rate": found["T4"] | one_rate}


def main() -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("pretrained"))
    parser.add_argument("--tasks", default="T1,T2,T3,T4")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, such as epochs=1")
    arguments = parser.parse_intermixed_args()
    recipes = tasks(arguments.data, arguments.weights)
    # Seed by seed, so that an unfinished comparison compares something.
    for seed in arguments.seeds.split(","):
        for task in arguments.tasks.split(","):
            for method in arguments.methods.split(","):
                folder = arguments.output / task / f"{method}-seed-{seed}"
                changes = [*METHODS[method], f"seed={seed}", f"output_dir={folder}", "precision='no'"]
                run(load_recipe(recipes[task], [*changes, *arguments.overrides]), folder)
    return 0


def run(recipe: Recipe, folder: Path) -> None:
    """Train, and keep what the network answers to the images held out and to the test images."""
    if (folder / ANSWERS).is_file():
        return
    report = train(recipe)
    model = sd.from_pretrained(folder / "model")
    data = open_dataset(recipe.data, recipe.seed)
    size = InputConfig.from_model(model.backbone, recipe.data)
    loaders = evaluation_loaders(data, recipe, AugmentSection(), size, SkipList())
    assert loaders.validation is not None
    found = {name: collect_logits(model, getattr(loaders, name), name) for name in ("validation", "eval")}
    costs = measure_path_macs(model, (size.channels, *size.image_size))
    tensors = {f"{name}.{what}": value for name, one in found.items() for what, value in _stored(one)}
    seconds = report["train_seconds"]["self-distilled"]
    facts = {"macs": json.dumps([costs.backbone, costs.heads]), "seconds": str(seconds)}
    save_file(tensors, folder / f"{ANSWERS}.part", metadata=facts)
    (folder / f"{ANSWERS}.part").rename(folder / ANSWERS)


def _stored(found: ExitLogits) -> Iterator[tuple[str, Tensor]]:
    yield "logits", found.logits.half().contiguous()
    yield "targets", found.targets


if __name__ == "__main__":
    sys.exit(main())
