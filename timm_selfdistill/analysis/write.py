"""An analysis as tables, as markdown and as files."""

from collections.abc import Sequence
from pathlib import Path

from timm_selfdistill.analysis.noise import NoisePoint
from timm_selfdistill.analysis.picture import draw_analysis
from timm_selfdistill.analysis.report import Analysis
from timm_selfdistill.escape import each_text, markdown_text, printable
from timm_selfdistill.files import write_results
from timm_selfdistill.tables import align, markdown, with_prefix

_MISSING = "n/a"


def format_analysis(analysis: Analysis) -> str:
    """Return the analysis as three tables for the terminal, with what it says about the figures below.

    Args:
        analysis: What `analyze_folder` returned, or `analysis.json` holds.

    Returns:
        Lines of text, without a line break at the end.
    """
    analysis = each_text(analysis, printable)
    tables = [line for rows in _tables(analysis) for line in [*align(rows), ""]]
    return "\n".join([*tables, *_notes(analysis)])


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json`, `analysis.md` and `analysis.png`; each is complete or not there at all.

    Args:
        analysis: What `analyze_folder` returned.
        folder: Where to write; created if missing.
    """
    shown = each_text(analysis, markdown_text)
    lines = [f"## Why it works: {shown['backbone']}", ""]
    for rows in _tables(shown):
        lines += [*markdown(rows), ""]
    lines += [*_notes(shown), "", "![Noise on the weights, gradients by stage, features by exit](analysis.png)", ""]
    write_results(folder, "analysis", analysis, "\n".join(lines), draw_analysis(analysis))


def _tables(analysis: Analysis) -> list[list[list[str]]]:
    """Return header and rows of each table."""
    return [_noise(analysis), _gradients(analysis), _features(analysis)]


def _noise(analysis: Analysis) -> list[list[str]]:
    noise = analysis["noise"]
    curves = [noise["network"]] if noise["baseline"] is None else [noise["network"], noise["baseline"]]
    header = ["noise", "top-1 %", "loss", "baseline %", "its loss"][: 1 + 2 * len(curves)]
    rows = [
        [f"{points[0]['sigma']:g}", *(cell for point in points for cell in _cells(point))]
        for points in zip(*curves, strict=True)
    ]
    return [header, *rows]


def _cells(point: NoisePoint) -> list[str]:
    return [_spread(point["top1"], point["top1_std"], ".2f"), _spread(point["loss"], point["loss_std"], ".3f")]


def _gradients(analysis: Analysis) -> list[list[str]]:
    has_own, has_baseline = analysis["gradients"]["own_loss"] is None, analysis["baseline"] is not None
    columns = [True, True, has_own, True, has_baseline]
    rows = [["stage", "params", "own loss", "its CE alone", "baseline's CE"]]
    for stage in analysis["gradients"]["stages"]:
        values = [_number(value, ".3g") for value in (stage["network"], stage["network_ce"], stage["baseline"])]
        rows.append([stage["name"], with_prefix(stage["params"]), *values])
    return [[cell for cell, shown in zip(row, columns, strict=True) if shown] for row in rows]


def _features(analysis: Analysis) -> list[list[str]]:
    rows = [["features", "within", "between", "within/between", "in 2-D"]]
    exits = [row["name"] for row in analysis["features"] if row["name"] != "baseline"]
    for index, row in enumerate(analysis["features"]):
        scatter = row["scatter"]
        note = " (backbone)" if index == len(exits) - 1 else ""
        rows.append(
            [
                "baseline" if index == len(exits) else f"{index}: {row['name']}{note}",
                f"{scatter['within']:.3g}",
                f"{scatter['between']:.3g}",
                _number(scatter["ratio"], ".3g"),
                f"{sum(row['projection']['explained']):.0%}",
            ]
        )
    return rows


def _spread(mean: float | None, std: float | None, spec: str) -> str:
    return _number(mean, spec) if mean is None or std is None else f"{mean:{spec}} ± {std:{spec}}"


def _number(value: float | None, spec: str) -> str:
    return _MISSING if value is None else format(value, spec)


def _notes(analysis: Analysis) -> Sequence[str]:
    """Return sentences that tell how the figures came about."""
    noise, gradients = analysis["noise"], analysis["gradients"]
    several = f"mean and standard deviation of {noise['draws']} draws" if noise["draws"] > 1 else "one draw"
    of_baseline = noise["baseline_weight_rms"]
    beside = "" if of_baseline is None else f", {of_baseline:.3g} in the baseline"
    notes = [
        f"{analysis['dataset']} ({analysis['num_samples']:,} samples), recipe {analysis['recipe']}, seed "
        f"{analysis['seed']}.",
        "Noise: standard deviation of what is added to every parameter of the backbone, whose own classifier answers, "
        f"in precision {analysis['precision']}; {several}. The root mean square of the weights is "
        f"{noise['weight_rms']:.3g}{beside}.",
        f"Gradients: mean magnitude over the parameters of a stage, in training mode, over {gradients['num_batches']} "
        f"batches of {gradients['batch_size']} images of {gradients['dataset']}, at the saved weights.",
        "Features: mean squared distance of an image from the mean of its class (within), and of that from the mean of "
        "all (between); in 2-D: the share of the variance that the picture shows.",
    ]
    if gradients["own_loss"] is not None:
        notes.append(f"The gradient of the loss it was trained with is not shown: {gradients['own_loss']}.")
    if analysis["baseline"] is None:
        notes.append(
            "There is no baseline: neither a checkpoint of one in the run (baseline=true), nor --baseline FOLDER."
        )
    else:
        notes.append(f"The baseline is the same backbone, trained on its own: {analysis['baseline']}.")
    if analysis["num_skipped"]:
        notes.append(f"Images that could not be decoded, and are not counted: {analysis['num_skipped']:,}.")
    return notes
