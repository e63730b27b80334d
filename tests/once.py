"""Do slow work once for all tests that only read what it leaves, in whichever worker of pytest-xdist they run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, work: Callable[[Path], object]) -> Path:
    """Return the folder of this name, which the first caller gives to `work`, and others wait for."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            temporary = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(temporary, ignore_errors=True)  # what a failed attempt left
            work(temporary)
            temporary.rename(folder)
    return folder
