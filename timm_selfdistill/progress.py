"""How far a command is: bars on a terminal only, and lines that stay."""

import os
import sys
from collections.abc import Iterable
from typing import Any, Final

from tqdm.auto import tqdm

from timm_selfdistill.escape import printable

_WIDTH: Final = 80


def progress_bar(items: Iterable[Any] | None = None, *, title: str | None, show: bool = True, **options: Any) -> Any:
    """Return a bar of tqdm around items, of at most 80 columns, which is removed at its end.

    Args:
        items: What is iterated over; without it, the caller counts.
        title: What stands before the bar.
        show: Whether to show it; it is hidden where the error output is not a terminal, or TQDM_DISABLE is set.
        **options: Further arguments of `tqdm`.
    """
    is_off = not show or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")
    # None hides the bar where the error output is not a terminal.
    return tqdm(items, desc=title, leave=False, ncols=_WIDTH, disable=True if is_off else None, **options)


def tell(line: str) -> None:
    """Write a line to the error output that stays, above a bar if there is one."""
    tqdm.write(printable(line), file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a time as people say it: "8 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
