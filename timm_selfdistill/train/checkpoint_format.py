"""The files of one checkpoint: JSON that says what each value stands for, named tensors, and a manifest of hashes."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT, VERSION = "timm-selfdistill-checkpoint", 1

_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32}
    | {torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
)
_SCALARS = (str, int, float, bool, type(None))


class CheckpointError(ValueError):
    """A state that cannot be saved, or a checkpoint that cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is incomplete or not what was written."""


class EncodedState(NamedTuple):
    """A copy of a state in the form in which a checkpoint stores it."""

    tree: Any
    tensors: Mapping[str, Tensor]


def encode_state(state: Mapping[str, Any]) -> EncodedState:
    """Copy a state into the form in which it is stored; `CheckpointError` says where it holds what cannot be stored.

    It may hold nested dicts, lists and tuples of dense tensors, numpy arrays and scalars, and int, float, bool, str and
    None; keys of dicts may be any of the last five. Mappings come back as dicts, parameters as plain tensors, all
    tensors on the CPU with their strides, every float and bit unchanged. Tensors that share memory come back apart.
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = _encode(state, "state", tensors)
    except RecursionError as error:
        raise CheckpointError("The state is nested too deeply, or contains itself.") from error
    return EncodedState(tree, tensors)


def decode_state(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what a node of the JSON stands for; raises any kind of exception if `encode_state` did not make it."""
    if isinstance(node, list):
        return [decode_state(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    match kind:
        case "dict":
            return {decode_state(key, tensors): decode_state(item, tensors) for key, item in content}
        case "tuple":
            return tuple(decode_state(item, tensors) for item in content)
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


def write_files(folder: Path, encoded: EncodedState) -> None:
    """Write the files of a checkpoint to a new folder, flush them to the disk and compare what can be read back."""
    folder.mkdir()
    tensors = dict(encoded.tensors)
    text = json.dumps(encoded.tree, allow_nan=False, separators=(",", ":")).encode()
    (folder / STATE).write_bytes(text)
    try:
        save_file(tensors, folder / TENSORS)
        shutil.copymode(folder / STATE, folder / TENSORS)  # safetensors lets only the owner read
        (folder / MANIFEST).write_text(json.dumps(build_manifest(folder), indent=2), encoding="utf-8")
        for name in (TENSORS, STATE, MANIFEST, "."):
            flush_to_disk(folder / name)
        written = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise OSError(f"Cannot write {folder / TENSORS}: {error}") from error
    same = all(torch.equal(_bytes(written[key]), _bytes(tensor)) for key, tensor in tensors.items())
    if not same or (folder / STATE).read_bytes() != text:
        raise OSError(f"{folder} does not read back as it was written: is the disk faulty?")


def verify_files(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest: `DamagedCheckpointError` means not what was written."""
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        found = json.loads((path / MANIFEST).read_bytes())
        expected = build_manifest(path)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DamagedCheckpointError(f"Checkpoint {path} is incomplete: {missing} is missing.") from error
    except IsADirectoryError as error:
        name = Path(error.filename).name
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: {name} is a folder.") from error
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error}.") from error
    except (RecursionError, ValueError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: its {MANIFEST} is not JSON ({error}).") from error
    if isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("version"), int):
        if found["version"] != VERSION:
            raise CheckpointError(
                f"Checkpoint {path} has format version {found['version']}; this release of timm_selfdistill reads "
                f"version {VERSION}. Resume with the release that wrote it, or remove the checkpoint."
            )
        if found == expected:
            return
    raise DamagedCheckpointError(
        f"Checkpoint {path} is damaged: its files and its {MANIFEST} do not match (size or sha256)."
    )


def build_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of the files in a folder must say."""
    files = {}
    for name in (TENSORS, STATE):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"size": (folder / name).stat().st_size, "sha256": digest}
    return {"format": FORMAT, "version": VERSION, "files": files}


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a part of a state into JSON, each object with one key, its kind; tensors are copied apart."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {"float": repr(value)}
    if kind in _SCALARS:
        return value
    if kind in (list, tuple):
        items = [_encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
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


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
