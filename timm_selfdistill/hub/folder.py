"""A saved model: a folder that plain timm loads too."""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import timm
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.models import save_for_hf
from torch import nn

from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.hub.card import card_with_early_exit, model_card
from timm_selfdistill.model import SelfDistillModel, wrap

CONFIG, BACKBONE, EXITS, CARD = "config.json", "model.safetensors", "exits.safetensors", "README.md"
_KEY = "timm_selfdistill"
_FORMAT_VERSION = 1


def save_pretrained(
    model: SelfDistillModel,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    early_exit: EarlyExitConfig | None = None,
    card: str | None = None,
) -> Path:
    """Write a model to a folder that `from_pretrained` and, for the backbone, plain timm load.

    The folder gets `config.json` (timm's, with one more key), `model.safetensors` (the backbone under timm's own
    keys), `exits.safetensors` and `README.md`. Each file is written beside its place and then renamed, the
    configuration, which holds the weights' checksums, last.

    A backbone with `small_stem` is one that timm cannot build from a name: there, plain timm needs the three lines
    that the model card shows.

    Args:
        model: The wrapped model; what it is wrapped in (DDP, compile) must be removed first.
        folder: Where to write; made if it does not exist.
        label_names: Class names, in the order of the logits.
        data_config: Preprocessing of the training run (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`).
        early_exit: When images leave early, for `load_early_exit`; the `config` of an `EarlyExit`.
        card: Text of the model card; a short one by default.

    Returns:
        The folder.

    Raises:
        ValueError: If the backbone is not a timm model, or not one that `data_config` fits; if `early_exit` has not one
            threshold for each exit.
    """
    if not hasattr(model.backbone, "pretrained_cfg"):
        raise ValueError(f"A saved model must have a backbone of timm's, got {type(model.backbone).__name__}.")
    if early_exit is not None:
        early_exit.check_exits(model.exit_names[:-1])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Saved as stored on disk by plain timm: on the CPU and in the default memory format.
    backbone = copy.deepcopy(model.backbone).cpu().to(memory_format=torch.contiguous_format)
    backbone.register_state_dict_post_hook(_unshare)
    exits = {name: tensor.cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        staged = Path(temporary)
        save_for_hf(
            backbone,
            str(staged),
            model_config=_truthful_config(label_names),
            safe_serialization=True,
            data_config=dict(data_config or {}),
        )
        safetensors.torch.save_file(exits, staged / EXITS)
        config = json.loads((staged / CONFIG).read_text())
        config[_KEY] = asdict(_describe(model, staged, early_exit))
        (staged / CONFIG).write_text(json.dumps(config, indent=2))
        (staged / CARD).write_text(card if card is not None else model_card(model, early_exit=early_exit))
        for name in (BACKBONE, EXITS, CARD, CONFIG):
            # safetensors makes files that only their owner can read, whatever the umask.
            shutil.copymode(staged / CONFIG, staged / name)
            os.replace(staged / name, folder / name)
    return folder


def load_folder(folder: str | Path) -> SelfDistillModel:
    """Load a model that `save_pretrained` wrote, in eval mode.

    Nothing is unpickled or executed.

    Args:
        folder: The folder.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If the folder or a file is missing, damaged, of a newer format, or from something else.
    """
    folder = Path(folder)
    saved = _read_config(folder)
    weights = {name: _read_weights(folder / name, saved.sha256.get(name)) for name in (BACKBONE, EXITS)}
    try:
        model = wrap(
            timm.create_model(f"local-dir:{folder}", pretrained=False),
            exits=saved.exits,
            head=saved.head,
            head_kwargs=saved.head_kwargs,
            hint_adapter=saved.hint_adapter,
            small_stem=saved.small_stem,
            image_size=(saved.image_size[0], saved.image_size[1]),
        )
    except Exception as error:  # timm checks few arguments, and fails wherever a wrong one leads
        raise ValueError(f"The model that {folder / CONFIG} describes cannot be built: {error!r}") from error
    for name, module in ((BACKBONE, model.backbone), (EXITS, model.heads)):
        try:
            module.load_state_dict(weights[name])
        except RuntimeError as error:
            raise ValueError(f"{folder / name} does not fit the model that {CONFIG} describes: {error}") from error
    return model.eval()


def read_early_exit(folder: str | Path) -> EarlyExitConfig | None:
    """Return the early-exit settings that were saved with a model, or None if there are none.

    Raises:
        ValueError: If the folder holds no model, or the settings are not allowed.
    """
    saved = _read_config(Path(folder)).early_exit
    if saved is None:
        return None
    try:
        return EarlyExitConfig.from_json(saved)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG} holds early-exit settings that are not allowed: {error}") from error


