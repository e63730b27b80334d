"""The report as a table, as markdown, as a picture (accuracy over compute) and as files."""

import os
from pathlib import Path
from typing import Any, Final, cast

from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.metrics import top1_interval
from timm_selfdistill.report import render
from timm_selfdistill.report.report_content import AccuracyRow, EnsembleRow, ExitRow, Report

# Largest class over smallest, from which on the report has the macro recall.
_UNEVEN: Final = 1.5
# Title and format of a metric's column; a metric that is not here is shown under its own name.
_COLUMNS: Final = {"top5": ("top-5 %", ".2f"), "ece": ("ECE", ".3f")}
_SHOWN_APART: Final = ("top1", "top1_interval", "gain_interval", "macro_recall")


def format_table(report: Report) -> str:
    """Return a report, as `build_report` makes it and `report.json` holds it, as a table for the terminal.

    Below are the sentences that explain the figures. There is no line break at the end.
    """
    return _PAGE.terminal(report)


def format_markdown(report: Report) -> str:
    """Return a report as a markdown section: heading, table and sentences, without the picture."""
    return _PAGE.markdown(report)


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write `report.json`, `.md` and `.png` to a folder, made if missing; each is complete or as it was before."""
    _PAGE.write(report, Path(folder))


def draw_report(report: Report) -> "render.Figure":
    """Draw top-1 accuracy over multiply-accumulates, with a point for each exit, the ensembles and the baseline.

    The figure belongs to no window and to no global state of matplotlib; save it with its `savefig`.
    """
    report = each_text(report, plot_text)
    exits, ensemble, baseline = report["exits"], report["ensemble"], report["baseline"]
    samples = f"{report['dataset']} ({report['num_samples']:,} samples)"
    figure, axes = render.new_picture(f"{samples} · recipe {report['recipe']}, seed {report['seed']}")
    render.plot_exits(figure, axes, exits, "-o", "exits")
    label = f"ensemble of all exits ({_percent(ensemble)})"
    render.plot_points(axes, [ensemble], "*", label, render.ORANGE, 17, zorder=4)
    # Hollow, so that they show around the mean and the last exit where these are equally good.
    hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.6, "zorder": 2}
    for row in _fitted_rows(report):
        label = f"fitted ensemble ({_percent(row)})"
        render.plot_points(axes, [row], "s", label, render.GREEN, 17, markeredgecolor=render.GREEN, **hollow)
    if baseline is not None:
        label = f"baseline: the backbone trained on its own ({_percent(baseline)})"
        hollow["markeredgecolor"] = render.GREY
        render.plot_points(axes, [{**exits[-1], **baseline}], "D", label, render.GREY, 16, **hollow)
        if baseline["top1"] is not None:
            axes.axhline(baseline["top1"], color=render.GREY, linestyle=(0, (5, 4)), linewidth=1.3, zorder=2)
    size = " x ".join(str(side) for side in report["input_size"])
    macs = [row["macs"] for row in [*exits, ensemble]]
    render.style_cost(axes, macs, exits[-1]["macs"], f"multiply-accumulates per image of {size}")
    render.style_accuracy(axes)
    render.style_axes(axes)
    title = f"{report['backbone']}, self-distilled: accuracy at every exit"
    render.finish_picture(figure, axes, title, columns=2 if _fitted_rows(report) else 3)
    return figure


def _tables(report: Report) -> list[render.Table]:
    """Return the table with a row for each exit, the ensembles and the baseline."""
    *shallow, last = report["exits"]
    baseline = report["baseline"]
    labelled: list[tuple[str, EnsembleRow | ExitRow]] = [
        *((f"{row['index']}: {row['name']}", row) for row in shallow),
        (f"{last['index']}: {last['name']} (backbone)", last),
        ("ensemble", report["ensemble"]),
        *(("ensemble, fitted", row) for row in _fitted_rows(report)),
    ]
    if baseline is not None:
        labelled.append(("baseline", {**last, **baseline, "running_top1": None}))
    lines: list[dict[str, str]] = []
    for label, row in labelled:
        cells = {"exit": label, "top-1 %": render.number(row["top1"], ".2f")}
        cells["95 % CI"] = render.interval(top1_interval(row["top1"], report["num_samples"]))
        if baseline is not None:
            cells["vs. baseline"] = "" if label == "baseline" else _gain(row, baseline)
        if _is_uneven(report):
            cells["macro recall %"] = render.number(row["macro_recall"], ".2f")
        running = row.get("running_top1")
        cells["exits 0..k %"] = "" if running is None else f"{running:.2f}"
        for metric in AccuracyRow.__annotations__:
            if metric not in _SHOWN_APART:
                title, spec = _COLUMNS.get(metric, (metric, ".3f"))
                cells[title] = render.number(dict[str, Any](row).get(metric), spec)
        cells |= {"params": render.with_prefix(row["params"]), "MACs": render.with_prefix(row["macs"])}
        cells |= {"ms/batch": f"{row['latency_ms']:.2f}", "speed-up": f"{row['speedup']:.2f}x"}
        lines.append(cells)
    return [[list(lines[0]), *(list(cells.values()) for cells in lines)]]


def _fitted_rows(report: Report) -> list[EnsembleRow]:
    """Return the row of the fitted ensemble, which costs what the mean costs; none without one, or in older reports."""
    fitted = report.get("fitted_ensemble")
    if fitted is None:
        return []
    own = {key: value for key, value in fitted.items() if key in AccuracyRow.__annotations__}
    return [cast(EnsembleRow, {**report["ensemble"], **own})]


def _gain(row: AccuracyRow, baseline: AccuracyRow) -> str:
    """Return the difference from the baseline with its interval, which reports from before do not have."""
    if row["top1"] is None or baseline["top1"] is None:
        return render.MISSING
    interval = row.get("gain_interval")
    bounds = "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"
    return f"{row['top1'] - baseline['top1']:+.2f}{bounds}"


def _is_uneven(report: Report) -> bool:
    """Whether the classes have so different numbers of images that their mean accuracy tells more."""
    smallest, largest = report.get("class_sizes") or (1, 1)
    return largest > _UNEVEN * smallest


def _sentences(report: Report) -> list[str]:
    size = " x ".join(str(side) for side in report["input_size"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    found = [
        f"Accuracy on {report['dataset']} ({report['num_samples']:,} samples), "
        f"recipe {report['recipe']}, seed {report['seed']}.",
        f"MACs (multiply-accumulates) are for one image of {size}.",
        "95 % CI: Wilson's confidence interval of top-1 on this many images.",
        "Exits 0..k: the top-1 accuracy of the ensemble of the exits up to this one.",
        f"Latency is the median of {report['latency_rounds']} runs of a batch of {report['latency_batch_size']} in "
        f"{report['dtype']} on {report['device']} with {_count(report['threads'], 'thread')}; versions: {versions}.",
    ]
    if fitted := report.get("fitted_ensemble"):
        weights = " ".join(f"{weight:.3g}" for weight in fitted["weights"])
        images = "held-out images" if fitted["images"] is None else _count(fitted["images"], "held-out image")
        found.append(f"The fitted ensemble weighs the outputs {weights}, by {images}; the ensemble is their mean.")
    if report["baseline"] is not None:
        found.append("The baseline is the same backbone, trained on its own; it costs what the last exit costs.")
        if report["exits"][-1].get("gain_interval") is not None:
            found.append("Differences from it are with their 95 % confidence intervals, of answers to the same images.")
    if _is_uneven(report):
        smallest, largest = report["class_sizes"]
        found.append(
            f"Macro recall is the mean accuracy of the classes, of which the smallest has "
            f"{_count(smallest, 'image')} and the largest {largest:,}."
        )
    if any(report["num_skipped"].values()):
        counts = ", ".join(f"{count:,} for {use}" for use, count in report["num_skipped"].items())
        found.append(f"Images that could not be decoded, and are not counted: {counts}.")
    if report["num_nonfinite"]:
        found.append(f"For {_count(report['num_nonfinite'], 'sample')} an output was not a number: counted as wrong.")
    ensembles = [report["ensemble"], *_fitted_rows(report)]
    accuracies: list[AccuracyRow] = [*report["exits"], *ensembles, *filter(None, [report["baseline"]])]
    if any(row[key] is None for row in accuracies for key in ("top1", "top5", "ece")):
        found.append(f"{render.MISSING} (null in report.json): the value was not a finite number.")
    return found


def _percent(row: AccuracyRow) -> str:
    return render.number(row["top1"], ".2f") + ("" if row["top1"] is None else " %")


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


_PAGE = render.Page(
    "report", "Scalable depth", "Accuracy of every exit over its compute", _tables, _sentences, draw_report
)
