"""What self-distillation gives over the plain network: four tasks, several methods, paired seeds.

    python benchmarks/gain.py train --data ../shared/data --weights FOLDER --output FOLDER --seeds 0,1,2
    python benchmarks/gain.py table --output FOLDER

Run from the repository root, with the package installed. What each task, method and column means is told in
benchmarks/README.md. A run that is complete is not run again, one that was interrupted goes on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.special import stdtrit
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import Goal, choose_settings, collect_logits
from timm_selfdistill.calibration.path_costs import PathCosts, measure_path_macs
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import EarlyExitConfig, replay
from timm_selfdistill.exit_logits import ExitLogits
from timm_selfdistill.recipe import AugmentSection, Recipe, load_recipe
from timm_selfdistill.render import align
from timm_selfdistill.train import train
from timm_selfdistill.train.saved_run import evaluation_loaders

SHARES = (0.25, 0.5, 0.75, 1.0)
BASELINE = "none"
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


# Keys of the recipe that differ from the task's.
METHODS = {
    "none": ("loss.preset=none",),
    "label-smoothing": ("loss.preset=none", "loss.label_smoothing=0.1"),
    "deep-supervision": ("loss.preset=deep-supervision",),
    "byot-iccv2019": ("loss.preset=byot-iccv2019", "exits.head=bottleneck"),
    "byot-tpami2021": ("loss.preset=byot-tpami2021", "exits.head=bottleneck", "exits.hint_adapter=true"),
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
    return {
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


def main() -> int:
    """Train what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "table"])
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("pretrained"))
    parser.add_argument("--tasks", default="T1,T2,T3,T4")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, such as epochs=1")
    arguments = parser.parse_intermixed_args()
    names, methods = arguments.tasks.split(","), arguments.methods.split(",")
    if arguments.action == "train":
        recipes = tasks(arguments.data, arguments.weights)
        # Seed by seed, so that an unfinished comparison compares something.
        for seed in arguments.seeds.split(","):
            for task in names:
                for method in methods:
                    folder = arguments.output / task / f"{method}-seed-{seed}"
                    changes = [*METHODS[method], f"seed={seed}", f"output_dir={folder}", "precision='no'"]
                    run(load_recipe(recipes[task], [*changes, *arguments.overrides]), folder)
    for task in names:
        rows = [row for method in methods if (row := summary(arguments.output / task, method))]
        print(f"\n{task}\n" + "\n".join(align([HEADER, *rows])))
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


HEADER = ["", "seeds", "backbone", "mean", "fitted", *(f"{share:.0%} MACs" for share in SHARES), "AUROC", "time"]


def summary(folder: Path, method: str) -> list[str] | None:
    """Return the line of a method: top-1 in percent, less that of the plain backbone of the same seed."""
    lines = {path.parent.name.rpartition("-")[2]: measured(path) for path in folder.glob(f"{method}-seed-*/{ANSWERS}")}
    plain = {
        path.parent.name.rpartition("-")[2]: measured(path) for path in folder.glob(f"{BASELINE}-seed-*/{ANSWERS}")
    }
    seeds = sorted(set(lines) & set(plain))
    if not seeds:
        return None
    cells = []
    for key in ("backbone", "mean", "fitted", *SHARES):
        values = [lines[seed][key] for seed in seeds]
        if method == BASELINE:
            cells.append(f"{statistics.mean(values):.2f}" if key == "backbone" else "")
            continue
        if any(value != value for value in values):
            cells.append("")
            continue
        cells.append(difference([value - plain[seed]["backbone"] for seed, value in zip(seeds, values, strict=True)]))
    auroc = " ".join(f"{statistics.mean(found):.2f}" for found in zip(*(lines[s]["auroc"] for s in seeds), strict=True))
    time = statistics.mean(lines[seed]["seconds"] / plain[seed]["seconds"] for seed in seeds)
    return [method, str(len(seeds)), *cells, auroc, f"{time:.2f}"]


def difference(values: Sequence[float]) -> str:
    """Return the mean with half of its 95 % confidence interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    half = stdtrit(len(values) - 1, 0.975) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ±{half:.2f}"


def measured(path: Path) -> dict[Any, Any]:
    """Return what one run gives on the test images; all that is chosen is chosen on the images held out."""
    tensors = load_file(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(size))["__metadata__"]
    held_out, test = (
        ExitLogits(tensors[f"{name}.logits"].float(), tensors[f"{name}.targets"]) for name in ("validation", "eval")
    )
    correct = test.correct
    found: dict[Any, Any] = {"backbone": percent(correct[-1]), "seconds": float(facts["seconds"])}
    found["auroc"] = [auroc(test.logits[k].softmax(-1).amax(-1), correct[k]) for k in range(len(correct))]
    found["mean"] = percent(test.ensemble_correct)
    fitted = sd.fit_ensemble(logits=list(held_out.logits), target=held_out.targets)
    held_out, test = replace(held_out, ensemble=fitted), replace(test, ensemble=fitted)
    found["fitted"] = percent(test.ensemble_correct)
    backbone, heads = json.loads(facts["macs"])
    costs = PathCosts(tuple(backbone), tuple(heads))
    for share in SHARES:
        found[share] = at_budget(held_out, test, costs, share)
    return found


def at_budget(held_out: ExitLogits, test: ExitLogits, costs: PathCosts, share: float) -> float:
    """Return the accuracy of early exit at a share of the plain network's MACs; NaN if no setting is so cheap.

    Whether exits answer for themselves or with those before them is chosen on the images held out, too.
    """
    goal, found = Goal(macs_budget=share * costs.full), []
    for running in (False, True):
        try:
            config = choose_settings(held_out, costs, goal, running_ensemble=running).config
        except ValueError:
            continue
        found.append([percent(_right(config, split)) for split in (held_out, test)])
    return max(found)[1] if found else float("nan")


def _right(config: EarlyExitConfig, split: ExitLogits) -> Tensor:
    return replay(config, split.logits, ensemble=split.ensemble).logits.argmax(-1) == split.targets


def auroc(score: Tensor, positive: Tensor) -> float:
    """Return the share of pairs of a right and a wrong answer in which the right one has the higher score."""
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    right = int(positive.sum())
    wrong = len(score) - right
    return (
        float((rank[positive].sum() - right * (right + 1) / 2) / (right * wrong)) if right and wrong else float("nan")
    )


def percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


if __name__ == "__main__":
    sys.exit(main())
