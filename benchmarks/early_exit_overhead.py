"""Measure early exit beside the plain network, what it costs beyond the layers that it runs, and what truncation does.

Run from the repository root, with the package installed: python benchmarks/early_exit_overhead.py
What each column means is told in benchmarks/README.md.
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.calibration import ExitLogits, Goal, PathCosts, choose_settings
from timm_selfdistill.early_exit.leaving import LeavingBatch
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.model import hooks

MODEL, SIZE = "resnet50", 224
# Networks by name: what timm calls them, how they are built, and the size of their images.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18 / 8, 32 px": ("resnet18", {"channels": [8, 16, 32, 64]}, 32),
    "resnet18 / 4, 64 px": ("resnet18", {"channels": [16, 32, 64, 128]}, 64),
    "vit_tiny, 64 px": ("vit_tiny_patch16_224", {"img_size": 64}, 64),
    "mobilenetv3_small, 224 px": ("mobilenetv3_small_100", {}, 224),
    "resnet50, 224 px": ("resnet50", {}, 224),
}


def main() -> int:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=3, help="forwards at the largest batch; more at smaller ones")
    parser.add_argument("--head", default="auto", help="head of every exit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--ratios", nargs="*", metavar="NETWORK", help="the table beside the plain network; of all by default"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each line of that table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if arguments.ratios is not None:
        print_ratios(arguments.ratios or list(NETWORKS), arguments.batch_sizes, arguments.seconds, device)
        return 0
    model = sd.wrap(MODEL, head=arguments.head).eval().to(device)
    calibrate_statistics(model, torch.randn(8, 3, SIZE, SIZE, device=device))
    largest = max(arguments.batch_sizes)
    with torch.inference_mode():
        print(
            f"{'batch':>5}  {'left at':>15}  {'forward ms':>10}  {'bookkeeping ms':>14}  {'share %':>7}  {'highest':>7}"
        )
        for batch_size in arguments.batch_sizes:
            x = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
            rounds = arguments.rounds * (1 if batch_size == largest else 10)
            measure_bookkeeping(model, x, rounds)
        print(f"\n{'batch':>5}  {'truncated ms':>12}  {'by hand ms':>10}  {'ratio':>6}  {'quartiles':>13}")
        small, by_hand = sd.truncate(model, 0), FirstExitByHand(model)
        for batch_size in sorted({1, min(32, largest)}):
            compare(small, by_hand, torch.randn(batch_size, 3, SIZE, SIZE, device=device), 10 * arguments.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"\n{MODEL} at {SIZE} px, float32, heads {arguments.head}, exits {', '.join(model.exit_names[:-1])}, seed 0")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, {name}")
    print(f"command: python {shlex.join(sys.argv)}")
    return 0


@torch.inference_mode()
def print_ratios(names: list[str], batch_sizes: list[int], seconds: float, device: torch.device) -> None:
    """Print the time of early exit over that of the plain network, in turns, for several shares that leave."""
    print(f"{'':>26}  {'batch':>5}  {'plain ms':>8}  " + "  ".join(f"{way:>14}" for way in WAYS) + f"  {'rounds':>6}")
    for name in names:
        kind, kwargs, size = NETWORKS[name]
        torch.manual_seed(0)
        model = sd.wrap(timm.create_model(kind, num_classes=100, **kwargs), image_size=size).eval().to(device)
        calibrate_statistics(model, torch.randn(32, 3, size, size, device=device))
        for batch_size in batch_sizes:
            x = torch.randn(batch_size, 3, size, size, device=device)
            plain, ways = sd.truncate(model, model.num_exits), early_exit_ways(model, x)
            times = take_turns([plain, *ways], x, seconds)
            ratios = [[way / base for way, base in zip(column, times[0], strict=True)] for column in times[1:]]
            cells = [f"{statistics.median(column):.3f} ± {error(column):.3f}" for column in ratios]
            base = f"{name:>26}  {batch_size:>5}  {1000 * statistics.median(times[0]):>8.2f}"
            print(f"{base}  " + "  ".join(f"{cell:>14}" for cell in cells) + f"  {len(times[0]):>6}", flush=True)
    print(
        f"\nprocess time, torch {torch.__version__}, {torch.get_num_threads()} threads\ncommand: {shlex.join(sys.argv)}"
    )


WAYS = ("nobody", "nobody, closed", "none, by time", "quarters", "quarters, costs", "all at exit 0")


def early_exit_ways(model: sd.SelfDistillModel, x: Tensor) -> list[nn.Module]:
    """Return the network with the settings of each column."""
    nobody = sd.EarlyExit(model, 1.0001)  # every head runs, and no confidence is so high
    costs = sd.EarlyExit(model, 1.0001).measure(len(x))
    # Exits that know nothing of the classes: whatever calibration lets leave is lost.
    stored = ExitLogits(torch.randn(model.num_exits + 1, 512, 100), torch.randint(100, (512,)))
    stored.logits[-1, torch.arange(512), stored.targets] += 10
    paths = PathCosts.of_batch(costs, len(x))
    chosen = choose_settings(stored, paths, Goal(max_accuracy_drop=0.0)).config
    closed = sd.EarlyExit(model, 1.0001)
    closed.measure(len(x), images=x)
    # One image leaves at the second exit.
    thresholds = quarters(model, x) if len(x) > 1 else [1.0001, *[0.0] * (model.num_exits - 1)]
    return [
        nobody,
        closed,
        sd.EarlyExit.from_config(model, replace(chosen, costs=costs)),
        sd.EarlyExit(model, thresholds),
        sd.EarlyExit(model, thresholds, costs=costs),
        sd.EarlyExit(model, [0.0] + [1.0001] * (model.num_exits - 1)),
    ]


def take_turns(ways: list[nn.Module], x: Tensor, seconds: float) -> list[list[float]]:
    """Return the seconds of the process for each way, round by round, in an order that changes."""
    for way in ways:
        way(x)
    times: list[list[float]] = [[] for _ in ways]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[0]) < 5:
        for place in torch.randperm(len(ways)).tolist():
            start = time.process_time()
            ways[place](x)
            if x.device.type != "cpu":
                torch.accelerator.synchronize(x.device)
            times[place].append(time.process_time() - start)
    return times


def error(values: list[float]) -> float:
    """Return the standard error of a median, from the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return 0.93 * (high - low) / len(values) ** 0.5


