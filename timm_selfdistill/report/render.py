"""Show results in one look: tables, sentences and a picture, for the terminal, as markdown and as files."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import numpy as np

from timm_selfdistill.escape import each_text, markdown_text, printable
from timm_selfdistill.output import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

MISSING: Final = "n/a"
BLUE: Final = "#1f5fa8"
ORANGE: Final = "#d1662a"
GREEN: Final = "#2b8a57"
GREY: Final = "#5f6670"
INK: Final = "#22262b"
_GRID: Final = "#e4e7eb"
FRAME: Final = "#c5cad1"

# From this ratio of the highest to the lowest cost on, a linear axis would crowd the cheap exits.
_WIDE_SPAN: Final = 8
# Space above and below accuracies: in percentage points at least so much that noise does not look like a trend.
_LEAST_PADDING: Final = 1.0
_PADDING: Final = 0.15
# Characters of text that leave room for the plot: of an exit's name in the legend, and above the plot.
_LONGEST_NAME: Final = 24
_LONGEST_SUBTITLE: Final = 110

Table = Sequence[Sequence[str]]
Content = TypeVar("Content", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Page(Generic[Content]):
    """How results of one kind are shown: the name of their files, heading and caption, and what makes the parts."""

    name: str
    heading: str  # before the backbone's name
    caption: str
    tables: Callable[[Content], Sequence[Table]]
    sentences: Callable[[Content], Sequence[str]]
    draw: Callable[[Content], "Figure"]

    def terminal(self, content: Content) -> str:
        """Return the tables and sentences as lines for a terminal, without a line break at the end."""
        content = each_text(content, printable)
        tables = [line for table in self.tables(content) for line in [*align(table), ""]]
        return "\n".join([*tables, *self.sentences(content)])

    def markdown(self, content: Content) -> str:
        """Return a markdown section without the picture, ending with a line break."""
        content = each_text(content, markdown_text)
        tables = [line for table in self.tables(content) for line in [*markdown(table), ""]]
        return "\n".join([f"## {self.heading}: {content['backbone']}", "", *tables, *self.sentences(content), ""])

    def write(self, content: Content, folder: Path) -> None:
        """Write `NAME.json`, `NAME.md` and `NAME.png`; each is complete or as it was before."""
        folder.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        # All made before any is written: what cannot be drawn leaves the three files as they were.
        self.draw(content).savefig(picture, format="png")
        values = json.dumps(content, indent=2, allow_nan=False) + "\n"
        text = f"{self.markdown(content)}\n![{self.caption}]({self.name}.png)\n"
        for ending, data in (("json", values.encode()), ("md", text.encode()), ("png", picture.getvalue())):
            replace_file(folder / f"{self.name}.{ending}", data)


def align(table: Table, text_columns: int = 1) -> list[str]:
    """Return a table's lines for a terminal: the first columns hold words, aligned left, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def markdown(table: Table) -> list[str]:
    """Return a table's lines in markdown, its first column aligned left and the others right."""
    header, *body = table
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in [header, alignment, *body]]


def number(value: float | None, spec: str) -> str:
    """Return a number as text, "n/a" for None."""
    return MISSING if value is None else format(value, spec)


def interval(bounds: tuple[float, float] | None) -> str:
    """Return a confidence interval in percent as text, "n/a" for None."""
    return MISSING if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def spread(mean: float | None, std: float | None, spec: str) -> str:
    """Return a mean and its standard deviation as text; the mean alone where there is none."""
    return number(mean, spec) if mean is None or std is None else f"{mean:{spec}} ± {std:{spec}}"


def with_prefix(value: float) -> str:
    """Return a number with three significant digits and a prefix, such as "38.1 M"; plain below 1,000."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # What three digits round up to the next prefix belongs there: 999,950 is "1.00 M", not "1e+03 k".
        if value >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def new_picture(subtitle: str) -> tuple["Figure", "Axes"]:
    """Return a figure, which belongs to no window and to no global state of matplotlib, and its one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    axes = figure.add_subplot()
    axes.set_title(_short(subtitle, _LONGEST_SUBTITLE), loc="left", fontsize=9.5, color=GREY, pad=10)
    return figure, axes


