"""Checkpoints that are either whole or not there: hashed, written aside, renamed; nothing in them is unpickled."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_selfdistill.checkpoint.codec import EncodedState, decode_state, encode_state
from timm_selfdistill.checkpoint.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, state: Mapping[str, Any] | EncodedState, step: int, keep: int = 2) -> Path:
    """Save a state as `folder/checkpoint-<step>`, so that a kill at any moment leaves a whole checkpoint behind.

    It is written beside under a hidden name, flushed to the disk, read back and compared, and only then renamed; older
    checkpoints go last. One process at a time may save into a folder.

    Args:
        folder: Where the checkpoints of one run are; created if missing.
        state: What to save: what `encode_state` takes, or what it returned.
        step: The number in the name, growing as training goes on. A checkpoint of the same step is replaced.
        keep: How many of the newest checkpoints to keep, this one included.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: If the state holds what cannot be stored, if `step` < 0 or `keep` < 1, or if the folder has
            whole checkpoints of later steps, which must be another run's.
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
        _write(temporary, encoded)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.is_symlink():
        final.unlink()
    elif final.exists():
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    _flush(folder)
    checkpoints = list_checkpoints(folder)
    current = [path for path in checkpoints if not path.name.endswith(_REPLACED)]
    for path in set(checkpoints) - set(current[-keep:]):
        _remove(path)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state saved in a checkpoint, after comparing every file with its hash.

    Args:
        path: The checkpoint's folder.

    Raises:
        DamagedCheckpointError: If a file is missing or not what was written.
        CheckpointError: If there is no such folder, another version of this library wrote it, or the storage does not
            let it be read.
    """
    _verify(path)
    try:
        tensors = load_file(path / _TENSORS, backend="pread")
        state = decode_state(json.loads((path / _STATE).read_bytes()), tensors)
    except (
        SafetensorError,
        ArithmeticError,
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} cannot be read: {error!r}.") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"Checkpoint {path} holds a {type(state).__name__} instead of a state.")
    return state


def read_entry(path: Path, key: str) -> Any:
    """Return one entry of a checkpoint's state, which must hold no tensors, without reading or comparing the rest.

    Args:
        path: The checkpoint's folder.
        key: Name of the entry.

    Returns:
        The entry; None if there is none, as in a checkpoint of an earlier release.

    Raises:
        DamagedCheckpointError: If there is no such folder, or it cannot be read.
    """
    try:
        pairs = json.loads((path / _STATE).read_bytes())["dict"]
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
    """Whether a folder was written by `save_checkpoint`, and not by another program under such a name."""
    try:
        found = json.loads((path / _MANIFEST).read_bytes())
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step, or None if there is none; damaged ones are skipped and logged.

    Args:
        folder: Where `save_checkpoint` put them; need not exist.

    Raises:
        CheckpointError: If another version of this library wrote the latest one, or the storage fails.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            _verify(path)
        except DamagedCheckpointError as error:
            logger.warning("%s Falling back to the checkpoint before it, if any.", error)
        else:
            return path
    return None


_NAME = "checkpoint-"
_REPLACED = ".replaced"  # the checkpoint of the same step, while a new one takes its name
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FORMAT, _VERSION = "timm-selfdistill-checkpoint", 1


def _remove_later(folder: Path, step: int) -> None:
    """Remove damaged checkpoints of later steps, which a run that fell back to an earlier one has left behind."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix(_NAME).removesuffix(_REPLACED)) <= step:
            continue
        try:
            _verify(path)
        except DamagedCheckpointError as error:
            logger.warning("%s It is later than step %d, which is saved now, and is removed.", error, step)
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
    """Delete a checkpoint; of a link to one elsewhere, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _write(folder: Path, encoded: EncodedState) -> None:
    folder.mkdir()
    tensors = dict(encoded.tensors)
    text = json.dumps(encoded.tree, allow_nan=False, separators=(",", ":")).encode()
    (folder / _STATE).write_bytes(text)
    try:
        save_file(tensors, folder / _TENSORS)
        shutil.copymode(folder / _STATE, folder / _TENSORS)  # safetensors lets nobody but the owner read
        (folder / _MANIFEST).write_text(json.dumps(_manifest(folder), indent=2), encoding="utf-8")
        for name in (_TENSORS, _STATE, _MANIFEST, "."):
            _flush(folder / name)
        written = load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise OSError(f"Cannot write {folder / _TENSORS}: {error}") from error
    same = all(torch.equal(_bytes(written[key]), _bytes(tensor)) for key, tensor in tensors.items())
    if not same or (folder / _STATE).read_bytes() != text:
        raise OSError(f"{folder} does not read back as it was written: is the disk faulty?")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder with these files must say."""
    files = {}
    for name in (_TENSORS, _STATE):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"size": (folder / name).stat().st_size, "sha256": digest}
    return {"format": _FORMAT, "version": _VERSION, "files": files}


def _verify(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        found = json.loads((path / _MANIFEST).read_bytes())
        expected = _manifest(path)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"Checkpoint {path} is incomplete: {Path(error.filename).name} is missing."
        ) from error
    except IsADirectoryError as error:
        raise DamagedCheckpointError(
            f"Checkpoint {path} is damaged: {Path(error.filename).name} is a folder."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error}.") from error
    except (RecursionError, ValueError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: its {_MANIFEST} is not JSON ({error}).") from error
    if isinstance(found, dict) and found.get("format") == _FORMAT and isinstance(found.get("version"), int):
        if found["version"] != _VERSION:
            raise CheckpointError(
                f"Checkpoint {path} has format version {found['version']}; this release of timm_selfdistill reads "
                f"version {_VERSION}. Resume with the release that wrote it, or remove the checkpoint."
            )
        if found == expected:
            return
    raise DamagedCheckpointError(
        f"Checkpoint {path} is damaged: its files and its {_MANIFEST} do not match (size or sha256)."
    )
