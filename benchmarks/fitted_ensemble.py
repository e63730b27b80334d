"""What the mean of all logits, the fitted ensemble and the backbone alone give, on an EfficientNet that is fine-tuned.

Run from the repository root: python benchmarks/fitted_ensemble.py --data ../shared/data/cifar100 --weights FOLDER
What it trains and prints is told in benchmarks/README.md.
"""

import argparse
from pathlib import Path

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-100 in parquet files")
parser.add_argument("--weights", type=Path, required=True, help="folder with tf_efficientnet_lite0.safetensors")
parser.add_argument("--output", type=Path, default=Path("runs/fitted-ensemble"), help="folder of the run")
parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, such as epochs=1")
arguments = parser.parse_intermixed_args()

weights = {"file": str(arguments.weights / "tf_efficientnet_lite0.safetensors"), "hf_hub_id": None}
recipe = {
    "model": {
        "name": "tf_efficientnet_lite0",
        "pretrained": True,
        "kwargs": {"pretrained_cfg_overlay": weights},
    },
    "exits": {"head": "bottleneck"},
    "loss": {"preset": "byot-iccv2019"},
    # Of the 50,000 training images 100 are held out, and 2,500 of the others trained on.
    "data": {
        "path": str(arguments.data),
        "image": "img",
        "target": "fine_label",
        "validation": 0.002,
        "max_train": 2500,
        "max_eval": 2000,
        "image_size": 96,
        "crop_pct": 1.0,
        "workers": 0,
    },
    "augment": {"scale": [0.5, 1.0], "hflip": 0.5},
    "optimizer": {"name": "momentum", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4, "heads_lr_scale": 1},
    "schedule": {"name": "cosine", "warmup_epochs": 1},
    "epochs": 5,
    "batch_size": 64,
    "precision": "no",
    "output_dir": str(arguments.output),
}
report = train(load_recipe(recipe, arguments.overrides))

fitted = report["fitted_ensemble"]
assert fitted is not None
print(f"backbone alone          {report['exits'][-1]['top1']:.2f} %")
print(f"mean of all logits      {report['ensemble']['top1']:.2f} %")
print(f"fitted on {fitted['images']:,} images    {fitted['top1']:.2f} %")
