"""The report as a table, as markdown and as files."""

import os
from collections.abc import Sequence
from pathlib import Path

from timm_selfdistill.escape import each_text, markdown_text, printable
from timm_selfdistill.files import write_results
from timm_selfdistill.report.build import AccuracyRow, EnsembleRow, ExitRow, Report
from timm_selfdistill.report.picture import draw_report
from timm_selfdistill.tables import align, markdown, with_prefix

_MISSING = "n/a"


def format_table(report: Report) -> str:
    """Return the report as a table for the terminal, with what it says about the figures below.

    Args:
        report: What `build_report` returned, or `report.json` holds.

    Returns:
        Lines of text, without a line break at the end.
    """
    report = each_text(report, printable)
    return "\n".join([*align(_rows(report)), "", *_notes(report)])


def format_markdown(report: Report) -> str:
    """Return the report as a markdown section, without the picture.

    Args:
        report: What `build_report` returned, or `report.json` holds.

    Returns:
        Heading, table and what it says about the figures, ending with a line break.
    """
    report = each_text(report, markdown_text)
    return "\n".join(
        [f"## Scalable depth: {report['backbone']}", "", *markdown(_rows(report)), "", *_notes(report), ""]
    )


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write `report.json`, `report.md` and `report.png`; each is complete or not there at all.

    Args:
        report: What `build_report` returned.
        folder: Where to write; created if missing.
    """
    text = f"{format_markdown(report)}\n![Accuracy of every exit over its compute](report.png)\n"
    write_results(Path(folder), "report", report, text, draw_report(report))


def _rows(report: Report) -> list[list[str]]:
    """Return the header and a row for each exit, the ensemble and the baseline, as text."""
    *shallow, last = report["exits"]
    baseline = report["baseline"]
    header = ["exit", "top-1 %", "vs. baseline", "top-5 %", "ECE", "params", "MACs", "ms/batch", "speed-up"]
    rows = [_row(f"{row['index']}: {row['name']}", row, baseline) for row in shallow]
    rows.append(_row(f"{last['index']}: {last['name']} (backbone)", last, baseline))
    rows.append(_row("ensemble", report["ensemble"], baseline))
    if baseline is None:
        return [cells[:2] + cells[3:] for cells in [header, *rows]]
    return [header, *rows, _row("baseline", {**last, **baseline}, None)]


def _row(label: str, row: EnsembleRow | ExitRow, baseline: AccuracyRow | None) -> list[str]:
    return [
        label,
        _number(row["top1"], ".2f"),
        "" if baseline is None else _number(_minus(row["top1"], baseline["top1"]), "+.2f"),
        _number(row["top5"], ".2f"),
        _number(row["ece"], ".3f"),
        with_prefix(row["params"]),
        with_prefix(row["macs"]),
        f"{row['latency_ms']:.2f}",
        f"{row['speedup']:.2f}x",
    ]


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _number(value: float | None, spec: str) -> str:
    return _MISSING if value is None else format(value, spec)


def _notes(report: Report) -> list[str]:
    """Return sentences that tell how the figures came about."""
    size = " x ".join(str(side) for side in report["input_size"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes = [
        f"Accuracy on {report['dataset']} ({report['num_samples']:,} samples), "
        f"recipe {report['recipe']}, seed {report['seed']}.",
        f"MACs (multiply-accumulates) are for one image of {size}.",
        f"Latency is the median of {report['latency_rounds']} runs of a batch of {report['latency_batch_size']} in "
        f"{report['dtype']} on {report['device']} with {_count(report['threads'], 'thread')}; versions: {versions}.",
    ]
    if report["baseline"] is not None:
        notes.append("The baseline is the same backbone, trained on its own; it costs what the last exit costs.")
    if any(report["num_skipped"].values()):
        counts = ", ".join(f"{number:,} for {use}" for use, number in report["num_skipped"].items())
        notes.append(f"Images that could not be decoded, and are not counted: {counts}.")
    if report["num_nonfinite"]:
        notes.append(f"For {_count(report['num_nonfinite'], 'sample')} an output was not a number: counted as wrong.")
    if any(value is None for row in _accuracies(report) for value in row.values()):
        notes.append(f"{_MISSING} (null in report.json): the value was not a finite number.")
    return notes


def _accuracies(report: Report) -> Sequence[AccuracyRow]:
    baseline = [] if report["baseline"] is None else [report["baseline"]]
    return [*report["exits"], report["ensemble"], *baseline]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