def style_axes(axes: "Axes", grid: Literal["both", "x", "y"] = "both") -> None:
    """Give a plot the frame and the grid that all of them have."""
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def style_accuracy(axes: "Axes") -> None:
    """Set limits and label of the accuracies in percent on the y axis, once all is plotted."""
    low, high = axes.dataLim.intervaly
    if not np.isfinite([low, high]).all():
        low, high = 0.0, 100.0
    padding = max(_LEAST_PADDING, _PADDING * (high - low))
    axes.set_ylim(low - padding, high + padding)
    axes.set_ylabel("top-1 accuracy (%)", color=INK)


def style_cost(axes: "Axes", macs: Sequence[float], full: float, label: str) -> None:
    """Scale and label the x axis for multiply-accumulates, of which the backbone has `full`."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.margins(x=0.12)
    is_wide = max(macs) >= _WIDE_SPAN * min(macs)
    if is_wide:
        axes.set_xscale("log")
    # Made after the scale is set: a change of scale would replace its ticks.
    relative = axes.secondary_xaxis("top", functions=(partial(np.multiply, 1 / full), partial(np.multiply, full)))
    formatters = ((axes.xaxis, EngFormatter(sep=" ")), (relative.xaxis, FuncFormatter(lambda x, _: f"{x:.3g}x")))
    for axis, formatter in formatters:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(6))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{label} (MACs{', log scale' if is_wide else ''})", color=INK)
    relative.set_xlabel("cost relative to the backbone", color=GREY, fontsize=9)
    relative.tick_params(colors=GREY, labelsize=8.5, which="both")
    relative.spines["top"].set_color(FRAME)


def plot_points(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], style: str, label: str, color: str, size: float, **options: Any
) -> None:
    """Plot `top1` over `macs` of all rows that have an accuracy, with further options of `Axes.plot`."""
    macs, scores = [row["macs"] for row in rows], floats([row["top1"] for row in rows])
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.2}
    axes.plot(macs, scores, style, label=label, color=color, markersize=size, **(edge | options))


def plot_exits(figure: "Figure", axes: "Axes", rows: Sequence[Mapping[str, Any]], style: str, label: str) -> None:
    """Plot the exits with their indices in the markers, and list their names and accuracies at the right."""
    from matplotlib.lines import Line2D

    plot_points(axes, rows, style, label, BLUE, 13, zorder=3)
    known = [row for row in rows if row["top1"] is not None]
    for row in known:
        place = (row["macs"], row["top1"])
        axes.annotate(str(row["index"]), place, color="white", fontsize=8, ha="center", va="center_baseline", zorder=5)
    names = ["backbone" if row is rows[-1] else _short(row["name"], _LONGEST_NAME) for row in known]
    labels = [f"{row['index']}: {name}\n{row['top1']:.2f} %" for row, name in zip(known, names, strict=True)]
    options: dict[str, Any] = {"handlelength": 0, "handletextpad": 0, "labelcolor": BLUE, "fontsize": 9}
    figure.legend([Line2D([], [])] * len(labels), labels, loc="outside right center", frameon=False, **options)


def finish_picture(figure: "Figure", axes: "Axes", title: str, columns: int = 3) -> None:
    """Add title and legend, and set what depends on the layout."""
    heading = figure.suptitle(title, fontsize=14, ha="left")
    handles, labels = axes.get_legend_handles_labels()
    options: dict[str, Any] = {"fontsize": 9, "markerscale": 0.8, "columnspacing": 1.4, "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)
    figure.draw_without_rendering()
    heading.set_x(axes.get_position().x0)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if max(0, low) <= tick <= min(100, high)])


def _short(text: str, longest: int) -> str:
    """Return a text without its middle where it is too long."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def floats(values: Sequence[float | None]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return numbers as matplotlib takes them: it leaves out NaN, which stands for None."""
    return np.array(values, dtype=np.float64)
