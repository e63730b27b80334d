"""One run at a time in a folder."""

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_logger = logging.getLogger(__name__)


def is_lock(path: Path) -> bool:
    """Whether a file is one that `locked` wrote, and not somebody else's of the same name."""
    return path.is_file() and re.fullmatch(r"(process \d+ on .*)?", path.read_text(errors="replace")) is not None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep runs of other processes out of a folder while the body runs, or until this process ends, however it does.

    Args:
        folder: The run's folder; made if it does not exist.

    Raises:
        ValueError: If another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ValueError(f"output_dir: nothing can be written to {folder} ({error}): choose another one.") from error
    with file:
        try:
            # Unlike flock's, this lock is not inherited by loader processes, which may outlive a killed training.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"output_dir: another run is under way in {folder} ({file.read() or 'unknown'}): wait for it, or "
                    "choose another one."
                ) from error
            _logger.warning("%s cannot be locked (%s): nothing prevents a second run into it.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
