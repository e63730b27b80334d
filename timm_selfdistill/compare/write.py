"""A comparison as a table, as markdown and as files."""

from pathlib import Path

from timm_selfdistill.compare.picture import draw_comparison
from timm_selfdistill.compare.summary import Comparison, Difference, LossSummary, Spread
from timm_selfdistill.escape import each_text, markdown_text, printable
from timm_selfdistill.files import write_results
from timm_selfdistill.tables import align, markdown


def format_comparison(comparison: Comparison) -> str:
    """Return a comparison as two tables for the terminal, with what it says about the figures below.

    Args:
        comparison: What `compare` returned, or `comparison.json` holds.
    """
    comparison = each_text(comparison, printable)
    accuracy, difference = _accuracy_rows(comparison), _difference_rows(comparison)
    return "\n".join([*align(accuracy), "", *align(difference), "", *_notes(comparison)])


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.png`; each is complete or not there at all."""
    shown = each_text(comparison, markdown_text)
    lines = [f"## Losses compared: {shown['backbone']}", ""]
    for rows in (_accuracy_rows(shown), _difference_rows(shown)):
        lines += [*markdown(rows), ""]
    lines += [*_notes(shown), "", "![Top-1 accuracy of every exit with each loss](comparison.png)", ""]
    write_results(folder, "comparison", comparison, "\n".join(lines), draw_comparison(comparison))


def _accuracy_rows(comparison: Comparison) -> list[list[str]]:
    """Return, for each loss, the mean and standard deviation of every output, and the time to train."""
    names = _output_names(comparison)
    base = _summary(comparison, comparison["baseline"])["train_seconds"]["mean"]
    rows = [["top-1 %", *names, "minutes", "time"]]
    for entry in comparison["losses"]:
        found = {output["name"]: output["top1"] for output in entry["outputs"]}
        seconds = entry["train_seconds"]["mean"]
        cells = [_spread(found[name]) if name in found else "" for name in names]
        time = f"{seconds / base:.2f}x" if base else "n/a"
        rows.append([entry["loss"], *cells, f"{seconds / 60:.1f}", time])
    return rows


def _difference_rows(comparison: Comparison) -> list[list[str]]:
    """Return, for each loss, the paired difference of every output to the baseline's backbone."""
    names = _output_names(comparison)
    rows = [[f"vs. {comparison['baseline']}", *names]]
    for entry in comparison["losses"]:
        found = {output["name"]: output["difference"] for output in entry["outputs"]}
        rows.append([entry["loss"], *(_difference(found.get(name)) for name in names)])
    return rows


def _output_names(comparison: Comparison) -> list[str]:
    return [output["name"] for output in max((entry["outputs"] for entry in comparison["losses"]), key=len)]


def _summary(comparison: Comparison, loss: str) -> LossSummary:
    return next(entry for entry in comparison["losses"] if entry["loss"] == loss)


def _spread(spread: Spread) -> str:
    return f"{spread['mean']:.2f}" if spread["std"] is None else f"{spread['mean']:.2f} ± {spread['std']:.2f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference["low"] is None or difference["high"] is None:
        return f"{difference['mean']:+.2f}"
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _notes(comparison: Comparison) -> list[str]:
    """Return sentences that tell how the figures came about."""
    seeds = ", ".join(map(str, comparison["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    notes = [
        f"Accuracy on {comparison['dataset']} ({comparison['num_samples']:,} samples) after {comparison['epochs']} "
        f"epochs, recipe {comparison['recipe']}, seeds {seeds}.",
        f"Differences are percentage points to the backbone of {comparison['baseline']!r} with the same seed.",
        f"Minutes are those of the training steps on {comparison['device']}; versions: {versions}.",
    ]
    if len(comparison["seeds"]) > 1:
        notes.insert(1, "± is the standard deviation over the seeds, [ ] the 95 % confidence interval of the mean.")
    return notes
