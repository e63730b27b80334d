"""What int8 does to early exit in ONNX Runtime: accuracy, time and who leaves where, in float32 and two kinds of int8.

Run from the repository root, with the package installed: python benchmarks/onnx_int8.py RUN
The thresholds of each are chosen on its own graphs, by the images that the run held out, as `timm-selfdistill calibrate
--onnx` does. What each column means is told in benchmarks/README.md.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx_early_exit import evaluation_images, first, least_seconds, session_options
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import ExitLogits, Goal, choose_settings, held_out_images, measure_path_macs
from timm_selfdistill.staged import MANIFEST

KINDS = {"float32": None, "int8, dynamic": "dynamic", "int8, static": "static"}


@torch.no_grad()
def main() -> int:
    """Print a line for each kind of graphs, and then the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that held out images for validation")
    parser.add_argument("--max-accuracy-drop", type=float, default=1.0, help="points below each kind's own backbone")
    parser.add_argument("--checked", type=int, default=10_000, help="test images for the accuracy")
    parser.add_argument("--images", type=int, default=128, help="test images that are timed")
    parser.add_argument("--range-images", type=int, default=128, help="held-out images that set static ranges")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the graphs here, and take those that are there")
    arguments = parser.parse_args()
    fast = sd.load_early_exit(arguments.run / "model")
    loaders = evaluation_images(arguments.run)
    assert loaders.validation is not None, "the run held out no images for validation"
    images, targets = first(loaders.eval, max(arguments.checked, arguments.images))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        networks = {
            name: write(fast, loaders.validation, folder / (mode or "float32"), mode, arguments)
            for name, mode in KINDS.items()
        }
        print(f"{'':14}  {'MB':>5}  {'backbone %':>10}  {'early exit %':>12}  leave at")
        for name, (early, plain) in networks.items():
            answers = [early(batch.numpy()) for batch in images.split(100)]
            logits, index = map(np.concatenate, zip(*answers, strict=True))
            whole = np.concatenate([plain(batch.numpy()).logits for batch in images.split(100)])
            shares = np.bincount(index, minlength=fast.model.num_exits + 1) / len(images)
            size = sum(path.stat().st_size for path in (folder / (KINDS[name] or "float32")).glob("*.onnx*"))
            print(
                f"{name:14}  {size / 1e6:>5.2f}  {percent(whole, targets):>10.2f}  {percent(logits, targets):>12.2f}  "
                + "  ".join(f"{100 * share:.1f} %" for share in shares),
                flush=True,
            )
        runs = {(name, way): run for name, pair in networks.items() for way, run in zip(WAYS, pair, strict=True)}
        print(f"\n{'batch':>5}  {'':14}  {'':10}  {'ms/image':>8}  {'speed-up':>8}")
        for batch_size in arguments.batch_sizes:
            report(runs, images[: arguments.images], batch_size, arguments.rounds)
    print(f"\n{len(images)} test images, {torch.get_num_threads()} threads, onnxruntime {onnxruntime.__version__}")
    print(f"command: python {shlex.join(sys.argv)}")
    return 0


WAYS = ("early exit", "backbone")


def write(
    fast: sd.EarlyExit,
    held_out: Iterable[tuple[Tensor, Tensor]],
    folder: Path,
    mode: str | None,
    arguments: argparse.Namespace,
) -> tuple[sd.OnnxEarlyExit, sd.OnnxEarlyExit]:
    """Export and calibrate stages, and return them with early exit and without."""
    if not folder.exists():
        images = held_out_images(arguments.run, arguments.range_images) if mode == "static" else None
        sd.export_early_exit(fast, folder, format="onnx-stages", quantize=mode, calibration_images=images)
    plain = sd.OnnxEarlyExit(folder, thresholds=math.inf, session_options=session_options())
    logits, classes = zip(*((plain.every_exit(images.numpy()), classes) for images, classes in held_out), strict=True)
    stored = ExitLogits.of_labelled(torch.from_numpy(np.concatenate(logits, 1)), torch.cat(classes))
    macs = measure_path_macs(fast.model, tuple(plain.manifest["input_size"]))
    config = choose_settings(stored, macs, Goal(max_accuracy_drop=arguments.max_accuracy_drop)).config
    content = {**plain.manifest, "early_exit": config.to_json()}
    (folder / MANIFEST).write_text(json.dumps(content, allow_nan=False))
    return sd.OnnxEarlyExit(folder, session_options=session_options()), plain


def percent(logits: Any, targets: Tensor) -> float:
    """Return the share that is right."""
    return 100 * float((logits.argmax(-1) == targets.numpy()).mean())


def report(runs: dict[tuple[str, str], sd.OnnxEarlyExit], images: Tensor, batch_size: int, rounds: int) -> None:
    """Print the time of each network at a batch size."""
    batches = [batch.numpy() for batch in images.split(batch_size)]
    spent = dict(zip(runs, least_seconds(list(runs.values()), batches, rounds), strict=True))
    for (name, way), seconds in spent.items():
        speedup, milliseconds = spent["float32", "backbone"] / seconds, 1000 * seconds / len(images)
        print(f"{batch_size:>5}  {name:14}  {way:10}  {milliseconds:>8.3f}  {speedup:>7.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
