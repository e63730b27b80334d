"""Checkpoints that are either whole or not there: hashed, written aside, renamed; nothing in them is unpickled."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_selfdistill.train.checkpoint_format import (
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    CheckpointError,
    DamagedCheckpointError,
    EncodedState,
    decode_state,
    encode_state,
    flush_to_disk,
    verify_files,
    write_files,
)

_logger = logging.getLogger(__name__)

_NAME = "checkpoint-"
_REPLACED = ".replaced"  # the checkpoint of the same step, while a new one takes its name


def save_checkpoint(folder: Path, state: Mapping[str, Any] | EncodedState, step: int, keep: int = 2) -> Path:
    """Save a state as `folder/checkpoint-<step>`, so that a kill at any moment leaves a whole checkpoint.

    It is written under a hidden name, flushed to the disk, read back and compared, and only then renamed; older
    checkpoints are removed last. One process at a time may save into a folder.

    Args:
        folder: Where the checkpoints of one run are; created if missing.
        state: What `encode_state` takes, or what it returned.
        step: The number in the name, growing as training goes on. A checkpoint of the same step is replaced.
        keep: How many of the newest checkpoints to keep, this one included.

    Raises:
        CheckpointError: If the state holds what cannot be stored, an argument is too small, or the folder has whole
            checkpoints of later steps, which must be another run's.
        OSError: If the files cannot be written; what was there before is untouched.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"step must be 0 or more and keep 1 or more; got step={step}, keep={keep}.")
    encoded = state if isinstance(state, EncodedState) else encode_state(state)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{_NAME}*"):
        _delete(leftover)
    _remove_later(folder, step)
    final = folder / f"{_NAME}{step}"
    temporary, replaced = folder / f".{final.name}", folder / f"{final.name}{_REPLACED}"
    try:
        write_files(temporary, encoded)
    except BaseException:  # a signal too
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.is_symlink():
        final.unlink()
    elif final.exists():
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    flush_to_disk(folder)
    checkpoints = list_checkpoints(folder)
    current = [path for path in checkpoints if not path.name.endswith(_REPLACED)]
    for path in set(checkpoints) - set(current[-keep:]):
        _remove(path)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state saved in a checkpoint's folder, after comparing every file with its hash.

    Raises:
        CheckpointError: If there is no such folder, another version of this library wrote it, or it cannot be read; a
            `DamagedCheckpointError` if a file is missing or not what was written.
    """
    verify_files(path)
    try:
        tensors = load_file(path / TENSORS, backend="pread")
        state = decode_state(json.loads((path / STATE).read_bytes()), tensors)
    except (SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} cannot be read: {error!r}.") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"Checkpoint {path} holds a {type(state).__name__} instead of a state.")
    return state


def read_entry(path: Path, key: str) -> Any:
    """Return one entry, without tensors, of a checkpoint's state, or None; nothing else is compared with its hash."""
    try:
        pairs = json.loads((path / STATE).read_bytes())["dict"]
        return next((decode_state(node, {}) for name, node in pairs if name == key), None)
    except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} cannot be read: {error!r}.") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in a folder, whole or not, the latest last; nothing if there is no such folder."""
    found = []
    for path in folder.glob(f"{_NAME}*"):
        match = re.fullmatch(rf"{_NAME}(\d+)({re.escape(_REPLACED)})?", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), not match[2], path))
    return [path for _, _, path in sorted(found)]


def is_checkpoint(path: Path) -> bool:
    """Whether `save_checkpoint` wrote a folder, and no other program did."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step, or None; damaged ones are skipped and logged."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_files(path)
        except DamagedCheckpointError as error:
            _logger.warning("%s Falling back to the checkpoint before it, if any.", error)
        else:
            return path
    return None


class CheckpointWriter:
    """Writes the checkpoints of one network on a thread of its own; the caller's thread only copies the state.

    A checkpoint that cannot be written, as on a full disk, leaves those before it in place: the next one is tried.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._running: tuple[int, Future[Path]] | None = None

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        encoded = encode_state(state)
        try:
            self.finish()
        except OSError as error:
            _logger.warning("%s. Training goes on, and the next checkpoint is tried.", error)
        self._running = step, self._worker.submit(save_checkpoint, self._folder, encoded, step, self._keep)

    def finish(self) -> None:
        """Wait until the last checkpoint is written; an `OSError` says that it could not be."""
        if self._running is None:
            return
        step, future = self._running
        self._running = None
        try:
            future.result()
        except OSError as error:
            raise OSError(
                f"The checkpoint of step {step} cannot be written to {self._folder}: {error}; those before it are kept"
            ) from error

    def close(self) -> None:
        """Wait as `finish`, and end the thread."""
        try:
            self.finish()
        finally:
            self._worker.shutdown()


def _remove_later(folder: Path, step: int) -> None:
    """Remove damaged checkpoints of later steps, which a run that fell back to an earlier one has left."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix(_NAME).removesuffix(_REPLACED)) <= step:
            continue
        try:
            verify_files(path)
        except DamagedCheckpointError as error:
            _logger.warning("%s It is later than step %d, which is saved now, and is removed.", error, step)
            _remove(path)
        else:
            raise CheckpointError(
                f"Cannot save step {step}: {path} is later and whole, so it belongs to another run or to a future that "
                "this run went back from. Move it away, or save into another folder."
            )


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves no part of it under its name."""
    if path.exists() or path.is_symlink():
        hidden = path.rename(path.with_name(f".{path.name}.removed"))
        # What cannot be removed now, the next save tries again: no reason to stop a training.
        with suppress(OSError):
            _delete(hidden)


def _delete(path: Path) -> None:
    """Delete a checkpoint; of a link to one elsewhere, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)
