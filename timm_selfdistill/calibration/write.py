"""The report of a calibration as tables, as markdown and as files."""

from pathlib import Path

from timm_selfdistill.calibration.calibration_report import CalibrationReport, Point
from timm_selfdistill.calibration.picture import draw_calibration
from timm_selfdistill.early_exit import get_rule
from timm_selfdistill.escape import each_text, markdown_text, printable
from timm_selfdistill.files import write_results
from timm_selfdistill.tables import align, markdown, with_prefix

_GOALS = {
    "max_accuracy_drop": "an accuracy at most {:g} points below the backbone's",
    "speedup": "a cost {:g} times less than the backbone's",
    "macs_budget": "at most {:g} MACs",
    "risk": "a risk of at most {:g}",
}


def format_calibration(report: CalibrationReport) -> str:
    """Return the report as two tables for the terminal, with what it says about the figures below.

    Args:
        report: What `calibrate_folder` returned, or `calibration.json` holds.

    Returns:
        Lines of text, without a line break at the end.
    """
    report = each_text(report, printable)
    return "\n".join([*align(_results(report)), "", *align(_settings(report)), "", *_notes(report)])


def format_calibration_markdown(report: CalibrationReport) -> str:
    """Return the report as a markdown section, without the picture.

    Args:
        report: What `calibrate_folder` returned, or `calibration.json` holds.
    """
    report = each_text(report, markdown_text)
    lines = [f"## Early exit: {report['backbone']}", ""]
    for rows in (_results(report), _settings(report)):
        lines += [*markdown(rows), ""]
    return "\n".join([*lines, *_notes(report), ""])


def write_calibration(report: CalibrationReport, folder: Path) -> None:
    """Write `calibration.json`, `calibration.md` and `calibration.png`; each is complete or not there at all.

    Args:
        report: What `build_calibration_report` returned.
        folder: Where to write; created if missing.
    """
    text = f"{format_calibration_markdown(report)}\n![Accuracy of early exit over its compute](calibration.png)\n"
    write_results(folder, "calibration", report, text, draw_calibration(report))


def _results(report: CalibrationReport) -> list[list[str]]:
    """Return the header and a row for each way to answer."""
    backbone = report["exits"][-1]
    rows = [["early exit", *_cells(report["early_exit"], backbone)]]
    for row in report["exits"]:
        note = " (backbone)" if row is backbone else ""
        rows.append([f"{row['index']}: {row['name']}{note}", *_cells(row, backbone)])
    rows.append(["ensemble", *_cells(report["ensemble"], backbone)])
    if report["baseline"] is not None:
        rows.append(["baseline", *_cells(report["baseline"], backbone)])
    rows.append(["oracle", *_cells(report["oracle"], backbone)])
    return [["", "top-1 %", "vs. backbone", "MACs", "speed-up"], *rows]


def _cells(point: Point, backbone: Point) -> list[str]:
    return [
        f"{point['top1']:.2f}",
        f"{point['top1'] - backbone['top1']:+.2f}",
        with_prefix(point["macs"]),
        f"{point['speedup']:.2f}x",
    ]


def _settings(report: CalibrationReport) -> list[list[str]]:
    """Return the header and a row for each exit: its settings, and the images that leave there."""
    settings, exits = report["settings"], report["exits"]
    temperatures = settings["temperatures"] or [1.0] * len(settings["thresholds"])
    rows = [["exit", "temperature", "threshold", "leave here", "oracle"]]
    for row, share, ideal in zip(exits, report["early_exit"]["shares"], report["oracle"]["shares"], strict=True):
        cells = ["", ""]
        if row is not exits[-1]:
            threshold = settings["thresholds"][row["index"]]
            cells = [f"{temperatures[row['index']]:.3f}", _threshold(settings["rule"], threshold)]
        rows.append([f"{row['index']}: {row['name']}", *cells, f"{share:.1%}", f"{ideal:.1%}"])
    return rows


def _threshold(rule: str, value: float | None) -> str:
    """Return a threshold, in words where it lets no image leave, or every one."""
    if value is None:
        return "never"
    return "always" if value <= get_rule(rule).always else f"{value:.4f}"


def _notes(report: CalibrationReport) -> list[str]:
    """Return sentences that tell how the figures came about."""
    chosen, settings, goal = report["calibration"], report["settings"], report["goal"]
    name, value = next(iter(goal.items()))
    size = " x ".join(str(side) for side in report["input_size"])
    notes = [
        f"Settings (rule {settings['rule']}, fallback {settings['fallback']}) for {_GOALS[name].format(value)}, chosen "
        f"on {chosen['dataset']} ({chosen['num_samples']:,} samples): there {chosen['top1']:.2f} % at "
        f"{with_prefix(chosen['macs'])} MACs, the backbone {chosen['backbone_top1']:.2f} %.",
        f"Accuracy on {report['dataset']} ({report['num_samples']:,} samples), which nothing was chosen by; recipe "
        f"{report['recipe']}, seed {report['seed']}, in the precision of the saved weights.",
    ]
    if report["time"] is not None:
        time = report["time"]
        notes.append(
            f"Chosen by the time of batches of {time['batch_size']} on {time['device']}, not by MACs. Run in turns "
            f"there, on {time['num_images']:,} of the samples, early exit is {time['speedup']:.2f} times as fast as "
            "the plain backbone."
        )
    if chosen["tested"] is not None:
        notes.append(
            f"Certified with confidence {goal['confidence']:g}: of images drawn like those, at most {value:g} are "
            f"answered wrong that the backbone gets right. Tested on {chosen['tested']:,} of them, {chosen['lost']:,} "
            f"lost; on the images of this report {report['early_exit']['excess_error']:.4f} are."
        )
    notes += [
        f"MACs (multiply-accumulates) are the mean for one image of {size}: the backbone up to where it leaves, and "
        "the heads that were asked; speed-up is the plain backbone's over these.",
        "The oracle lets each image leave at the first exit that is right, which no rule can know.",
    ]
    if report["baseline"] is not None:
        notes.append("The baseline is the same backbone, trained on its own, as report.json has it.")
    if chosen["num_skipped"] or report["num_skipped"]:
        notes.append(
            f"Images that could not be decoded, and are not counted: {chosen['num_skipped']:,} for calibration, "
            f"{report['num_skipped']:,} for evaluation."
        )
    return notes
