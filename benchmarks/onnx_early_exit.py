"""Time early exit in ONNX Runtime (stages, one graph with If) and in PyTorch, beside networks that run to their end.

Run from the repository root, with the package installed: python benchmarks/onnx_early_exit.py [FOLDER]
FOLDER is a run with saved early-exit settings; without one, an untrained network runs on random images, of which about
the same number leaves at each exit. The rows take turns, batch by batch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from early_exit_overhead import calibrate_statistics
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import measure_path_macs


def main() -> int:
    """Print the times, and what the MACs would allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a run's folder with early-exit settings")
    parser.add_argument("--model", default="resnet18", help="the untrained network")
    parser.add_argument("--image-size", type=int, default=64, help="of the untrained network, in pixels")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=64, help="images a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    fast, images = load(arguments)
    size = tuple(images.shape[1:])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rows = export(fast, size, Path(folder))
        answer = fast(images)
        costs = measure_path_macs(fast.model, size)
        share = costs.mean(fast.config, answer.exit_index) / costs.full
        left = [int((answer.exit_index == exit).sum()) for exit in range(fast.model.num_exits + 1)]
        threads = f"{torch.get_num_threads()} threads of torch, {os.cpu_count()} cores"
        print(f"{type(fast.model.backbone).__name__} at {size[1]}x{size[2]} px, {threads}; images that leave: {left}")
        print(
            f"MACs with early exit: {100 * share:.1f} % of the plain network's; so at most {1 / share:.2f} x as fast\n"
        )
        print(f"{'batch':>5}  {'':24}  {'ms per image':>12}  {'of full':>7}")
        for batch_size in arguments.batch_sizes:
            report(rows, images, batch_size, arguments.rounds)
    return 0


def load(arguments: argparse.Namespace) -> tuple[sd.EarlyExit, Tensor]:
    """Return the network and its images."""
    if arguments.folder is not None:
        model = arguments.folder / "model"
        fast = sd.load_early_exit(model if model.is_dir() else arguments.folder)
        channels, height, width = fast.model.pretrained_cfg["input_size"]
        return fast, torch.randn(arguments.images, channels, height, width)
    size = arguments.image_size
    kwargs = {"channels": [16, 32, 64, 128]} if arguments.model == "resnet18" else {}
    model = sd.wrap(arguments.model, num_classes=10, image_size=size, model_kwargs=kwargs).eval()
    images = torch.randn(arguments.images, 3, size, size)
    images *= torch.linspace(0.1, 3, len(images))[torch.randperm(len(images))].view(-1, 1, 1, 1)
    calibrate_statistics(model, images)
    with torch.no_grad():
        every = model(images, return_exits=True).logits
    thresholds, left = [], torch.ones(len(images), dtype=torch.bool)
    for exit in range(model.num_exits):
        confidence = every[exit].softmax(-1).amax(-1)
        thresholds.append(float(confidence[left].quantile(1 - 1 / (model.num_exits + 1 - exit))))
        left &= confidence < thresholds[-1]
    return sd.EarlyExit(model, thresholds), images


def export(fast: sd.EarlyExit, size: tuple[int, ...], folder: Path) -> dict[str, Callable[[Tensor], object]]:
    """Export the network in all ways, and return what runs a batch in each."""
    model = fast.model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    sd.export_early_exit(fast, folder / "stages", format="onnx-stages", image_size=size[1:])
    nested = sd.export_early_exit(fast, folder / "if.onnx", format="onnx-if", image_size=size[1:])
    full = sd.export_model(
        model, model.num_exits, folder / "full.onnx", format="onnx", dynamic_batch=True, image_size=size[1:]
    )
    stages = sd.OnnxEarlyExit(folder / "stages", session_options=options)
    sessions = {path: onnxruntime.InferenceSession(path, options) for path in (full, nested)}
    plain = sd.truncate(model, model.num_exits).eval()
    return {
        "onnxruntime, full": lambda x: sessions[full].run(None, {"images": x.numpy()}),
        "onnxruntime, stages": lambda x: stages(x.numpy()),
        "onnxruntime, If": lambda x: sessions[nested].run(None, {"images": x.numpy()}),
        "PyTorch, full": plain,
        "PyTorch, EarlyExit": fast,
    }


def report(rows: dict[str, Callable[[Tensor], object]], images: Tensor, batch_size: int, rounds: int) -> None:
    """Print a line for each row at a batch size; they take turns."""
    if batch_size > 1:
        rows = {name: run for name, run in rows.items() if name != "onnxruntime, If"}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run(images[:batch_size])
    for _ in range(rounds):
        spent = dict.fromkeys(rows, 0.0)
        for batch in images.split(batch_size):
            for name, run in rows.items():
                start = time.perf_counter()
                run(batch)
                spent[name] += time.perf_counter() - start
        for name, seconds in spent.items():
            times[name].append(1000 * seconds / len(images))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, milliseconds in medians.items():
        full = medians["PyTorch, full" if name.startswith("PyTorch") else "onnxruntime, full"]
        print(f"{batch_size:>5}  {name:24}  {milliseconds:>12.3f}  {100 * milliseconds / full:>5.1f} %", flush=True)


if __name__ == "__main__":
    sys.exit(main())
