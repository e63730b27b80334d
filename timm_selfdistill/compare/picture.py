"""A comparison as a picture: the accuracy of every output, one line per loss."""

import math

from matplotlib.figure import Figure

from timm_selfdistill.compare.summary import Comparison
from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.palette import BLUE, GREEN, GREY, GRID, INK, ORANGE

_COLORS = (GREY, "#8a5fb0", GREEN, BLUE, ORANGE, "#b03a5b", "#7a8b1f", "#3f3f9f")
_WIDTH = 0.5  # of the band in which the losses of one output stand side by side


def draw_comparison(comparison: Comparison) -> Figure:
    """Draw the mean top-1 accuracy of every output with each loss, and its standard deviation over the seeds.

    Args:
        comparison: What `compare` returned, or `comparison.json` holds.

    Returns:
        A figure that belongs to no window and to no global state of matplotlib; save it with its `savefig`.
    """
    comparison = each_text(comparison, plot_text)
    losses = comparison["losses"]
    names = [output["name"] for output in max((entry["outputs"] for entry in losses), key=len)]
    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    axes = figure.add_subplot()
    for index, entry in enumerate(losses):
        shift = _WIDTH * ((index + 0.5) / len(losses) - 0.5)
        color = _COLORS[index % len(_COLORS)]
        places = [names.index(output["name"]) + shift for output in entry["outputs"]]
        means = [output["top1"]["mean"] for output in entry["outputs"]]
        spreads = [output["top1"]["std"] or 0.0 for output in entry["outputs"]]
        axes.errorbar(places, means, spreads, fmt="o", color=color, markersize=7, capsize=3, label=entry["loss"])
        for place, output in zip(places, entry["outputs"], strict=True):
            values = output["top1"]["values"]
            axes.plot([place] * len(values), values, "_", color=color, alpha=0.5, markersize=9)
    base = next(entry for entry in losses if entry["loss"] == comparison["baseline"])
    deepest = next(output for output in reversed(base["outputs"]) if output["name"] != "ensemble")
    axes.axhline(deepest["top1"]["mean"], color=GREY, linestyle=(0, (5, 4)), linewidth=1.2, zorder=1)
    low, high = axes.get_ylim()
    padding = max(1.0, 0.1 * (high - low)) if math.isfinite(high - low) else 1.0
    axes.set_ylim(low - padding, high + padding)
    axes.set_xticks(range(len(names)), [_label(name, position, names) for position, name in enumerate(names)])
    axes.set_ylabel("top-1 accuracy (%)", color=INK)
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    seeds = len(comparison["seeds"])
    spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else f"seed {comparison['seeds'][0]}"
    subtitle = f"{comparison['dataset']} · recipe {comparison['recipe']}, {comparison['epochs']} epochs · {spread}"
    axes.set_title(subtitle, loc="left", fontsize=9.5, color=GREY, pad=10)
    title = figure.suptitle(f"{comparison['backbone']}: losses compared", fontsize=14, ha="left")
    figure.legend(loc="outside lower center", ncols=min(4, len(losses)), frameon=False, fontsize=9.5)
    figure.draw_without_rendering()
    title.set_x(axes.get_position().x0)
    return figure


def _label(name: str, position: int, names: list[str]) -> str:
    """Return what stands below an output: exits by index and module, the backbone, the ensemble."""
    if name == "ensemble":
        return name
    exits = len(names) - 1 if names[-1] == "ensemble" else len(names)
    return "backbone" if position == exits - 1 else f"{position}: {name}"
