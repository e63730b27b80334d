"""Weights of one's own to start from: a file of safetensors or torch, or a folder of timm or of this library."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from timm_selfdistill.hub.folder import BACKBONE, EXITS
from timm_selfdistill.model import SelfDistillModel

# What DDP, compile and timm's average of the weights put before the name of a weight.
_WRAPPERS: Final = re.compile(r"^((module|_orig_mod)\.)+")
# Where training scripts keep the weights in a checkpoint, the averaged ones first, as timm reads them.
_PLACES: Final = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
_NAMED: Final = 5

State = dict[str, Tensor]


def load_start_weights(model: SelfDistillModel, source: str | Path) -> list[str]:
    """Load weights that training begins with: those of the backbone, and those of exits where they fit.

    A classifier of another number of classes is left as it is, and so is an exit whose head is another one.

    Args:
        model: The model, whose weights are changed.
        source: A file (`.safetensors`, or a checkpoint of torch, which is read with `weights_only=True`), or a folder
            with `model.safetensors`: a run's, a model's of this library or of timm.

    Returns:
        A sentence for each part that is not loaded.

    Raises:
        ValueError: If there is no such file, it cannot be read, or its names or shapes are not those of the backbone.
    """
    path = Path(source).expanduser()
    backbone, exits = _read(path)
    notices = list(_load_backbone(model, backbone, path))
    if exits:
        notices += _load_exits(model, exits, path)
    return notices


def _read(path: Path) -> tuple[State, State]:
    """Return the weights of the backbone and of the exits in a file or folder, under the names that they have there."""
    if not path.is_dir():
        return _parts(_read_file(path))
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / BACKBONE).is_file():
        raise ValueError(
            f"model.weights: there is no {BACKBONE} in {folder}; name a file, or the folder of a saved model."
        )
    backbone, exits = _parts(_read_file(folder / BACKBONE))
    return backbone, exits or (_read_file(folder / EXITS) if (folder / EXITS).is_file() else {})


def _read_file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # timm's training script stores its arguments too, which are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"model.weights: there is no file or folder {path}.") from None
    except Exception as error:  # of the file system, safetensors, pickle or zip
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model.weights: {path} cannot be read as weights ({reason}); a checkpoint that holds other objects than "
            "tensors and plain values is never unpickled: save its state dict, as .safetensors."
        ) from error
    for place in _PLACES:
        if isinstance(stored, Mapping) and _holds_tensors(stored.get(place)):
            stored = stored[place]
            break
    if not _holds_tensors(stored):
        raise ValueError(f"model.weights: {path} holds no state dict, itself or under one of {', '.join(_PLACES)}.")
    return without_wrappers({name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)})


def without_wrappers(state: State) -> State:
    """Return weights under their own names, whatever the network was wrapped in."""
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _parts(state: State) -> tuple[State, State]:
    """Return the weights of backbone and exits, which the state of a wrapped model holds together."""
    backbone = _below(state, "backbone.")
    return (backbone, _below(state, "heads.")) if backbone else (state, {})


def _below(state: State, prefix: str) -> State:
    """Return the weights whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load_backbone(model: SelfDistillModel, state: State, path: Path) -> Iterator[str]:
    own = model.backbone.state_dict()
    classifiers = tuple(f"{name}." for name in model.taps.classifier.modules)
    other = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    renewed = {name for name in other | (own.keys() ^ state.keys()) if name.startswith(classifiers)}
    problems = {
        "missing are": sorted(own.keys() - state.keys() - renewed),
        "unexpected are": sorted(state.keys() - own.keys() - renewed),
        "of another shape are": [
            f"{name} ({_shape(state[name])}, here {_shape(own[name])})" for name in sorted(other - renewed)
        ],
    }
    if found := [f"{kind} {_listed(names)}" for kind, names in problems.items() if names]:
        raise ValueError(
            f"model.weights: {path} does not fit {model.pretrained_cfg.get('architecture', 'the backbone')}: "
            f"{'; '.join(found)}. Name the model, its arguments and image size that they were trained with."
        )
    model.backbone.load_state_dict(
        {**own, **{name: state[name] for name in own if name in state and name not in renewed}}
    )
    if renewed:
        classes = next((f"{len(state[name])} classes" for name in sorted(renewed) if name in state), "none")
        yield f"model.weights: the classifier is not loaded: {path} has {classes}, and the model {model.num_classes}."


def _load_exits(model: SelfDistillModel, state: State, path: Path) -> Iterator[str]:
    """Load the heads of the same names and shapes, each as a whole but for a classifier of other classes."""
    renewed = []
    for index in range(model.num_exits):
        head: nn.Module = model.head_of(index)
        own = head.state_dict()
        given = _below(state, f"{index}.")
        differ = [name for name in own if name not in given or given[name].shape != own[name].shape]
        if own.keys() != given.keys() or any(not name.startswith("classifier.") for name in differ):
            renewed.append(model.exit_names[index])
            continue
        head.load_state_dict({**own, **{name: tensor for name, tensor in given.items() if name not in differ}})
    if renewed:
        yield f"model.weights: the exits {', '.join(renewed)} are not loaded, as those in {path} have other heads."


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
