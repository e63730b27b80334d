"""The report of a calibration as tables, as markdown, as a picture (accuracy over compute) and as files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from timm_selfdistill.calibration.calibration_report import CalibrationReport
from timm_selfdistill.early_exit import get_rule
from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.metrics import top1_interval, wilson_interval
from timm_selfdistill.report import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Percentage points between the ends of an interval, and images, that are too many or too few to choose by.
_WIDE: Final = 4.0
_FEW: Final = 200
_GOALS: Final = {
    "max_accuracy_drop": "an accuracy at most {:g} points below the backbone's",
    "speedup": "a cost {:g} times less than the backbone's",
    "macs_budget": "at most {:g} MACs",
    "risk": "a risk of at most {:g}",
}


def draw_calibration(report: CalibrationReport) -> "Figure":
    """Draw the accuracy-compute curve of early exit, with fixed exits, ensemble, baseline and oracle."""
    report = each_text(report, plot_text)
    conditions = f"{report['dataset']} ({report['num_samples']:,} samples) · recipe {report['recipe']}"
    figure, axes = render.new_picture(conditions)
    label = "early exit: other thresholds"
    render.plot_points(axes, report["curve"], "-o", label, render.GREEN, 4, linewidth=1.6, alpha=0.75)
    render.plot_exits(figure, axes, report["exits"], "o", "one exit for all images")
    label = "exits 0 to k together"
    render.plot_points(axes, report["running"], "--s", label, render.ORANGE, 5, linewidth=1.2, alpha=0.75)
    render.plot_points(axes, [report["ensemble"]], "*", "ensemble of all exits", render.ORANGE, 16, zorder=3)
    points = [*report["curve"], *report["exits"], report["ensemble"], report["oracle"], report["early_exit"]]
    if report["baseline"] is not None:
        hollow = {"markerfacecolor": "none", "markeredgecolor": render.GREY, "markeredgewidth": 1.6, "zorder": 2}
        label = "baseline: the backbone trained on its own"
        render.plot_points(axes, [report["baseline"]], "D", label, render.GREY, 16, **hollow)
    render.plot_points(axes, [report["oracle"]], "^", "oracle: leaves at the first right exit", render.INK, 9, zorder=3)
    render.plot_points(axes, [report["early_exit"]], "P", "early exit: chosen thresholds", render.GREEN, 13, zorder=4)
    size = " x ".join(str(side) for side in report["input_size"])
    macs = [point["macs"] for point in points]
    render.style_cost(axes, macs, report["exits"][-1]["macs"], f"mean multiply-accumulates per image of {size}")
    render.style_accuracy(axes)
    render.style_axes(axes)
    render.finish_picture(figure, axes, f"{report['backbone']}, self-distilled: early exit")
    return figure


def _tables(report: CalibrationReport) -> list[render.Table]:
    return [_results(report), _settings(report)]


def _results(report: CalibrationReport) -> render.Table:
    """Return the header and a row for each way to answer."""
    backbone = report["exits"][-1]
    points: list[tuple[str, Mapping[str, Any]]] = [("early exit", report["early_exit"])]
    for row in report["exits"]:
        points.append((f"{row['index']}: {row['name']}{' (backbone)' if row is backbone else ''}", row))
    points += ((f"exits 0 to {last}", point) for last, point in enumerate(report["running"][1:-1], 1))
    points.append(("ensemble", report["ensemble"]))
    if report["baseline"] is not None:
        points.append(("baseline", report["baseline"]))
    points.append(("oracle", report["oracle"]))
    rows = [[label, *_cells(point, backbone, report["num_samples"])] for label, point in points]
    return [["", "top-1 %", "95 % CI", "vs. backbone", "MACs", "speed-up"], *rows]


def _cells(point: Mapping[str, Any], backbone: Mapping[str, Any], num_samples: int) -> list[str]:
    bounds = point.get("gain_interval")
    between = "" if bounds is None or point is backbone else f" ({bounds[0]:+.2f} to {bounds[1]:+.2f})"
    return [
        f"{point['top1']:.2f}",
        render.interval(top1_interval(point["top1"], num_samples)),
        f"{point['top1'] - backbone['top1']:+.2f}{between}",
        render.with_prefix(point["macs"]),
        f"{point['speedup']:.2f}x",
    ]


def _settings(report: CalibrationReport) -> render.Table:
    """Return the header and a row for each exit: its settings, and the images that leave there."""
    settings, exits = report["settings"], report["exits"]
    temperatures = settings["temperatures"] or [1.0] * len(settings["thresholds"])
    rows = [["exit", "temperature", "threshold", "leave here", "oracle"]]
    for row, share, ideal in zip(exits, report["early_exit"]["shares"], report["oracle"]["shares"], strict=True):
        cells = ["", ""]
        if row is not exits[-1]:
            threshold = _threshold(settings["thresholds"][row["index"]], settings["rule"])
            cells = [f"{temperatures[row['index']]:.3f}", threshold]
        rows.append([f"{row['index']}: {row['name']}", *cells, f"{share:.1%}", f"{ideal:.1%}"])
    return rows


def _threshold(value: float | None, rule: str) -> str:
    """Return a threshold, in words where it lets no image leave, or every one."""
    if value is None:
        return "never"
    return "always" if value <= get_rule(rule).always else f"{value:.4f}"


def _sentences(report: CalibrationReport) -> list[str]:
    chosen, settings, goal = report["calibration"], report["settings"], report["goal"]
    name, value = next(iter(goal.items()))
    size = " x ".join(str(side) for side in report["input_size"])
    running = ", each exit with those before it" if settings["running_ensemble"] else ""
    found = [
        f"Settings (rule {settings['rule']}, fallback {settings['fallback']}{running}) for "
        f"{_GOALS[name].format(value)}, chosen on {chosen['dataset']} ({chosen['num_samples']:,} samples): there "
        f"{chosen['top1']:.2f} % at {render.with_prefix(chosen['macs'])} MACs, the backbone "
        f"{chosen['backbone_top1']:.2f} %.",
        f"Accuracy on {report['dataset']} ({report['num_samples']:,} samples), which nothing was chosen by; recipe "
        f"{report['recipe']}, seed {report['seed']}, in the precision of the saved weights.",
    ]
    if report["time"] is not None:
        time = report["time"]
        found.append(
            f"Chosen by the time of batches of {time['batch_size']} on {time['device']}, not by MACs. Run in turns "
            f"there, on {time['num_images']:,} of the samples, early exit is {time['speedup']:.2f} times as fast as "
            "the plain backbone."
        )
    if chosen["tested"] is not None:
        found.append(
            f"Certified with confidence {goal['confidence']:g}: of images drawn like those, at most {value:g} are "
            f"answered wrong that the backbone gets right. Tested on {chosen['tested']:,} of them, {chosen['lost']:,} "
            f"lost; on the images of this report {report['early_exit']['excess_error']:.4f} are."
        )
    found += [
        "95 % CI: Wilson's confidence interval of top-1; differences are with their 95 % intervals, of answers to the "
        "same images.",
        *_warnings(report),
        f"MACs (multiply-accumulates) are the mean for one image of {size}: the backbone up to where it leaves, and "
        "the heads that ran; speed-up is the plain backbone's over these.",
        "The oracle lets each image leave at the first exit that is right, which no rule can know.",
    ]
    if report["baseline"] is not None:
        found.append("The baseline is the same backbone, trained on its own, as report.json has it.")
    if chosen["num_skipped"] or report["num_skipped"]:
        found.append(
            f"Images that could not be decoded, and are not counted: {chosen['num_skipped']:,} for calibration, "
            f"{report['num_skipped']:,} for evaluation."
        )
    return found


def _warnings(report: CalibrationReport) -> list[str]:
    """Say where the choice rests on few images, or one exit for all images is as good."""
    chosen, exits, found = report["calibration"], report["exits"], []
    low, high = wilson_interval(round(chosen["top1"] * chosen["num_samples"] / 100), chosen["num_samples"])
    if high - low > _WIDE or chosen["num_samples"] < _FEW:
        found.append(
            f"Warning: the goal was met on {chosen['num_samples']:,} images only, where an accuracy is known to "
            f"about {(high - low) / 2:.1f} points: calibrate on more (--split, --data) before you rely on it."
        )
    if (index := chosen.get("as_good")) is not None:
        found.append(
            f"Warning: exit {index} ({exits[index]['name']}) for all images is as accurate on the images that the "
            f"settings were chosen by, and costs no more: `export --exit {index}` is simpler."
        )
    return found


_PAGE = render.Page(
    "calibration", "Early exit", "Accuracy of early exit over its compute", _tables, _sentences, draw_calibration
)
format_calibration, write_calibration = _PAGE.terminal, _PAGE.write