def save_early_exit(folder: str | Path, early_exit: EarlyExitConfig) -> None:
    """Keep early-exit settings with a model that is saved already; its weights are not written again.

    `config.json` is replaced first, then the model card, where it still has the lines that tell how to load the model.

    Args:
        folder: A folder that `save_pretrained` wrote.
        early_exit: When images leave early.

    Raises:
        ValueError: If the folder holds no whole model, or there is not one threshold for each of its exits.
    """
    folder = Path(folder)
    model = load_folder(folder)
    early_exit.check_exits(model.exit_names[:-1])
    config = json.loads((folder / CONFIG).read_text())
    config[_KEY]["early_exit"] = early_exit.to_json()
    texts = {CONFIG: json.dumps(config, indent=2)}
    if (folder / CARD).is_file():
        texts[CARD] = card_with_early_exit((folder / CARD).read_text(), model, early_exit)
    for name, text in texts.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            staged = Path(temporary) / name
            staged.write_text(text)
            shutil.copymode(folder / name, staged)
            os.replace(staged, folder / name)


def _unshare(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Give tensors that share memory, as CoaT's position encodings do, a copy each: safetensors refuses them else."""
    seen: set[int] = set()
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            state[name] = tensor.clone()
        seen.add(address)


def _truthful_config(label_names: Sequence[str] | None) -> dict[str, Any]:
    """Return what replaces, in timm's configuration, that which was true of the pretrained weights only."""
    config: dict[str, Any] = {
        "pretrained_cfg": {"tag": "selfdistill", "license": None, "origin_url": None, "paper_ids": "arXiv:1905.08094"}
    }
    if label_names is not None:
        config["label_names"] = list(label_names)
    return config


@dataclass(frozen=True)
class _Saved:
    """Our key of the configuration: how to wrap the backbone, and the weights' checksums."""

    format_version: int
    exits: list[str]
    head: str
    head_kwargs: dict[str, Any]
    hint_adapter: bool
    small_stem: bool
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    sha256: dict[str, str]
    early_exit: Any = None


def _describe(model: SelfDistillModel, folder: Path, early_exit: EarlyExitConfig | None) -> _Saved:
    config = model.config
    # The dry run's size as it was: the saved input size may be another one, at which the taps' grids look otherwise.
    own_size = resolve_input_data_config(model.backbone, {"mean": 0.5, "std": 0.5})["input_size"][1:]
    return _Saved(
        format_version=_FORMAT_VERSION,
        exits=[point.name for point in model.points],
        head=config.head,
        head_kwargs=dict(config.head_kwargs),
        hint_adapter=config.hint_adapter,
        small_stem=config.small_stem,
        image_size=list(config.image_size or own_size),
        sha256={name: _sha256((folder / name).read_bytes()) for name in (BACKBONE, EXITS)},
        early_exit=None if early_exit is None else early_exit.to_json(),
    )


def _read_config(folder: Path) -> _Saved:
    """Return what the configuration of a saved model tells beyond timm's."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no model: there is no {CONFIG} in it.")
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    ours = config.get(_KEY) if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"{path} has no key {_KEY!r}: a model of plain timm is loaded by timm.create_model.")
    version = ours.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this version of timm_selfdistill reads {_FORMAT_VERSION}: "
            "upgrade timm_selfdistill."
        )
    expected = [field.name for field in fields(_Saved)]
    if not set(expected) - {"early_exit"} <= set(ours) <= set(expected):
        raise ValueError(f"{path} is damaged: {_KEY!r} holds {', '.join(ours)}; it must hold {', '.join(expected)}.")
    try:
        return TypeAdapter(_Saved).validate_json(json.dumps(ours), strict=True)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is damaged: in {_KEY!r}, {wrong}.") from error


def _read_weights(path: Path, digest: str | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file whose checksum is known."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    data = path.read_bytes()
    if _sha256(data) != digest:
        raise ValueError(f"{path} is damaged or was exchanged: its sha256 is not the one in {CONFIG}.")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
