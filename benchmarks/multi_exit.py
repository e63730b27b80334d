"""A multi-exit network as papers report it: accuracy at shares of the plain network's cost, and the anytime curve.

Run from the repository root, with the package installed: python benchmarks/multi_exit.py ANSWERS [--beside RUN]
ANSWERS is an answers.safetensors of benchmarks/gain.py. With RUN, the folder of a run with saved early-exit settings,
early exit is timed beside earlyon (pip install earlyon) on the same network. What each column means is told in
benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gain_report import SHARES, at_budget, percent
from onnx_early_exit import evaluation_images, first, least_seconds
from safetensors import safe_open
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.early_exit import PathCosts, running_ensembles
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.report.render import align, markdown

# CIFAR-100 test accuracy by millions of multiply-adds, as MSDNet's authors publish it (https://arxiv.org/abs/1703.09844);
# another network, training and image size, so only the shape of the curve compares.
MSDNET = (
    (56.43, 64.10),
    (101.0, 67.46),
    (155.3, 70.34),
    (198.1, 72.38),
    (249.5, 73.06),
    (298.1, 73.81),
    (340.6, 73.89),
)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="answers.safetensors of a run of benchmarks/gain.py")
    parser.add_argument("--beside", type=Path, metavar="RUN", help="a run to time beside earlyon")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--images", type=int, default=512, help="test images that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    arguments = parser.parse_args()
    show = markdown if arguments.markdown else align
    with safe_open(arguments.answers, "pt") as file:
        costs = PathCosts(*map(tuple, json.loads(file.metadata()["macs"])))
        held_out, test = (
            ExitLogits(file.get_tensor(f"{name}.logits").float(), file.get_tensor(f"{name}.targets"))
            for name in ("validation", "eval")
        )
    fitted = sd.fit_ensemble(logits=list(held_out.logits), target=held_out.targets)
    held_out, test = replace(held_out, ensemble=fitted), replace(test, ensemble=fitted)
    print("\n".join(show([["budget", *(f"{share} %" for share in SHARES)], *budgeted(held_out, test, costs)])))
    print("\nanytime\n" + "\n".join(show([["exit", "% MACs", "alone", "with those before it"], *anytime(test, costs)])))
    published = [[f"{macs:.1f} M", f"{100 * macs / MSDNET[-1][0]:.0f}", f"{top1:.2f}"] for macs, top1 in MSDNET]
    print(
        "\nMSDNet on CIFAR-100, published\n" + "\n".join(show([["multiply-adds", "% of all", "top-1 %"], *published]))
    )
    if arguments.beside is not None:
        print(f"\nbeside earlyon {version('earlyon')}")
        print("\n".join(show([["", "batch", "top-1 %", "images/s", "speed-up"], *beside(arguments)])))
    print(
        f"\nTop-1 % of {len(test):,} images; thresholds, temperatures and weights chosen on {len(held_out):,} others. "
        f"The plain network: {costs.full / 1e6:.1f} M MACs.\ncommand: python {shlex.join(sys.argv)}"
    )
    return 0


def budgeted(held_out: ExitLogits, test: ExitLogits, costs: PathCosts) -> list[list[str]]:
    """Return lines of the accuracy within shares of the plain network's cost: early exit, and the best fixed exit."""
    early: list[str] = []
    fixed: list[str] = []
    for share in SHARES:
        found = at_budget(held_out, test, costs, int(share) / 100)
        early.append("-" if found is None else f"{found:.2f}")
        limit = int(share) / 100 * costs.full * (1 + 1e-9)
        within = [exit for exit in range(test.num_exits + 1) if costs.exit(exit) <= limit]
        best = max(within, key=lambda exit: percent(held_out.correct[exit]), default=None)
        fixed.append("-" if best is None else f"{percent(test.correct[best]):.2f} ({best})")
    return [["early exit", *early], ["one exit for all", *fixed]]


def anytime(test: ExitLogits, costs: PathCosts) -> list[list[str]]:
    """Return a line for each exit: what all images cost up to there, and the accuracy of the exit and the ensemble."""
    assert test.ensemble is not None
    running = is_right(running_ensembles(test.logits, test.ensemble), test.targets)
    paths = costs.paths([True] * test.num_exits) / costs.full
    return [
        [str(exit), f"{100 * float(cost):.0f}", f"{percent(alone):.2f}", f"{percent(together):.2f}"]
        for exit, (cost, alone, together) in enumerate(zip(paths, test.correct, running, strict=True))
    ]


@torch.inference_mode()
def beside(arguments: argparse.Namespace) -> list[list[str]]:
    """Return lines of the plain network, early exit and earlyon, with the same heads and settings, at each batch size.

    Accuracies are those of the images that are timed, in batches of this size: with earlyon, a batch leaves together.
    """
    fast = sd.load_early_exit(arguments.beside / "model")
    images, targets = first(evaluation_images(arguments.beside).eval, arguments.images)
    plain = sd.truncate(fast.model, fast.model.num_exits).eval()
    lines = []
    for batch_size in arguments.batch_sizes:
        ways: dict[str, Callable[[Tensor], Any]] = {"plain timm": plain, "timm_selfdistill": fast}
        other = earlyon(fast)
        ways["earlyon"] = other if batch_size == 1 else other.forward_inference_batched
        batches = list(images.split(batch_size))
        spent = least_seconds(list(ways.values()), batches, arguments.rounds)
        for (name, run), seconds in zip(ways.items(), spent, strict=True):
            logits = torch.cat([logits_of(run(batch)) for batch in batches])
            right = percent(logits.argmax(-1) == targets)
            speed = f"{len(images) / seconds:.0f}"
            lines.append([name, str(batch_size), f"{right:.2f}", speed, f"{spent[0] / seconds:.2f}x"])
    return lines


def earlyon(fast: sd.EarlyExit) -> Any:
    """Return the network as earlyon runs it: the same weights, heads, temperatures and thresholds."""
    from earlyon.core.types import EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper

    config, model = fast.config, fast.model
    assert (config.rule, config.fallback, config.running_ensemble) == ("max-softmax", "last", False)

    class Head(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.head = model.head_of(index)

        def forward(self, tap: Tensor) -> Tensor:
            logits: Tensor = self.head.classify(tap)
            return logits

    names = model.exit_names[:-1]
    points = [ExitPoint(f"exit{index}", name, 1) for index, name in enumerate(names)]
    temperatures = config.temperatures or (1.0,) * len(names)
    settings = EarlyExitConfig(
        "custom",
        model.num_classes,
        points,
        confidence_thresholds=[min(threshold, 1.0) for threshold in config.thresholds],
        enabled_exits=[threshold <= 1 for threshold in config.thresholds],
        temperatures={f"exit{index}": value for index, value in enumerate(temperatures)} | {"final": 1.0},
    )
    backbone = sd.truncate(model, model.num_exits).eval()
    size = (1, *model.pretrained_cfg["input_size"])
    heads = {point.name: Head(index) for index, point in enumerate(points)}
    return EarlyExitWrapper(backbone, heads, nn.Identity(), settings, input_shape=size).eval()


def logits_of(answer: Any) -> Tensor:
    """Return the logits [B, num_classes] of an answer of either library, or of a plain network."""
    for name in ("logits", "predictions", "prediction"):
        answer = getattr(answer, name, answer)
    logits: Tensor = answer
    return logits


if __name__ == "__main__":
    sys.exit(main())
