"""Build the model that a downloaded configuration describes, once it is known to fit the weights beside it."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_selfdistill.backbones import use_small_stem
from timm_selfdistill.heads import HEADS, PUBLISHED, each_head_kwargs
from timm_selfdistill.hub.saved_config import CONFIG, Saved, check_image
from timm_selfdistill.measure import BuildLimit, TooLargeError
from timm_selfdistill.model import SelfDistillModel, wrap
from timm_selfdistill.truncation import truncate

# timm's models have up to 1.1 parameters and 3.1 modules for each tensor that is saved; a network that was cut off at
# an exit is described as a whole, and the largest has 2,500 tensors.
_PARAMETERS: Final = (2, 3_000)
_MODULES: Final = (8, 9_000)
# Calls of functions while a model is built and run on no memory: 15 million at most for all but one of timm's models,
# 41 million for tiny_vit_21m_512, which lists the offsets of its attention in Python.
_CALLS: Final = 60_000_000
# Tensors that are computed and not saved, such as positions and masks; and the layers after an exit.
_UNSAVED_BYTES: Final = 2**30
_UNSAVED_SHARE: Final = 32
_STATISTICS: Final = {"mean": 0.5, "std": 0.5}


def build(folder: Path, saved: Saved, weights: Mapping[str, Mapping[str, Tensor]]) -> SelfDistillModel:
    """Build the model that a folder's configuration (`saved`) describes, with random weights.

    It is first built on the meta device, which takes no memory, with a limit for its parts: only a model that the
    weights fit is given memory. `weights` are those of the backbone and the exits, by the name of their file, or, with
    `saved.exit`, those of the network that ends there.
    """
    where = f"The model that {folder / CONFIG} describes cannot be built"
    tensors = sum(map(len, weights.values()))
    limit = BuildLimit(_PARAMETERS[0] * tensors + _PARAMETERS[1], _MODULES[0] * tensors + _MODULES[1], _CALLS)
    with _explained(where, tensors), on_meta_device(), limit:
        check_image("image_size", saved.image_size)
        backbone = create_from(folder)
    first = next(iter(weights))
    if saved.exit is None and backbone.state_dict().keys() != weights[first].keys():
        # Another network: refused before it is run.
        _check_shapes(folder / first, backbone, weights[first])
    with _explained(where, tensors), on_meta_device(), limit:
        ours = saved.head == PUBLISHED or HEADS.get(saved.head).__module__.startswith("timm_selfdistill.")
        # A head of another package may compute numbers while it is built, which fails on the meta device.
        blank = wrap(
            backbone,
            exits=saved.exits,
            head=saved.head if ours else "linear",
            head_kwargs=saved.head_kwargs if ours else {},
            hint_adapter=saved.hint_adapter,
            small_stem=saved.small_stem,
            image_size=(saved.image_size[0], saved.image_size[1]),
        )
        check_image("input_size", resolve_input_data_config(blank.backbone, _STATISTICS)["input_size"][1:])
        modules = [blank.backbone, blank.heads] if saved.exit is None else [truncate(blank, saved.exit)]
        parts = dict(zip(weights, modules, strict=True))
    for name, module in parts.items():
        # The weights of another package's head are compared when they are loaded.
        if ours or module is blank.backbone:
            _check_shapes(folder / name, module, weights[name])
    in_file = sum(tensor.nbytes for held in weights.values() for tensor in held.values())
    in_memory = sum(tensor.nbytes for tensor in itertools.chain(blank.parameters(), blank.buffers()))
    if in_memory > _UNSAVED_BYTES + _UNSAVED_SHARE * in_file:
        raise ValueError(f"{where}: it takes {in_memory:,} bytes, and the weights beside it only {in_file:,}.")
    with _explained(where, tensors):
        backbone = create_from(folder)
        if saved.small_stem:
            use_small_stem(backbone)
        # Exits are where the dry run on the meta device found them.
        kwargs = each_head_kwargs(saved.head_kwargs, len(saved.exits))
        config = replace(blank.wrap_config, head=saved.head, head_kwargs=kwargs)
        model = SelfDistillModel(backbone, blank.taps, config)
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(f"{where}: it would have no memory for its weights.")
    return model


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build and run in the body without memory, as with `torch.device("meta")`, but quicker."""
    with torch.device("meta"), _ShapesOnly():
        yield


class _ShapesOnly(TorchFunctionMode):
    """Replaces what torch works out on the meta device by hundreds of calls in Python, though the shape is known.

    Normalisation and activations return the shape that they get. What is done in place, as filling with random numbers
    is, still counts as a change of the tensor.
    """

    _NORMS: Final = (F.batch_norm, F.layer_norm, F.group_norm)
    _ACTIVATIONS: Final = (F.relu, F.gelu, F.silu, F.elu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid)
    _FILLS: Final = (Tensor.normal_, Tensor.uniform_)
    _KEEP_SHAPE: Final = frozenset((*_NORMS, *_ACTIVATIONS, *_FILLS))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._KEEP_SHAPE or not args[0].is_meta:
            return func(*args, **kwargs)
        in_place = func in self._FILLS or kwargs.get("inplace")
        return args[0].zero_() if in_place else torch.empty_like(args[0])


def create_from(folder: Path) -> Any:
    """Return the backbone that timm builds by a folder's configuration, with random weights."""
    return timm.create_model(f"local-dir:{folder}", pretrained=False)


def read_weights(path: Path, digest: str | None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file whose checksum is known."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is damaged or was exchanged: its sha256 is not the one in {CONFIG}.")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights that were read from a file into a module."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model that {CONFIG} describes: {error}") from error


def check_weights(module: nn.Module) -> None:
    """Raise ValueError unless all weights of a module are plain tensors of finite numbers."""
    weights = [*module.named_parameters(), *module.named_buffers()]
    # Only tensors that are made of others, such as quantised ones, have this method.
    made = [(name, type(weight).__name__) for name, weight in weights if hasattr(weight, "__tensor_flatten__")]
    if made:
        name, kind = made[0]
        raise ValueError(
            f"{len(made)} weights of the model, such as {name}, are no plain tensors but {kind}: a quantised or "
            "sharded network can neither be saved nor exported. Save or export it before, and quantise what was loaded."
        )
    damaged = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    damaged += [name for name, buffer in module.named_buffers() if buffer.isnan().any()]
    if damaged:
        listed = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        raise ValueError(
            f"{len(damaged)} tensors of the model hold NaN or infinity, so that it has no answers: {listed}."
        )


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _explained(where: str, tensors: int) -> Iterator[None]:
    """Say of which model something is wrong."""
    try:
        yield
    except Exception as error:  # timm checks few arguments, and fails wherever a wrong one leads
        raise ValueError(f"{where}: {error!r:.1000}") from error
    except TooLargeError as error:
        raise ValueError(f"{where}: it has more {error} than a network of the {tensors} tensors beside it.") from None


def _check_shapes(path: Path, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless weights have the names and shapes of a module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found == expected:
        return
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in expected]
    for name, shape in found.items():
        if shape != expected.get(name, shape):
            faults.append(f"{name} has the shape {list(shape)} instead of {list(expected[name])}")
    shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    raise ValueError(f"{path} does not fit the model that {CONFIG} describes: {shown:.1000}.")
