"""Checkpoints that are either whole or not there: hashed, written aside, renamed; nothing in them is unpickled."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A state that cannot be saved, or a checkpoint that cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is incomplete or not what was written."""


@dataclass(frozen=True)
class EncodedState:
    """A state as a checkpoint stores it, all of it copied: what it was taken from may change."""

    tree: Any
    tensors: Mapping[str, Tensor]


def encode_state(state: Mapping[str, Any]) -> EncodedState:
    """Copy a state into the form in which it is stored.

    Args:
        state: Nested dicts, lists and tuples of dense tensors, numpy arrays and scalars, and int, float, bool, str and
            None; keys of dicts may be any of the last five. Mappings come back as dicts, parameters as plain tensors,
            all tensors on the CPU with their strides, every float and bit as it was. Tensors that share memory come
            back apart.

    Raises:
        CheckpointError: If the state holds anything else; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = _encode(state, "state", tensors)
    except RecursionError as error:
        raise CheckpointError("The state is nested too deeply, or contains itself.") from error
    return EncodedState(tree, tensors)


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
        shutil.rmtree(leftover)
    _remove_later(folder, step)
    final = folder / f"{_NAME}{step}"
    temporary, replaced = folder / f".{final.name}", folder / f"{final.name}{_REPLACED}"
    try:
        _write(temporary, encoded)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    _flush(folder)
    checkpoints = _checkpoints(folder)
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
        state = _decode(json.loads((path / _STATE).read_bytes()), tensors)
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


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step, or None if there is none; damaged ones are skipped and logged.

    Args:
        folder: Where `save_checkpoint` put them; need not exist.

    Raises:
        CheckpointError: If another version of this library wrote the latest one, or the storage fails.
    """
    for path in reversed(_checkpoints(folder)):
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


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, whole or not, the latest last."""
    found = []
    for path in folder.glob(f"{_NAME}*"):
        match = re.fullmatch(rf"{_NAME}(\d+)({re.escape(_REPLACED)})?", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), not match[2], path))
    return [path for _, _, path in sorted(found)]


def _remove_later(folder: Path, step: int) -> None:
    """Remove damaged checkpoints of later steps, which a run that fell back to an earlier one has left behind."""
    for path in _checkpoints(folder):
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
    if path.exists():
        hidden = path.rename(path.with_name(f".{path.name}.removed"))
        # What cannot be removed now, the next save tries again: no reason to stop a training.
        shutil.rmtree(hidden, ignore_errors=True)


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


_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32}
    | {torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
)
_SCALARS = (str, int, float, bool, type(None))


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a state into JSON, in which every object has one key that says what it stands for.

    Args:
        value: The state or a part of it.
        where: Its place in the state, for messages.
        tensors: Receives copies of all tensors and arrays.
    """
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {"float": repr(value)}
    if kind in _SCALARS:
        return value
    if kind is list:
        return [_encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if type(key) not in _SCALARS:
                raise CheckpointError(
                    f"{where} has a key of type {_type_name(key)}; allowed are str, int, float, bool and None."
                )
            pairs.append([_encode(key, where, tensors), _encode(item, f"{where}[{key!r}]", tensors)])
        return {"dict": pairs}
    if kind in (Tensor, torch.nn.Parameter):
        return {"tensor": _store_tensor(value.detach(), where, tensors)}
    if kind is np.ndarray or isinstance(value, np.generic):
        return {"array" if kind is np.ndarray else "scalar": _store_array(np.asarray(value), where, tensors)}
    raise CheckpointError(
        f"{where} is of type {_type_name(value)}, which a checkpoint cannot hold; allowed are dict, list, tuple, "
        "Tensor, numpy arrays and scalars, str, int, float, bool and None."
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    match kind:
        case "dict":
            return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "float":
            return float(content)
        case "tensor":
            key, stride = content
            if stride is None:
                return tensors[key]
            return torch.empty_strided(tensors[key].shape, stride, dtype=tensors[key].dtype).copy_(tensors[key])
        case "array":
            return tensors[content].numpy()
        case "scalar":
            return tensors[content].numpy()[()]
    raise ValueError(f"unknown kind {kind!r}")


def _store_tensor(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> list[Any]:
    """Store a contiguous copy, and return its key and its strides (None if they are the contiguous ones)."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{where} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which a checkpoint cannot "
            f"hold; allowed are dense tensors with data, of {', '.join(sorted(map(str, _DTYPES)))}."
        )
    key = str(len(tensors))
    tensors[key] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    # A momentum buffer whose strides differ from its channels_last parameter's would take the optimizer's slow path.
    stride = torch.empty_like(tensor, device="meta").stride()
    return [key, None if stride == torch.empty(tensor.shape, device="meta").stride() else list(stride)]


def _store_array(array: npt.NDArray[Any], where: str, tensors: dict[str, Tensor]) -> str:
    try:
        tensor = torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is a numpy array that a checkpoint cannot hold: {error}") from error
    return str(_store_tensor(tensor, where, tensors)[0])


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
