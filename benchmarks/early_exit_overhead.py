"""Measure what early exit costs beyond the layers that it runs, and what truncation does.

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
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.early_exit.leaving import LeavingBatch
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.model import hooks

MODEL, SIZE = "resnet50", 224


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=3, help="forwards at the largest batch; more at smaller ones")
    parser.add_argument("--head", default="auto", help="head of every exit")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
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
