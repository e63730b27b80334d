"""The tables and the picture of what self-distillation gives, from the runs of benchmarks/gain.py.

    python benchmarks/gain_report.py FOLDER --results docs/gain.json --picture docs/gain.png

What runs in FOLDER gave is added to the results file, so that runs of several machines and days come together. Run from
the repository root, with the package installed. What each column means, benchmarks/README.md tells.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from scipy.special import stdtrit
from torch import Tensor

import timm_selfdistill as sd
from timm_selfdistill.calibration import Goal, choose_settings
from timm_selfdistill.early_exit import EarlyExitConfig, PathCosts, replay, running_ensembles
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.report.render import BLUE, GREEN, GREY, ORANGE, align, markdown, style_axes

SHARES = ("25", "50", "75", "100")
BASELINE = "none"
COLORS = (BLUE, ORANGE, GREEN, "#7b4fa3")
HEADER = ["", "seeds", "backbone", "mean", "fitted", *(f"{share} % MACs" for share in SHARES), "AUROC", "time"]

TITLES = {
    "T1": "narrow ResNet-18, CIFAR-100",
    "T2": "ResNet-18, CIFAR-100",
    "T3": "ResNet-18, ten ImageNet classes",
    "T4": "EfficientNet-Lite0, fine-tuned",
}

Results = dict[str, dict[str, dict[str, Any]]]


def main() -> int:
    """Read the runs, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where gain.py put its runs; none reads the results only")
    parser.add_argument("--results", type=Path, help="JSON file of results, to which those of the runs are added")
    parser.add_argument("--picture", type=Path, help="where the picture goes")
    parser.add_argument("--show", default="deep-supervision,byot-iccv2019", help="methods in the picture")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    arguments = parser.parse_args()
    results: Results = json.loads(arguments.results.read_text()) if arguments.results else {}
    for path in sorted(arguments.folder.glob("T*/*/answers.safetensors")) if arguments.folder else []:
        method, _, seed = path.parent.name.rpartition("-seed-")
        results.setdefault(path.parent.parent.name, {}).setdefault(method, {})[seed] = measured(path)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for task, methods in sorted(results.items()):
        rows = [line(method, methods) for method in sorted(methods, key=lambda name: (name != BASELINE, name))]
        table = [HEADER, *filter(None, rows)]
        print(f"\n{task}\n\n" + "\n".join(markdown(table) if arguments.markdown else align(table)))
    if arguments.picture:
        draw(results, arguments.show.split(",")).savefig(arguments.picture)
    return 0


def measured(path: Path) -> dict[str, Any]:
    """Return what one run gives on the test images; all that is chosen is chosen on the images held out."""
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        held_out, test = (
            ExitLogits(file.get_tensor(f"{name}.logits").float(), file.get_tensor(f"{name}.targets"))
            for name in ("validation", "eval")
        )
    fitted = sd.fit_ensemble(logits=list(held_out.logits), target=held_out.targets)
    found: dict[str, Any] = {
        "backbone": percent(test.correct[-1]),
        "mean": percent(test.ensemble_correct),
        "auroc": [
            auroc(logits.softmax(-1).amax(-1), right) for logits, right in zip(test.logits, test.correct, strict=True)
        ],
        "seconds": float(facts["seconds"]),
        "images": [len(held_out), len(test)],
    }
    held_out, test = replace(held_out, ensemble=fitted), replace(test, ensemble=fitted)
    found["fitted"] = percent(test.ensemble_correct)
    costs = PathCosts(*map(tuple, json.loads(facts["macs"])))
    for share in SHARES:
        found[share] = at_budget(held_out, test, costs, int(share) / 100)
    paths = costs.paths([True] * len(costs.heads)) / costs.full
    running = is_right(running_ensembles(test.logits, fitted), test.targets)
    found["anytime"] = [[float(cost), percent(right)] for cost, right in zip(paths, running, strict=True)]
    return found


