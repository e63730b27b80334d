"""Write a network with early exit: a graph for each stage and a manifest, or one graph that stops early by itself."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import timm_selfdistill
from timm_selfdistill.early_exit import EarlyExit
from timm_selfdistill.export.deciding_exits import DecidingExits, describe_early_exit, example_inputs, write_stage
from timm_selfdistill.export.graph_cuts import Stage
from timm_selfdistill.export.graphs import (
    SUFFIXES,
    TOLERANCE,
    ExportError,
    Run,
    check_close,
    check_packages,
    first_line,
)
from timm_selfdistill.export.nested_if import nest_stages, open_nested, save_model
from timm_selfdistill.export.one_graph import as_exported, check_path, move_files
from timm_selfdistill.export.quantize import check_quantization, quantize_stages
from timm_selfdistill.hub import check_weights
from timm_selfdistill.staged import FORMAT, MANIFEST, VERSION, Array, Manifest, StageSpec, run_stages, sha256_of

_STAGES: Final = {"onnx-stages": "onnx", "torch-export-stages": "torch-export"}
NESTED: Final = "onnx-if"

EARLY_EXIT_FORMATS: Final = {**dict.fromkeys(_STAGES, ""), NESTED: ".onnx"}
"""By format, what its path ends with; those of stages are folders."""


def export_early_exit(
    network: EarlyExit,
    path: str | Path,
    *,
    format: str,
    image_size: int | tuple[int, int] | None = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    calibration_images: Tensor | None = None,
) -> Path:
    """Write a network with early exit, so that it stops early where it is run.

    The graphs are in eval mode, on the CPU and in float32. Stages take batches of any size; one graph with all stages
    takes one image. Before they get their names, the files are read again and run on random images that leave at
    different exits: the answers must be those of the network.

    Args:
        network: The network with its settings; it stays as it is.
        path: Where to write: a folder, or for "onnx-if" a file that ends with ".onnx".
        format: "onnx-stages" (for `OnnxEarlyExit`) or "torch-export-stages": a graph for each stage, and a manifest;
            "onnx-if": one graph for one image, in which each stage stands in a branch of the one before it.
        image_size: Height and width in pixels that the graphs take; by default that of the model's preprocessing.
        label_names: Class names, in the order of the logits; by default those that were saved with the model.
        overwrite: Whether to replace what an earlier export wrote to the path.
        quantize: "dynamic" or "static" for stages in int8, by ONNX Runtime's quantiser. Their answers differ from the
            network's: thresholds that were chosen for it are worth a second look.
        calibration_images: For "static", images [N, C, H, W] as the network gets them, which set the tensors' ranges.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is not allowed, the path is taken, a package that the format needs is missing, or a
            weight is no finite number.
        ExportError: If torch or ONNX cannot write the network, it cannot be cut into stages, or what was written gives
            other answers.
    """
    path = Path(path)
    check_early_exit_format(format)
    images = None if calibration_images is None else calibration_images.detach().cpu().float().numpy()
    check_quantization(quantize, format, images)
    check_path(path, EARLY_EXIT_FORMATS[format], f"the format {format}", overwrite, _is_staged)
    check_weights(network.model)
    description = describe_early_exit(network, image_size, label_names)
    deciding = DecidingExits(copy.deepcopy(network.model), network.config, own=format == "onnx-stages")
    as_exported(deciding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        if format == NESTED:
            written = _write_nested(deciding, description, Path(folder), path.name)
            _check_nested(deciding, written, description["input_size"])
            move_files(written, path)
            return path
        written = Path(folder) / "stages"
        written.mkdir()
        stages = deciding.cut(description["input_size"], _STAGES[format], dynamic_batch=True)
        runs = _write_stages(stages, _STAGES[format], description, written)
        check_stages(deciding, Manifest.read(written), runs, format)
        if quantize is not None:
            quantize_stages(written, quantize, images)
        if path.exists():
            os.rename(path, Path(folder) / "replaced")
        os.rename(written, path)
    return path


def check_early_exit_format(name: str) -> None:
    """Raise ValueError unless there is such a format, and the packages that it needs are there."""
    if name not in EARLY_EXIT_FORMATS:
        raise ValueError(f"There is no format {name!r} for early exit; allowed are {', '.join(EARLY_EXIT_FORMATS)}.")
    check_packages(_STAGES.get(name, "onnx"))


def manifest_of(stages: Sequence[Stage], kind: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of stages, but for the checksums of files."""
    specs = [
        StageSpec(_file_name(index, kind), stage.inputs, stage.outputs).to_json() for index, stage in enumerate(stages)
    ]
    about = {"format": FORMAT, "format_version": VERSION, "runtime": kind, "versions": _versions(kind)}
    return {**about, **description, "stages": specs}


