"""Write a network that ends at an exit for use elsewhere: as safetensors, by torch.export, or as ONNX."""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.export.errors import ExportError, first_line, name_of
from timm_selfdistill.export.graphs import write_onnx, write_torch_export
from timm_selfdistill.hub import check_finite, class_names, complete_names, from_pretrained, is_exported, save_exported
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.truncation import truncate

# By format, what its path ends with; safetensors are a folder.
FORMATS: Final = {"safetensors": "", "torch-export": ".pt2", "onnx": ".onnx"}
# Largest difference of the logits, as a share of the largest logit.
TOLERANCE: Final = 1e-4


def export_model(
    model: SelfDistillModel,
    exit: int,
    path: str | Path,
    *,
    format: str,
    dynamic_batch: bool = False,
    image_size: int | tuple[int, int] | None = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, cut off behind an exit, to a file or folder that holds nothing else.

    Graphs (torch-export and onnx) are those of the network in eval mode, on the CPU and in float32. What was written
    is read again and run on random images before it gets its name: the logits must be those of the network.

    Args:
        model: The wrapped model; it stays as it is.
        exit: Index of the exit, 0 the shallowest; `num_exits` is the backbone's own classifier.
        path: Where to write: a file that ends with ".pt2" or ".onnx", or for safetensors a folder.
        format: "safetensors" (weights and how to build the network, for `load_exported`), "torch-export" or "onnx".
        dynamic_batch: Whether the graph takes batches of any size; else it takes one image.
        image_size: Height and width in pixels that the graph takes; by default that of the model's preprocessing.
        label_names: Class names, in the order of the logits; those that were saved with the model by default; classes
            behind the last are named by their index.
        overwrite: Whether to replace what an earlier export wrote to the path.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is not allowed, the path is taken, a package that the format needs is missing, or a
            weight is no finite number.
        ExportError: If torch or ONNX cannot write the network, or what was written gives other logits.
    """
    path = Path(path)
    _check_format(format, dynamic_batch)
    _check_path(path, format, overwrite)
    names = class_names(model) if label_names is None else complete_names(label_names, model.num_classes)
    check_finite(model)
    input = InputConfig.from_model(model.backbone)
    if image_size is not None:
        input = replace(input, image_size=(image_size, image_size) if isinstance(image_size, int) else image_size)
    if format == "safetensors":
        save_exported(model, exit, path, label_names=names, data_config=input.to_timm())
        return path
    small = truncate(model, exit).eval().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    metadata = json.dumps(_describe(model, exit, input, names), indent=2)
    write = write_onnx if format == "onnx" else write_torch_export
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        # Under its own name: both formats write names of files into the file.
        staged = Path(folder) / path.name
        run = write(small, (input.channels, *input.image_size), dynamic_batch, metadata, staged)
        _check_logits(run, small, (input.channels, *input.image_size), dynamic_batch, format)
        # Weights that ONNX keeps in a file of their own come before the graph that names it.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == staged):
            os.replace(file, path.parent / file.name)
    return path


def export_folder(
    source: str | Path,
    exit: int | None = None,
    output: Path | None = None,
    *,
    format: str,
    dynamic_batch: bool = False,
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
    default_folder: str | Path | None = None,
) -> Path:
    """Write a saved model, cut off behind an exit, as `export_model` does.

    Args:
        source: A run's folder, the model folder in it, or a repository on the Hub.
        exit: Index of the exit; the backbone's own classifier by default.
        output: Where to write; by default "exit-K" and the format's ending, in the folder, or here for the Hub's.
        format: As in `export_model`.
        dynamic_batch: As in `export_model`.
        image_size: As in `export_model`.
        overwrite: As in `export_model`.
        default_folder: What stands for `source` in the default of `output`.

    Returns:
        The path that was written.

    Raises:
        ValueError: As `export_model`; also if there is no model in the folder.
        ExportError: As `export_model`.
        HubError: If the repository cannot be loaded.
    """
    _check_format(format, dynamic_batch)
    folder = Path(source)
    model = from_pretrained(folder / "model" if (folder / "model").is_dir() else source)
    exit = model.num_exits if exit is None else exit
    if output is None:
        beside = folder if default_folder is None else Path(default_folder)
        output = (beside if beside.is_dir() else Path()) / f"exit-{exit}{FORMATS[format]}"
    return export_model(
        model,
        exit,
        output.expanduser(),
        format=format,
        dynamic_batch=dynamic_batch,
        image_size=image_size,
        overwrite=overwrite,
    )


def _check_format(format: str, dynamic_batch: bool) -> None:
    """Raise ValueError unless the format is known, can do what is asked, and its packages are there."""
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; allowed are {', '.join(FORMATS)}.")
    if format == "safetensors" and dynamic_batch:
        raise ValueError("safetensors hold weights, which fit batches of any size: leave out dynamic_batch.")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _can_import(name)]
        if missing:
            raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'timm_selfdistill[onnx]'.")


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _check_path(path: Path, format: str, overwrite: bool) -> None:
    """Raise ValueError unless the path suits the format, and is free or may be overwritten."""
    suffix = FORMATS[format]
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path} must end with {suffix} for the format {format}.")
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only with overwrite=True (--force).")
    if suffix and not path.is_file():
        raise ValueError(f"{path} is no file, so it is not replaced.")
    if not suffix and not is_exported(path):
        raise ValueError(f"{path} was not written by an export, so nothing is written there.")


def _describe(model: SelfDistillModel, exit: int, input: InputConfig, names: Sequence[str] | None) -> dict[str, Any]:
    """Return what a stranger must know of the network to use it."""
    if not 0 <= exit <= model.num_exits:
        raise ValueError(f"There is no exit {exit}; allowed are 0 to {model.num_exits} (the backbone's own).")
    return {
        "architecture": getattr(model.backbone, "pretrained_cfg", {}).get(
            "architecture", type(model.backbone).__name__
        ),
        "exit": exit,
        "exit_name": model.exit_names[exit],
        "num_classes": model.num_classes,
        "label_names": None if names is None else list(names),
        **input.to_timm(),
    }


def _check_logits(
    run: Callable[[Tensor], Tensor], small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, format: str
) -> None:
    """Raise ExportError unless what was written gives a network's logits for random images."""
    generator = torch.Generator().manual_seed(0)
    for batch_size in (1, 3) if dynamic_batch else (1,):
        images = torch.randn(batch_size, *size, generator=generator)
        with torch.no_grad():
            expected = small(images)
        try:
            with torch.no_grad():
                found = run(images)
        except Exception as error:  # of the runtime, of any kind
            raise ExportError(
                f"{name_of(small)}, exported to {format}, fails on a batch of {batch_size}: {first_line(error)}"
            ) from error
        off = float((found - expected).abs().max())
        # Written so that NaN is a difference.
        if not off <= TOLERANCE * float(expected.abs().max()):
            raise ExportError(
                f"{name_of(small)}, exported to {format}, gives other logits for a batch of {batch_size}: they "
                f"differ by up to {off:.2g}, the largest is {float(expected.abs().max()):.2g}."
            )
