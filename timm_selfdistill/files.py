"""Write files so that nobody reads half of one, and keep other processes out of a folder."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_logger = logging.getLogger(__name__)


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
