"""A multi-exit network as papers report it: accuracy at shares of the plain network's cost, and the anytime curve.

Run from the repository root, with the package installed: python benchmarks/multi_exit.py ANSWERS
ANSWERS is an answers.safetensors of benchmarks/gain.py. What each column means is told in benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from gain_report import SHARES, at_budget, percent
from safetensors import safe_open

import timm_selfdistill as sd
from timm_selfdistill.calibration.path_costs import PathCosts
from timm_selfdistill.early_exit import running_ensembles
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.render import align, markdown

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


if __name__ == "__main__":
    sys.exit(main())
