"""Tables and numbers as a terminal shows them."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Return a table's lines, the header underlined.

    Args:
        rows: The header and the rows, as text.
        text_columns: How many columns, from the left, hold words and are aligned left; the others hold numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines in markdown, its first column aligned left and the others right.

    Args:
        rows: The header and the rows, as text.
    """
    header, *body = rows
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in [header, alignment, *body]]


def with_prefix(value: float) -> str:
    """Return a number with three significant digits and a prefix, such as "38.1 M"; plain below 1,000."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # What three digits round up to the next prefix belongs there: 999,950 is "1.00 M", not "1e+03 k".
        if value >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"
