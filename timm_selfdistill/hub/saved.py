"""What the configuration of a saved model tells beyond timm's, and the files that it has the checksums of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from torch import nn

from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.hub.limits import check_arguments, check_config, check_image, read_json
from timm_selfdistill.model import SelfDistillModel

CONFIG = "config.json"
KEY = "timm_selfdistill"
_FORMAT_VERSION = 1
# More than the deepest of timm's networks has blocks.
_MAX_EXITS = 1000


@dataclass(frozen=True)
class Saved:
    """Our key of the configuration: how to wrap the backbone, and the weights' checksums.

    With `exit`, the weights are those of a network that ends there, instead of the backbone's and the exits'. With
    `run`, a training run wrote it: what it says of itself there is its own matter. Without `ensemble`, it is the mean.
    """

    format_version: int
    exits: Annotated[list[str], Field(min_length=1, max_length=_MAX_EXITS)]
    head: str
    head_kwargs: dict[str, Any]
    hint_adapter: bool
    small_stem: bool
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    sha256: dict[str, str]
    early_exit: Any = None
    exit: int | None = None
    run: Any = None
    ensemble: Any = None


def describe(
    model: SelfDistillModel,
    sha256: dict[str, str],
    *,
    early_exit: EarlyExitConfig | None = None,
    exit: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> Saved:
    """Return what the configuration of a saved model is to tell beyond timm's.

    Args:
        model: The wrapped model.
        sha256: Checksum of each file of weights.
        early_exit: When images leave early.
        exit: The exit at which the saved network ends, where it is not the whole model.
        run: What the training run says of itself.
    """
    config = model.wrap_config
    # The dry run's size as it was: the saved input size may be another one, at which the taps' grids look otherwise.
    if config.image_size is not None:
        check_image("image_size", config.image_size)
    own_size = resolve_input_data_config(model.backbone, {"mean": 0.5, "std": 0.5})["input_size"][1:]
    return Saved(
        format_version=_FORMAT_VERSION,
        exits=[point.name for point in model.points],
        head=config.head,
        head_kwargs=dict(config.head_kwargs),
        hint_adapter=config.hint_adapter,
        small_stem=config.small_stem,
        image_size=list(config.image_size or own_size),
        sha256=sha256,
        early_exit=None if early_exit is None else early_exit.to_json(),
        exit=exit,
        run=None if run is None else dict(run),
        ensemble=None if exit is not None or model.ensemble.is_mean else model.ensemble.to_json(),
    )


def read_config(folder: Path) -> Saved:
    """Return what the configuration of a saved model tells beyond timm's."""
    path = folder / CONFIG
    if not path.is_file():
        hint = ""
        if (folder / "checkpoints").is_dir():
            hint = (
                " Of a run that was stopped, --from-checkpoint takes the newest checkpoint, and "
                f"`timm-selfdistill finish {folder}` makes the model of it."
            )
        raise ValueError(f"{folder} holds no model: there is no {CONFIG} in it.{hint}")
    config = read_json(path)
    ours = config.get(KEY) if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"{path} has no key {KEY!r}: a model of plain timm is loaded by timm.create_model.")
    version = ours.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r:.40}, this version of timm_selfdistill reads {_FORMAT_VERSION}: "
            "upgrade timm_selfdistill."
        )
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{path} asks for what is not allowed: {error}") from error
    expected = [field.name for field in fields(Saved)]
    if not set(expected) - {"early_exit", "exit", "run", "ensemble"} <= set(ours) <= set(expected):
        raise ValueError(
            f"{path} is damaged: {KEY!r} holds {', '.join(ours):.500}; it must hold {', '.join(expected)}."
        )
    try:
        saved = TypeAdapter(Saved).validate_json(json.dumps(ours), strict=True)
        check_arguments("head_kwargs", saved.head_kwargs)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is damaged: in {KEY!r}, {wrong:.1000}.") from error
    except ValueError as error:
        raise ValueError(f"{path} asks for what is not allowed: {error}") from error
    return saved


def check_finite(module: nn.Module) -> None:
    """Raise ValueError unless all weights of a module are finite numbers."""
    damaged = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    damaged += [name for name, buffer in module.named_buffers() if buffer.isnan().any()]
    if damaged:
        listed = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        raise ValueError(
            f"{len(damaged)} tensors of the model hold NaN or infinity, so that it has no answers: {listed}."
        )


def read_weights(path: Path, digest: str | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file whose checksum is known."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    data = path.read_bytes()
    if sha256_of(data) != digest:
        raise ValueError(f"{path} is damaged or was exchanged: its sha256 is not the one in {CONFIG}.")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def sha256_of(data: bytes) -> str:
    """Return the checksum of a file's content."""
    return hashlib.sha256(data).hexdigest()
