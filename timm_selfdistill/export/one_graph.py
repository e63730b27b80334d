"""Write a network that ends at an exit, or runs all, for use elsewhere: safetensors, torch.export, or ONNX."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.export.graphs import (
    SUFFIXES,
    Interface,
    check_packages,
    check_run,
    trace,
    write_graph,
    write_out_attention,
)
from timm_selfdistill.hub import check_weights, class_names, complete_names, is_exported, save_exported
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import ENSEMBLE, AllExits, EachExit, ExitChoice, check_choice
from timm_selfdistill.truncation import truncate

MODEL_FORMATS: Final = {"safetensors": "", **{kind: SUFFIXES[kind] for kind in ("torch-export", "onnx")}}
"""By format, what its path ends with; safetensors are a folder."""

ALL: Final = "all"
"""What stands in place of an exit's index where each exit has an output of its own."""

ExportChoice = ExitChoice | Literal["all"]


def export_model(
    model: SelfDistillModel,
    exit: ExportChoice,
    path: str | Path,
    *,
    format: str,
    dynamic_batch: bool = False,
    image_size: int | tuple[int, int] | None = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, cut off after an exit, to a file or folder that holds nothing else.

    Graphs (torch-export, onnx) are in eval mode, on the CPU and in float32. Before one gets its name, it is read again
    and run on random images: the logits must be those of the network.

    Args:
        model: The wrapped model; it stays as it is.
        exit: Index of the exit, 0 the shallowest; `num_exits` is the backbone's own classifier. Of a graph also
            "ensemble": it then runs all exits, and combines them as `model.ensemble` says; or "all": it then has the
            logits of each exit as an output, `logits_0` to `logits_K`.
        path: Where to write: a file that ends with ".pt2" or ".onnx", or for safetensors a folder.
        format: "safetensors" (weights and how to build the network, for `load_exported`), "torch-export" or "onnx".
        dynamic_batch: Whether the graph takes batches of any size, or one image.
        image_size: Height and width in pixels that the graph takes; by default that of the model's preprocessing.
        label_names: Class names, in the order of the logits; by default those that were saved with the model; classes
            after the last are named by their index.
        overwrite: Whether to replace what an earlier export wrote to the path.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is not allowed, the path is taken, a package that the format needs is missing, or a
            weight is no finite number.
        ExportError: If torch or ONNX cannot write the network, or what was written gives other logits.
    """
    path = Path(path)
    check_format(format, dynamic_batch, exit)
    check_choice(model, exit, (ENSEMBLE, ALL))
    check_path(path, MODEL_FORMATS[format], f"the format {format}", overwrite, is_exported)
    names = class_names(model) if label_names is None else complete_names(label_names, model.num_classes)
    check_weights(model)
    config = input_config(model, image_size)
    if format == "safetensors":
        assert isinstance(exit, int)
        save_exported(model, exit, path, label_names=names, data_config=config.to_timm())
        return path
    network = _network(model, exit)
    kind = "onnx" if format == "onnx" else "torch-export"
    outputs = [f"logits_{index}" for index in range(model.num_exits + 1)] if exit == ALL else ["logits"]
    interface = Interface(("images",), tuple(outputs), (dynamic_batch,))
    name = model.ensemble.title if exit == ENSEMBLE else "all exits"
    name = model.exit_names[exit] if isinstance(exit, int) else name
    metadata = json.dumps({"exit": exit, "exit_name": name, **describe(model, names, config)}, indent=2)
    size = (config.channels, *config.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        # Under its final name: both formats write names of files into the file.
        staged = Path(folder) / path.name
        traced = copy.deepcopy(network)
        if kind == "onnx":
            write_out_attention(traced)
        program = trace(traced, [torch.zeros(2 if dynamic_batch else 1, *size)], interface)
        run = write_graph(program, interface, kind, metadata, staged)
        generator = torch.Generator().manual_seed(0)
        sizes = (1, 3) if dynamic_batch else (1,)
        check_run(run, network, (torch.randn(count, *size, generator=generator) for count in sizes), format)
        move_files(staged, path)
    return path


def input_config(model: SelfDistillModel, image_size: int | tuple[int, int] | None) -> InputConfig:
    """Return how a model's images are prepared, of this size where one is given."""
    config = InputConfig.from_model(model.backbone)
    if image_size is None:
        return config
    return replace(config, image_size=(image_size, image_size) if isinstance(image_size, int) else image_size)


def describe(model: SelfDistillModel, names: Sequence[str] | None, config: InputConfig) -> dict[str, Any]:
    """Return what is written beside a graph: what it was made of, its classes, and how images are prepared."""
    named = getattr(model.backbone, "pretrained_cfg", {})
    return {
        "architecture": named.get("architecture", type(model.backbone).__name__),
        "num_classes": model.num_classes,
        "label_names": None if names is None else list(names),
        **config.to_timm(),
    }


def as_exported(network: nn.Module) -> nn.Module:
    """Return a network as its graphs are: in eval mode, on the CPU and in float32."""
    return network.eval().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)


def move_files(staged: Path, path: Path) -> None:
    """Move a graph from a folder that holds nothing else to its path, and the weights that ONNX keeps beside it.

    Weights that only the graph had which it replaces are deleted.
    """
    replaces = path.exists()
    weights = f"{path.name}.data"
    is_large = (staged.parent / weights).exists()
    # The graph, which names them, comes last.
    for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
        os.replace(file, path.parent / file.name)
    if replaces and not is_large:
        (path.parent / weights).unlink(missing_ok=True)


def check_format(name: str, dynamic_batch: bool, exit: ExportChoice | None) -> None:
    """Raise ValueError unless there is such a format, and it can hold this."""
    if name not in MODEL_FORMATS:
        raise ValueError(f"There is no format {name!r}; allowed are {', '.join(MODEL_FORMATS)}.")
    if name == "safetensors" and dynamic_batch:
        raise ValueError("safetensors hold weights, which fit batches of any size: leave out dynamic_batch.")
    if name == "safetensors" and exit in (ENSEMBLE, ALL):
        several = "the ensemble" if exit == ENSEMBLE else "all exits"
        raise ValueError(f"safetensors hold one exit; allowed for {several} are torch-export and onnx.")
    check_packages(name)


def check_path(path: Path, suffix: str, what: str, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise ValueError unless the path suits the format, and is free or may be overwritten.

    Args:
        path: Where to write.
        suffix: What the path of a file ends with; empty for a folder.
        what: What is written.
        overwrite: Whether what an earlier export wrote there is replaced.
        is_ours: Whether an earlier export wrote a folder.
    """
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path} must end with {suffix} for {what}.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only with overwrite=True (--force).")
    if suffix and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, so it is not replaced.")
    if not suffix and path.exists() and not is_ours(path):
        raise ValueError(f"{path} was not written by an export, so nothing is written there.")


def _network(model: SelfDistillModel, exit: ExportChoice) -> nn.Module:
    """Return a copy of what is exported."""
    if isinstance(exit, int):
        return as_exported(truncate(model, exit))
    return as_exported((EachExit if exit == ALL else AllExits)(copy.deepcopy(model)))
