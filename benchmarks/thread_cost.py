"""Measure what it costs that each thread has its own state, against hooks that share one object.

    python benchmarks/thread_cost.py

One image at a time, exits and all. The forwards take turns; ratios are taken pair by pair. As a shared machine's noise
is larger than the cost, the hooks' own time is also measured on a backbone of layers that do nothing.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.model.hooks import Hooks


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both kinds of hooks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--pairs", type=int, default=100, help="forwards of each kind")
    args = parser.parse_args(arguments)
    print("| model | shared ms | per thread ms | ratio (quartiles) | hooks: shared us | per thread us | more % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with torch.inference_mode():
        for name in args.models:
            _compare(name, args.pairs)
    print(
        f"\nMedians of {args.pairs} pairs, float32, {torch.get_num_threads()} threads of {os.cpu_count()} CPU cores; "
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}."
    )


class SharedHooks:
    """Hooks of a model that all write to one object, as if no two threads ever called it."""

    def __init__(self, model: sd.SelfDistillModel, backbone: nn.Module) -> None:
        self.active = False
        self.taps: dict[int, tuple[Tensor, ...]] = {}
        self.features: dict[str, Tensor] = {}
        for index, point in enumerate(model.points):
            members = tuple(tap.member for tap in point.taps)
            backbone.get_submodule(point.module).register_forward_hook(partial(self.record_tap, index, members))
        for path in model.taps.classifier.modules:
            backbone.get_submodule(path).register_forward_pre_hook(partial(self.record_feature, path))

    def record_tap(self, index: int, members: Sequence[int | None], module: nn.Module, args: Any, output: Any) -> None:
        """Record what an exit's module returned."""
        if self.active:
            self.taps[index] = tuple(output if member is None else output[member] for member in members)

    def record_feature(self, path: str, module: nn.Module, args: Any) -> None:
        """Record what enters the classifier."""
        if self.active:
            self.features[path] = args[0]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record in the body."""
        self.active = True
        try:
            yield
        finally:
            self.active, self.taps, self.features = False, {}, {}


class Idle(nn.Module):
    """The layers that the hooks of a model hang on, doing nothing."""

    def __init__(self, model: sd.SelfDistillModel) -> None:
        super().__init__()
        classifiers = model.taps.classifier.modules
        for path in (*(point.module for point in model.points), *classifiers):
            parent: nn.Module = self
            *parts, last = path.split(".")
            for part in parts:
                if part not in parent._modules:
                    parent.add_module(part, nn.Sequential())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Identity())
        names = (*(point.name for point in model.points), *classifiers)
        self.layers = tuple(self.get_submodule(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        """Call each of them."""
        for layer in self.layers:
            layer(x)
        return x


def _compare(name: str, pairs: int) -> None:
    torch.manual_seed(0)
    model = sd.wrap(name).eval()
    backbone = timm.create_model(name).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    shared = SharedHooks(model, backbone)

    def run_shared(x: Tensor) -> sd.ExitOutput:
        with shared.recording():
            logits = backbone(x)
            feature = model._teacher_feature(shared.features)
            outputs = [head(*shared.taps[index]) for index, head in enumerate(model.heads)]
        return sd.ExitOutput((*(out[0] for out in outputs), logits), (*(out[1] for out in outputs), feature))

    x = torch.randn(1, 3, 224, 224)
    run_own = partial(model, return_exits=True)
    assert all(map(torch.equal, run_own(x).logits, run_shared(x).logits))
    forwards = _take_turns([partial(run_shared, x), partial(run_own, x)], pairs)
    ratios = [own / other for other, own in forwards]
    low, middle, high = statistics.quantiles(ratios, n=4)

    idle, idle_shared, y = Idle(model), Idle(model), torch.zeros(1, 1)
    own_hooks = Hooks(idle, model.points, model.taps.classifier.modules)
    shared = SharedHooks(model, idle_shared)

    def idle_run() -> None:
        with shared.recording():
            idle_shared(y)

    hooks = _take_turns([idle_run, partial(own_hooks.run, idle, y)], 50 * pairs)
    ms = [1e3 * statistics.median(column) for column in zip(*forwards, strict=True)]
    us = [1e6 * statistics.median(column) for column in zip(*hooks, strict=True)]
    print(
        f"| {name} | {ms[0]:.2f} | {ms[1]:.2f} | {middle:.4f} ({low:.4f}-{high:.4f}) | {us[0]:.1f} | {us[1]:.1f} | "
        f"{(us[1] - us[0]) / ms[0] / 10:.3f} |"
    )


def _take_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of each run in each round; who is first changes from round to round."""
    times = []
    for number in range(rounds + 2):
        seconds = [0.0] * len(runs)
        for index in sorted(range(len(runs)), reverse=number % 2 == 1):
            start = time.perf_counter()
            runs[index]()
            seconds[index] = time.perf_counter() - start
        times.append(seconds)
    return times[2:]


if __name__ == "__main__":
    main()