def calibrate_statistics(model: nn.Module, x: Tensor) -> None:
    """Give the batch norms of an untrained network the statistics of random images, so that logits differ."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(x, return_exits=True)
    model.eval()


def measure_bookkeeping(model: sd.SelfDistillModel, x: Tensor, rounds: int) -> None:
    """Print what share of a forward is spent on neither backbone nor heads, with a quarter leaving at each exit."""
    # The most that one image can cost: every exit is asked, and the last added one is sure.
    alone = [1.1] * (model.num_exits - 1) + [0.0]
    thresholds = alone if len(x) == 1 else quarters(model, x)
    fast = sd.EarlyExit(model, thresholds)
    out = fast(x)
    left = [int((out.exit_index == exit).sum()) for exit in range(model.num_exits + 1)]
    totals, spent = [], []
    for _ in range(rounds):
        clock = Clock(x.device)
        with counting(clock):
            start = clock.now()
            fast(x)
            totals.append(clock.now() - start)
        spent.append(clock.seconds)
    shares = [100 * part / (total - part) for part, total in zip(spent, totals, strict=True)]
    print(
        f"{len(x):>5}  {'/'.join(map(str, left)):>15}  {1000 * statistics.median(totals):>10.2f}  "
        f"{1000 * statistics.median(spent):>11.3f}  {statistics.median(shares):>7.2f}  {max(shares):>7.2f}"
    )


def quarters(model: sd.SelfDistillModel, x: Tensor) -> list[float]:
    """Return thresholds at which about a quarter of all images leave at each exit."""
    confidence = torch.stack([logits.softmax(-1).amax(-1) for logits in model(x, return_exits=True).logits])
    left = torch.ones_like(confidence[0], dtype=torch.bool)
    thresholds = []
    for values in confidence[:-1]:
        ranked = values[left].sort(descending=True).values
        thresholds.append(float(ranked[min(len(x) // 4, len(ranked)) - 1]))
        left &= values < thresholds[-1]
    return thresholds


class Clock:
    """Adds up the time of the functions it is put around, less that of those it is told to leave out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        """Return the time when the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def around(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * (self.now() - start)

        return timed


@contextmanager
def counting(clock: Clock) -> Iterator[None]:
    """Time all that early exit adds to backbone and heads: confidences, who leaves, gathering, the output's order."""
    with ExitStack() as stack:
        for name in ("__init__", "visit", "finish", "output"):
            stack.enter_context(patch.object(LeavingBatch, name, clock.around(getattr(LeavingBatch, name))))
        stack.enter_context(patch.object(hooks, "_take_rows", clock.around(hooks._take_rows)))
        stack.enter_context(patch.object(ExitHead, "classify", clock.around(ExitHead.classify, sign=-1)))
        yield


class FirstExitByHand(nn.Module):
    """What the first exit of a ResNet runs, layer after layer."""

    def __init__(self, model: sd.SelfDistillModel) -> None:
        super().__init__()
        net: Any = model.backbone
        self.layers = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool, net.layer1)
        self.head: Any = model.heads[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the first exit's logits."""
        logits: Tensor = self.head.classify(self.layers(x))
        return logits


def compare(small: nn.Module, by_hand: nn.Module, x: Tensor, rounds: int) -> None:
    """Print the time of a truncated network beside that of its layers; the two take turns."""
    clock = Clock(x.device)
    assert torch.equal(small(x), by_hand(x))
    pairs = []
    for _ in range(rounds):
        times = []
        for run in (small, by_hand):
            start = clock.now()
            run(x)
            times.append(clock.now() - start)
        pairs.append(times)
    ratios = [one / other for one, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cut, hand = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{len(x):>5}  {cut:>12.2f}  {hand:>10.2f}  {middle:>6.3f}  {low:>6.3f}-{high:.3f}")


if __name__ == "__main__":
    sys.exit(main())
