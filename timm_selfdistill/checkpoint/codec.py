"""The form in which a state is stored: JSON that says what each value stands for, and named tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from timm_selfdistill.checkpoint.errors import CheckpointError


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


def decode_state(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what a node of the JSON stands for.

    Raises:
        Exception: Of whatever kind, if it is not what `encode_state` made.
    """
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