def at_budget(held_out: ExitLogits, test: ExitLogits, costs: PathCosts, share: float) -> float | None:
    """Return the accuracy of early exit at a share of the plain network's MACs; None if no setting is so cheap.

    Whether exits answer for themselves or with those before them is chosen on the images held out, too.
    """
    goal, found = Goal(macs_budget=share * costs.full), []
    for running in (False, True):
        try:
            config = choose_settings(held_out, costs, goal, running_ensemble=running).config
        except ValueError:
            continue
        found.append([_percent_right(config, split) for split in (held_out, test)])
    return max(found)[1] if found else None


def _percent_right(config: EarlyExitConfig, split: ExitLogits) -> float:
    return percent(is_right(replay(config, split.logits, ensemble=split.ensemble).logits, split.targets))


def line(method: str, methods: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
    """Return the line of a method: top-1 in percent, less that of the plain backbone of the same seed."""
    plain, runs = methods.get(BASELINE, {}), methods[method]
    seeds = sorted(set(runs) & set(plain))
    if not seeds:
        return None
    if method == BASELINE:
        cells = [f"{statistics.mean(plain[seed]['backbone'] for seed in seeds):.2f}", *[""] * (2 + len(SHARES))]
    else:
        cells = [
            difference([(runs[seed][key], plain[seed]["backbone"]) for seed in seeds])
            for key in ("backbone", "mean", "fitted", *SHARES)
        ]
    areas = zip(*(runs[seed]["auroc"] for seed in seeds), strict=True)
    time = statistics.mean(runs[seed]["seconds"] / plain[seed]["seconds"] for seed in seeds)
    return [method, str(len(seeds)), *cells, " ".join(f"{statistics.mean(area):.2f}" for area in areas), f"{time:.2f}"]


def difference(pairs: Sequence[tuple[float | None, float]]) -> str:
    """Return the mean difference with half of its 95 % confidence interval by Student's t; "" if a value is missing."""
    values = [value - plain for value, plain in pairs if value is not None]
    if len(values) < len(pairs):
        return ""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    half = stdtrit(len(values) - 1, 0.975) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ±{half:.2f}"


def draw(results: Results, shown: Sequence[str]) -> Figure:
    """Draw accuracy over compute for each task: the anytime curve, and early exit with calibrated thresholds."""
    results = {task: methods for task, methods in results.items() if task in TITLES}
    figure = Figure(figsize=(max(6.4, 4.2 * len(results)), 5), dpi=150, facecolor="white", layout="constrained")
    plots = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (task, methods) in zip(plots, sorted(results.items()), strict=True):
        style_axes(axes)
        plain = statistics.mean(run["backbone"] for run in methods[BASELINE].values())
        axes.axhline(plain, color=GREY, linestyle=":")
        axes.plot([100], [plain], "D", color=GREY, label="plain network")
        for method, color in zip(shown, COLORS, strict=False):
            if runs := list(methods.get(method, {}).values()):
                axes.plot(*zip(*_anytime(runs), strict=True), "o-", color=color, label=f"{method}, anytime")
                axes.plot(*zip(*_budgets(runs), strict=True), "s--", color=color, mfc="white", label="early exit")
        axes.set_title(f"{task}: {TITLES[task]}", loc="left", fontsize=10)
        axes.set_xlabel("multiply-accumulates, % of the plain network's")
    plots[0].set_ylabel("top-1 accuracy (%)")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _anytime(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    for points in zip(*(run["anytime"] for run in runs), strict=True):
        yield 100 * points[0][0], statistics.mean(accuracy for _, accuracy in points)


def _budgets(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    for share in SHARES:
        values = [run[share] for run in runs]
        if None not in values:
            yield float(share), statistics.mean(values)


def auroc(score: Tensor, positive: Tensor) -> float:
    """Return the share of pairs of a right and a wrong answer in which the right one has the higher score."""
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    right = int(positive.sum())
    pairs = right * (len(score) - right)
    return float((rank[positive].sum() - right * (right + 1) / 2) / pairs) if pairs else 0.5


def percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


if __name__ == "__main__":
    sys.exit(main())
