"""Time early exit in ONNX Runtime (stages, one graph with If) and in PyTorch, beside networks that run to their end.

Run from the repository root, with the package installed: python benchmarks/onnx_early_exit.py [RUN]
RUN is a run with saved early-exit settings: its test images are answered, and the answers compared. Without one, an
untrained network runs on random images, of which about the same number leaves at each exit. What each column means is
told in benchmarks/README.md.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from early_exit_overhead import calibrate_statistics
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import measure_path_macs
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.loaders import Loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.recipe import AugmentSection, load_recipe
from timm_selfdistill.train.saved_run import evaluation_loaders

FULL, STAGES, NESTED = "onnxruntime, full", "onnxruntime, stages", "onnxruntime, If"
PLAIN, EARLY = "PyTorch, full", "PyTorch, EarlyExit"
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
Rows = dict[str, Callable[[Tensor], Any]]


@torch.no_grad()
def main() -> int:
    """Print what is answered, the times, and what the MACs would allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder with early-exit settings")
    parser.add_argument("--model", default="resnet18", help="the untrained network")
    parser.add_argument("--image-size", type=int, default=64, help="of the untrained network, in pixels")
    parser.add_argument("--threshold", type=float, help="of all exits, in place of the saved settings'")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=128, help="images that are timed")
    parser.add_argument("--checked", type=int, default=2000, help="test images whose answers are compared")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    targets = None
    if arguments.run is None:
        fast, images = untrained(arguments)
    else:
        fast = sd.load_early_exit(arguments.run / "model")
        images, targets = first(evaluation_images(arguments.run).eval, max(arguments.checked, arguments.images))
    if arguments.threshold is not None:
        fast = sd.EarlyExit(fast.model, arguments.threshold)
    size = tuple(images.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        stages, rows = export(fast, size, Path(folder))
        answer = compare(rows, images, targets)
        costs = measure_path_macs(fast.model, size)
        share = costs.mean(fast.config, answer.exit_index[: arguments.images]) / costs.full
        name = type(fast.model.backbone).__name__
        print(f"{name} at {size[1]}x{size[2]} px, {costs.full / 1e6:.1f} M MACs. For the images that are timed,")
        print(f"early exit computes {100 * share:.1f} % of them: by MACs, it may be {1 / share:.2f} x as fast.\n")
        print(f"{'batch':>5}  {'':20}  {'ms/image':>8}  {'speed-up':>8}  {'of allowed %':>12}  in graphs %")
        for batch_size in arguments.batch_sizes:
            report(rows, stages, images[: arguments.images], batch_size, arguments.rounds, 1 / share)
    threads = f"{torch.get_num_threads()} threads of torch, {os.cpu_count()} cores"
    print(f"\n{threads}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    print(f"command: python {shlex.join(sys.argv)}")
    return 0


def evaluation_images(run: Path) -> Loaders:
    """Return what gives the images of a run, as the network gets them: those held out, and the test images."""
    recipe = load_recipe(run / "recipe.yaml")
    data = open_dataset(recipe.data, recipe.seed)
    config = InputConfig.from_model(sd.from_pretrained(run / "model").backbone, recipe.data)
    return evaluation_loaders(data, recipe, AugmentSection(), config, SkipList())


def first(loader: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a loader, and their classes."""
    batches, found = [], 0
    for batch in loader:
        batches.append(batch)
        found += len(batch[0])
        if found >= count:
            break
    images, targets = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
    return images, targets


def untrained(arguments: argparse.Namespace) -> tuple[sd.EarlyExit, Tensor]:
    """Return a network that knows nothing, and random images."""
    size, count = arguments.image_size, arguments.images
    kwargs = {"channels": [16, 32, 64, 128]} if arguments.model == "resnet18" else {}
    model = sd.wrap(arguments.model, num_classes=10, image_size=size, model_kwargs=kwargs).eval()
    images = torch.randn(count, 3, size, size)
    images *= torch.linspace(0.1, 3, len(images))[torch.randperm(len(images))].view(-1, 1, 1, 1)
    calibrate_statistics(model, images)
    every = model(images, return_exits=True).logits
    thresholds, left = [], torch.ones(len(images), dtype=torch.bool)
    for exit in range(model.num_exits):
        confidence = every[exit].softmax(-1).amax(-1)
        thresholds.append(float(confidence[left].quantile(1 - 1 / (model.num_exits + 1 - exit))))
        left &= confidence < thresholds[-1]
    return sd.EarlyExit(model, thresholds), images


def session_options() -> onnxruntime.SessionOptions:
    """Return options of as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return options


def export(fast: sd.EarlyExit, size: tuple[int, ...], folder: Path) -> tuple[sd.OnnxEarlyExit, Rows]:
    """Export the network in all ways, and return the stages, and what runs a batch in each."""
    model = fast.model
    sd.export_early_exit(fast, folder / "stages", format="onnx-stages", image_size=size[1:])
    nested = sd.export_early_exit(fast, folder / "if.onnx", format="onnx-if", image_size=size[1:])
    full = sd.export_model(
        model, model.num_exits, folder / "full.onnx", format="onnx", dynamic_batch=True, image_size=size[1:]
    )
    stages = sd.OnnxEarlyExit(folder / "stages", session_options=session_options())
    sessions = {path: onnxruntime.InferenceSession(path, session_options()) for path in (full, nested)}
    return stages, {
        FULL: lambda x: sessions[full].run(None, {"images": x.numpy()}),
        STAGES: lambda x: stages(x.numpy()),
        NESTED: lambda x: sessions[nested].run(None, {"images": x.numpy()}),
        PLAIN: sd.truncate(model, model.num_exits).eval(),
        EARLY: fast,
    }


def compare(rows: Rows, images: Tensor, targets: Tensor | None) -> Any:
    """Print whether ONNX Runtime answers as PyTorch does, and return PyTorch's answer."""
    batches = images.split(100)
    parts = [rows[EARLY](batch) for batch in batches]
    expected = type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
    whole = torch.cat([rows[PLAIN](batch) for batch in batches])
    found = {
        PLAIN: (whole, None),
        FULL: (np.concatenate([rows[FULL](batch)[0] for batch in batches]), None),
        EARLY: (expected.logits, expected.exit_index),
        STAGES: tuple(map(np.concatenate, zip(*(rows[STAGES](batch) for batch in batches), strict=True))),
        NESTED: tuple(map(np.concatenate, zip(*(rows[NESTED](image) for image in images.split(1)), strict=True))),
    }
    print(f"{len(images)} images{'' if targets is None else ' of the test split'}\n")
    print(f"{'':20}  {'top-1 %':>7}  {'other choices':>13}  {'logits differ':>13}  leave at")
    for name, (logits, index) in found.items():
        logits, compared = torch.as_tensor(logits), whole if index is None else expected.logits
        top1 = float("nan") if targets is None else 100 * float((logits.argmax(-1) == targets).double().mean())
        other = logits.argmax(-1) != compared.argmax(-1)
        shares = ""
        if index is not None:
            other |= torch.as_tensor(index) != expected.exit_index
            counts = np.bincount(np.asarray(index), minlength=int(expected.exit_index.max()) + 1)
            shares = "  ".join(f"{100 * count / len(images):.1f} %" for count in counts)
        difference = float((logits - compared).abs()[~other].max())
        print(f"{name:20}  {top1:>7.2f}  {int(other.sum()):>13}  {difference:>13.1e}  {shares}")
    print()
    return expected


def report(rows: Rows, stages: sd.OnnxEarlyExit, images: Tensor, batch_size: int, rounds: int, allowed: float) -> None:
    """Print a line for each row at a batch size."""
    if batch_size > 1:
        rows = {name: run for name, run in rows.items() if name != NESTED}
    batches = list(images.split(batch_size))
    spent = dict(zip(rows, least_seconds(list(rows.values()), batches, rounds), strict=True))
    inside = seconds_in_graphs(stages, rows[STAGES], batches, rounds)
    for name, seconds in spent.items():
        speedup = spent[PLAIN if name.startswith("PyTorch") else FULL] / seconds
        shares = f"  {100 * speedup / allowed:>12.1f}" if name not in (FULL, PLAIN) else ""
        graphs = f"  {100 * inside / seconds:>11.1f}" if name == STAGES else ""
        milliseconds = 1000 * seconds / len(images)
        print(f"{batch_size:>5}  {name:20}  {milliseconds:>8.3f}  {speedup:>7.2f}x{shares}{graphs}", flush=True)


def least_seconds(runs: Sequence[Callable[[Any], object]], batches: Sequence[Any], rounds: int) -> list[float]:
    """Return the seconds in which each answers all batches, of each batch the least of the rounds; they take turns.

    What else runs on the machine only adds to the time of a batch. With one thread, time is that of the process.
    """
    least = np.full((len(runs), len(batches)), np.inf)
    for _ in range(rounds):
        for run, line in zip(runs, least, strict=True):
            run(batches[0])
            for index, batch in enumerate(batches):
                start = CLOCK()
                run(batch)
                line[index] = min(line[index], CLOCK() - start)
    return [float(seconds) for seconds in least.sum(1)]


def seconds_in_graphs(
    stages: sd.OnnxEarlyExit, run: Callable[[Tensor], object], batches: Sequence[Tensor], rounds: int
) -> float:
    """Return the part of the stages' time in which ONNX Runtime runs a graph, of each batch the least."""
    spent = 0.0

    class Timed:
        def __init__(self, session: onnxruntime.InferenceSession) -> None:
            self.session = session

        def run(self, *arguments: Any) -> Any:
            nonlocal spent
            start = CLOCK()
            found = self.session.run(*arguments)
            spent += CLOCK() - start
            return found

    sessions, least = stages._sessions, np.full(len(batches), np.inf)
    stages._sessions = [Timed(session) for session in sessions]
    for _ in range(rounds):
        for index, batch in enumerate(batches):
            spent = 0.0
            run(batch)
            least[index] = min(least[index], spent)
    stages._sessions = sessions
    return float(least.sum())


if __name__ == "__main__":
    sys.exit(main())