def _write_stages(stages: Sequence[Stage], kind: str, description: Mapping[str, Any], folder: Path) -> list[Run]:
    """Write all stages and their manifest to an empty folder, and return what runs them."""
    runs = []
    inputs = example_inputs(stages, torch.zeros(2, *description["input_size"]))
    for index, (stage, examples) in enumerate(zip(stages, inputs, strict=True)):
        about = json.dumps({"stage": index, "stages": len(stages)})
        runs.append(write_stage(stage, examples, kind, about, folder / _file_name(index, kind)))
    sha256 = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    content = json.dumps({**manifest_of(stages, kind, description), "sha256": sha256}, indent=2, allow_nan=False)
    (folder / MANIFEST).write_text(content + "\n")
    return runs


def _file_name(stage: int, kind: str) -> str:
    return f"stage-{stage}{SUFFIXES[kind]}"


def _write_nested(network: DecidingExits, description: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write one graph of all stages to a folder, alone in one of its own, and return its path."""
    import onnx

    size = description["input_size"]
    stages = network.cut(size, "onnx", dynamic_batch=False)
    models = []
    for index, (stage, examples) in enumerate(zip(stages, example_inputs(stages, torch.zeros(1, *size)), strict=True)):
        write_stage(stage, examples, "onnx", "", folder / _file_name(index, "onnx"))
        models.append(onnx.load(folder / _file_name(index, "onnx")))
    about = json.dumps({**description, "versions": _versions("onnx")}, indent=2, allow_nan=False)
    config = network.config
    path = folder / "graph" / name
    path.parent.mkdir()
    try:
        model = nest_stages(models, config.thresholds, network.temperatures, about)
        save_model(model, path)
    except Exception as error:  # of onnx, of any kind
        raise ExportError(f"The stages cannot be put into one graph: {first_line(error)}.") from error
    return path


def _check_nested(network: DecidingExits, path: Path, size: Sequence[int]) -> None:
    """Raise ExportError unless one graph gives the answer of each exit where an image leaves there."""
    exits = len(network.config.thresholds)
    images = torch.randn(exits + 1, *size, generator=torch.Generator().manual_seed(0))
    expected, _ = network.answers(images)
    what = f"{network.name}, exported to {NESTED},"
    run = open_nested(path)
    for exit in range(exits + 1):
        # Nobody leaves before this exit, and everybody there.
        thresholds = [network.config.rule_object.always if other == exit else math.inf for other in range(exits)]
        image = images[exit : exit + 1]
        try:
            logits, index = run(image.numpy(), thresholds)
        except Exception as error:  # of the runtime, of any kind
            raise ExportError(f"{what} fails: {first_line(error)}.") from error
        if index.tolist() != [exit]:
            raise ExportError(f"{what} lets an image leave at exit {index.tolist()}, not at {exit}.")
        check_close(
            [torch.from_numpy(logits)], [expected[exit][exit : exit + 1]], f"{what} gives other logits at exit {exit}"
        )


def check_stages(network: DecidingExits, manifest: Manifest, runs: Sequence[Run], format_name: str) -> None:
    """Raise ExportError unless each image, wherever it leaves, gets the network's answer and its confidences."""
    exits = len(manifest.thresholds)
    images = torch.randn(2 * exits + 2, *manifest.image_shape, generator=torch.Generator().manual_seed(0))
    expected, confidences = network.answers(images)
    what = f"{network.name}, exported to {format_name},"
    # Neighbours leave at different exits, so that what is left is no slice of the batch.
    leave_at = torch.arange(len(images)) % (exits + 1)

    def run(stage: int, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        spec = manifest.stages[stage]
        try:
            with torch.no_grad():
                found = runs[stage]([torch.as_tensor(inputs[tensor.name]) for tensor in spec.inputs])
        except Exception as error:  # of the runtime, of any kind
            raise ExportError(f"{what} fails in stage {stage}: {first_line(error)}.") from error
        by_name = dict(zip([tensor.name for tensor in spec.outputs], found, strict=True))
        return [by_name[name].numpy() for name in outputs]

    def leaves(exit: int, confidence: Array, places: Array) -> Array:
        rows = torch.as_tensor(places)
        wanted = confidences[exit][rows]
        # Rounding of the probabilities that it is made of, which are at most 1.
        difference = float((torch.from_numpy(confidence) - wanted).abs().max())
        if not difference <= TOLERANCE * max(1, float(wanted.abs().max())):
            raise ExportError(f"{what} gives other confidences at exit {exit}: they differ by up to {difference:.2g}.")
        return (leave_at[rows] == exit).numpy()

    answer = run_stages(manifest, run, images.numpy(), leaves)
    for exit, logits in enumerate(expected):
        rows = (leave_at == exit).nonzero().squeeze(1)
        check_close(
            [torch.from_numpy(answer.logits)[rows]],
            [logits[rows]],
            f"{what} gives other logits at exit {exit}, where a part of the batch is left",
        )


def _versions(kind: str) -> dict[str, str]:
    packages = ["torch", "timm", *(["onnx", "onnxscript", "onnxruntime"] if kind == "onnx" else [])]
    return {"timm_selfdistill": timm_selfdistill.__version__, **{package: version(package) for package in packages}}


def _is_staged(folder: Path) -> bool:
    """Whether an export of stages wrote a folder."""
    try:
        return Manifest.read(folder) is not None
    except ValueError:
        return False
