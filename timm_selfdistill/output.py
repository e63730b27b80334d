"""What a command puts out: bars and lines on the terminal, and files that are complete, in a folder of its own."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from timm_selfdistill.escape import printable

_logger = logging.getLogger(__name__)
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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is complete, or as it was before; a link is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    # What a killed process left, or a link, which is not followed either.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)


def is_lock(path: Path) -> bool:
    """Whether a file is one that `locked` wrote, and not another program's of the same name."""
    return path.is_file() and re.fullmatch(r"(process \d+ on .*)?", path.read_text(errors="replace")) is not None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep runs of other processes out of a folder, made if missing, while the body runs or until this process ends."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"output_dir: nothing can be written to {folder} ({error}): choose another one.") from error

    def write_owner(descriptor: int) -> None:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    # Forked loader processes, which may outlive a killed training, do not inherit it.
    lock = FileLock(path, blocking=False, on_acquired=write_owner)
    try:
        lock.acquire()
    except Timeout as error:
        owner = ""
        with suppress(OSError):  # on Windows, a locked file cannot be read
            owner = path.read_text()
        raise ValueError(
            f"output_dir: another run is under way in {folder} ({owner or 'unknown'}): wait for it, or choose another "
            "one."
        ) from error
    except OSError as error:
        _logger.warning("%s cannot be locked (%s): nothing prevents a second run into it.", folder, error)
    try:
        yield
    finally:
        lock.release()
