"""Write a network that ends at an exit, or runs all, for use elsewhere: safetensors, torch.export, or ONNX.

`export_folder` writes a saved model so, or with early exit.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig
from timm_selfdistill.export import graphs
from timm_selfdistill.export.early_exit_graphs import EARLY_EXIT_FORMATS, check_early_exit_format, export_early_exit
from timm_selfdistill.export.onnx_stages import check_quantization
from timm_selfdistill.hub import check_weights, from_pretrained, is_exported, load_with_early_exit, save_exported
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import ENSEMBLE, AllExits, EachExit, ExitChoice, check_choice
from timm_selfdistill.truncation import truncate

_MODEL_FORMATS: Final = {"safetensors": "", **{kind: graphs.SUFFIXES[kind] for kind in ("torch-export", "onnx")}}

FORMATS: Final = {**_MODEL_FORMATS, **EARLY_EXIT_FORMATS}
"""By format, what its path ends with; where that is nothing, the path is a folder."""

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
            weight is not a finite number.
        ExportError: If torch or ONNX cannot write the network, or what was written gives other logits.
    """
    path = Path(path)
    _check_format(format, dynamic_batch, exit)
    check_choice(model, exit, (ENSEMBLE, ALL))
    graphs.check_path(path, FORMATS[format], format, overwrite, is_exported)
    config = graphs.input_config(model, image_size)
    description = graphs.describe(model, label_names, config)
    check_weights(model)
    if format == "safetensors":
        assert isinstance(exit, int)
        save_exported(model, exit, path, label_names=description["label_names"], data_config=config.to_timm())
        return path
    network = _network(model, exit)
    outputs = [f"logits_{index}" for index in range(model.num_exits + 1)] if exit == ALL else ["logits"]
    interface = graphs.Interface(("images",), tuple(outputs), (dynamic_batch,))
    name = model.ensemble.title if exit == ENSEMBLE else "all exits"
    name = model.exit_names[exit] if isinstance(exit, int) else name
    metadata = json.dumps({"exit": exit, "exit_name": name, **description}, indent=2)
    size = (config.channels, *config.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        # Under its final name: both formats write names of files into the file.
        staged = Path(folder) / path.name
        examples = [torch.zeros(2 if dynamic_batch else 1, *size)]
        program = graphs.trace(graphs.copy_to_trace(network, format), examples, interface)
        run = graphs.write_graph(program, interface, format, metadata, staged)
        generator = torch.Generator().manual_seed(0)
        sizes = (1, 3) if dynamic_batch else (1,)
        graphs.check_run(run, network, (torch.randn(count, *size, generator=generator) for count in sizes), format)
        graphs.move_files(staged, path)
    return path


def export_folder(
    source: str | Path,
    exit: ExportChoice | None = None,
    output: Path | None = None,
    *,
    format: str,
    dynamic_batch: bool = False,
    threshold: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    calibration_images: Tensor | None = None,
    default_folder: str | Path | None = None,
) -> Path:
    """Write a saved model as `export_model` does, or with early exit as `export_early_exit` does.

    The source is a run's folder, a model folder or a repository on the Hub. By default, the backbone's own classifier
    is written, to "exit-K" ("ensemble", "all" for all exits; the format's name for early exit) and the format's ending
    in the folder, or in `default_folder`; for a repository, in the working directory. Early exit is by the settings
    that are saved with the model, or lets images leave at any exit with the confidence `threshold`.

    Raises:
        ValueError: Also if an argument does not belong to the format, or there are no settings for early exit.
    """
    early = format in EARLY_EXIT_FORMATS
    # Before the model is loaded.
    if early:
        check_early_exit_format(format)
        check_quantization(quantize, format, calibration_images)
        given = {"exit": exit is not None, "dynamic_batch": dynamic_batch}
        if unfit := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{format} writes all exits, for any batch: leave out {', '.join(unfit)}.")
    else:
        _check_format(format, dynamic_batch, exit)
        given = {"threshold": threshold is not None, "quantize": quantize is not None}
        if unfit := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{format} has no early exit: {', '.join(unfit)} is for {', '.join(EARLY_EXIT_FORMATS)}.")
    folder = Path(source)
    location = folder / "model" if (folder / "model").is_dir() else source
    beside = folder if default_folder is None else Path(default_folder)
    beside = beside if beside.is_dir() else Path()
    common: dict[str, Any] = {"format": format, "image_size": image_size, "overwrite": overwrite}
    if early:
        network = _load_early_exit(location, threshold)
        path = beside / f"{format}{FORMATS[format]}" if output is None else output.expanduser()
        return export_early_exit(network, path, quantize=quantize, calibration_images=calibration_images, **common)
    model = from_pretrained(location)
    choice = model.num_exits if exit is None else exit
    name = choice if isinstance(choice, str) else f"exit-{choice}"
    path = beside / f"{name}{FORMATS[format]}" if output is None else output.expanduser()
    return export_model(model, choice, path, dynamic_batch=dynamic_batch, **common)


def _check_format(name: str, dynamic_batch: bool, exit: ExportChoice | None) -> None:
    """Raise ValueError unless there is such a format, and it can hold this."""
    if name not in _MODEL_FORMATS:
        raise ValueError(f"There is no format {name!r}; allowed are {', '.join(_MODEL_FORMATS)}.")
    if name == "safetensors" and dynamic_batch:
        raise ValueError("safetensors hold weights, which fit batches of any size: leave out dynamic_batch.")
    if name == "safetensors" and exit in (ENSEMBLE, ALL):
        several = "the ensemble" if exit == ENSEMBLE else "all exits"
        raise ValueError(f"safetensors hold one exit; allowed for {several} are torch-export and onnx.")
    graphs.check_packages(name)


def _network(model: SelfDistillModel, exit: ExportChoice) -> nn.Module:
    """Return a copy of what is exported."""
    if isinstance(exit, int):
        return graphs.as_exported(truncate(model, exit))
    return graphs.as_exported((EachExit if exit == ALL else AllExits)(copy.deepcopy(model)))


def _load_early_exit(source: str | Path, threshold: float | None) -> EarlyExit:
    """Load a model, with early exit by what is given or, without that, by what is saved."""
    model, settings = load_with_early_exit(source)
    if threshold is not None:
        thresholds = (threshold,) * model.num_exits
        settings = EarlyExitConfig(thresholds) if settings is None else replace(settings, thresholds=thresholds)
    if settings is None:
        raise ValueError(
            f"{source} has no early-exit settings: choose them by timm-selfdistill calibrate, or give a threshold for "
            "all exits (--threshold)."
        )
    with warnings.catch_warnings():
        # What a backbone does not do with a part of its batch, its stages may do.
        warnings.filterwarnings("ignore", message=".* cannot run on with a part of its batch")
        return EarlyExit.from_config(model, settings)
