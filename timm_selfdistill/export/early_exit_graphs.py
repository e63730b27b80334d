"""Write a network with early exit: a graph for each stage and a manifest, or one graph that stops early by itself."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import timm_selfdistill
from timm_selfdistill import staged
from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig, RuleState
from timm_selfdistill.export import graphs
from timm_selfdistill.export.graph_cuts import Stage, cut
from timm_selfdistill.export.graphs import TOLERANCE, ExportError
from timm_selfdistill.export.onnx_stages import check_nested, check_quantization, quantize_stages, write_nested
from timm_selfdistill.hub import check_weights
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import EachExit
from timm_selfdistill.staged import Array, Manifest

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
            weight is not a finite number.
        ExportError: If torch or ONNX cannot write the network, it cannot be cut into stages, or what was written gives
            other answers.
    """
    path = Path(path)
    check_early_exit_format(format)
    calibration = None if calibration_images is None else calibration_images.detach().cpu().float().numpy()
    check_quantization(quantize, format, calibration)
    graphs.check_path(path, EARLY_EXIT_FORMATS[format], format, overwrite, _is_staged)
    check_weights(network.model)
    kind = _STAGES.get(format, "onnx")
    description = describe_early_exit(network, image_size, label_names)
    size = description["input_size"]
    deciding = DecidingExits(copy.deepcopy(network.model), network.config, own=format == "onnx-stages")
    graphs.as_exported(deciding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        written = Path(folder) / "stages"
        written.mkdir()
        stages = deciding.cut(size, kind, dynamic_batch=format != NESTED)
        runs = _write_stages(stages, torch.zeros(1 if format == NESTED else 2, *size), kind, written)
        if format == NESTED:
            alone = Path(folder) / "graph" / path.name
            about = json.dumps({**description, "versions": _versions(kind)}, indent=2, allow_nan=False)
            files = [written / _file_name(index, kind) for index in range(len(stages))]
            write_nested(files, alone, deciding.config.thresholds, deciding.temperatures, about)
            images = _random_images(len(stages), size)
            what = f"{deciding.name}, exported to {format},"
            check_nested(alone, images, deciding.answers(images)[0], deciding.config.rule_object.always, what)
            graphs.move_files(alone, path)
            return path
        sha256 = {file.name: staged.sha256_of(file) for file in sorted(written.iterdir())}
        content = {**manifest_of(stages, kind, description), "sha256": sha256}
        (written / staged.MANIFEST).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        check_stages(deciding, Manifest.read(written), runs, format)
        if quantize is not None:
            quantize_stages(written, quantize, calibration)
        if path.exists():
            os.rename(path, Path(folder) / "replaced")
        os.rename(written, path)
    return path


def check_early_exit_format(name: str) -> None:
    """Raise ValueError unless there is such a format, and the packages that it needs are there."""
    if name not in EARLY_EXIT_FORMATS:
        raise ValueError(f"There is no format {name!r} for early exit; allowed are {', '.join(EARLY_EXIT_FORMATS)}.")
    graphs.check_packages(_STAGES.get(name, "onnx"))


class DecidingExits(nn.Module):
    """A wrapped model with what every exit answers, and how confident it is, as early exit takes them.

    With `own`, exits that answer with an ensemble also give their own logits, which calibration needs.
    """

    def __init__(self, model: SelfDistillModel, config: EarlyExitConfig, *, own: bool = False) -> None:
        super().__init__()
        self.training = model.training
        self.exits = EachExit(model)
        self.config = config
        self.name = type(model.backbone).__name__
        self.temperatures = config.temperatures or (1.0,) * model.num_exits
        self._own = (staged.OWN_LOGITS,) if own and config.combines else ()

    def forward(self, images: Tensor, temperatures: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, C, H, W] and temperatures [K] to logits [B, num_classes] and confidence [B] of each exit.

        They take turns: logits, confidence and own logits of exit 0, of exit 1, and so on; the last are the fallback's.
        """
        ensemble = self.exits.model.ensemble
        every = self.exits(images)
        outputs: list[Tensor] = []
        state: RuleState = ()
        for exit in range(len(temperatures)):
            logits = ensemble.prefix(exit)(every[: exit + 1]) if self.config.running_ensemble else every[exit]
            confidence, state = self.config.rule_object.confidence(logits / temperatures[exit], state)
            outputs += [logits, torch.where(_is_valid(logits), confidence, math.nan)]
            outputs += [every[exit] for _ in self._own]
        last = ensemble(every) if self.config.fallback == "ensemble" else every[-1]
        return (*outputs, last, *(every[-1] for _ in self._own))

    def cut(self, size: Sequence[int], kind: str, *, dynamic_batch: bool) -> list[Stage]:
        """Trace it for images [C, H, W] and cut it into stages, for batches of any size or for one image."""
        exits = self.exits.model.num_exits
        inputs = (staged.IMAGES, staged.TEMPERATURES)
        outputs = [(staged.LOGITS, staged.CONFIDENCE, *self._own)] * exits + [(staged.LOGITS, *self._own)]
        flat = tuple(name for names in outputs for name in names)
        examples = [torch.zeros(2 if dynamic_batch else 1, *size), torch.ones(exits)]
        interface = graphs.Interface(inputs, flat, (dynamic_batch, False))
        program = graphs.trace(graphs.copy_to_trace(self, kind), examples, interface)
        return cut(program, inputs, outputs, self.exits.model.exit_names)

    def answers(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits and confidences of all exits, by the settings' own temperatures."""
        with torch.no_grad():
            outputs = self(images, torch.tensor(self.temperatures))
        step, exits = 2 + len(self._own), self.exits.model.num_exits
        return list(outputs[::step]), list(outputs[1 : step * exits : step])


def describe_early_exit(
    network: EarlyExit, image_size: int | tuple[int, int] | None, label_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return what is written beside the graphs of a network; the arguments are those of `export_early_exit`."""
    model, rule = network.model, network.config.rule_object
    return {
        **graphs.describe(model, label_names, graphs.input_config(model, image_size)),
        "exit_names": list(model.exit_names),
        "early_exit": replace(network.config, costs=None).to_json(),  # those of torch
        "rule_range": [rule.always, None if rule.highest == math.inf else rule.highest],
        "ensemble": model.ensemble.to_json(),
    }


def manifest_of(stages: Sequence[Stage], kind: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of stages, but for the checksums of files."""
    specs = []
    for index, stage in enumerate(stages):
        specs.append(staged.StageSpec(_file_name(index, kind), stage.inputs, stage.outputs).to_json())
    about = {"format": staged.FORMAT, "format_version": staged.VERSION, "runtime": kind, "versions": _versions(kind)}
    return {**about, **description, "stages": specs}


def check_stages(network: DecidingExits, manifest: Manifest, runs: Sequence[graphs.Run], format_name: str) -> None:
    """Raise ExportError unless each image, wherever it leaves, gets the network's answer and its confidences."""
    exits = len(manifest.thresholds)
    images = _random_images(2 * exits + 2, manifest.image_shape)
    expected, confidences = network.answers(images)
    what = f"{network.name}, exported to {format_name},"
    # Neighbours leave at different exits, so that what is left is no slice of the batch.
    leave_at = torch.arange(len(images)) % (exits + 1)

    def run(stage: int, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        spec = manifest.stages[stage]
        try:
            with torch.no_grad():
                found = runs[stage]([torch.as_tensor(inputs[name]) for name in spec.input_names])
        except Exception as error:  # of the runtime, of any kind
            raise ExportError(f"{what} fails in stage {stage}: {graphs.first_line(error)}.") from error
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

    found = torch.from_numpy(staged.run_stages(manifest, run, images.numpy(), leaves).logits)
    for exit, logits in enumerate(expected):
        rows = (leave_at == exit).nonzero().squeeze(1)
        where = f"at exit {exit}, where a part of the batch is left"
        graphs.check_close([found[rows]], [logits[rows]], f"{what} gives other logits {where}")


def _write_stages(stages: Sequence[Stage], images: Tensor, kind: str, folder: Path) -> list[graphs.Run]:
    """Write all stages to a folder, as they run on these images, and return what runs them."""
    runs = []
    held = {staged.IMAGES: images, staged.TEMPERATURES: torch.ones(len(stages) - 1)}
    for index, stage in enumerate(stages):
        examples = [held[tensor.name] for tensor in stage.inputs]
        with torch.no_grad():
            found = stage.network(*examples)
        held |= {tensor.name: value.contiguous() for tensor, value in zip(stage.outputs, found, strict=True)}
        interface = graphs.Interface(
            tuple(tensor.name for tensor in stage.inputs),
            tuple(tensor.name for tensor in stage.outputs),
            tuple(tensor.batched for tensor in stage.inputs),
        )
        program = graphs.trace(stage.network, examples, interface)
        about = json.dumps({"stage": index, "stages": len(stages)})
        runs.append(graphs.write_graph(program, interface, kind, about, folder / _file_name(index, kind)))
    return runs


def _file_name(stage: int, kind: str) -> str:
    return f"stage-{stage}{graphs.SUFFIXES[kind]}"


def _random_images(count: int, size: Sequence[int]) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _is_valid(logits: Tensor) -> Tensor:
    """Whether images may leave by these logits [B, C]: none is NaN, and the largest is finite.

    Runtimes do not agree on what the largest of NaNs is, but on comparisons with them: NaN is taken for infinity first.
    """
    limit = torch.finfo(logits.dtype).max
    return torch.where(logits <= limit, logits, math.inf).amax(-1).abs() <= limit


def _versions(kind: str) -> dict[str, str]:
    packages = ["torch", "timm", *(["onnx", "onnxscript", "onnxruntime"] if kind == "onnx" else [])]
    return {"timm_selfdistill": timm_selfdistill.__version__, **{package: version(package) for package in packages}}


def _is_staged(folder: Path) -> bool:
    """Whether an export of stages wrote a folder."""
    try:
        return Manifest.read(folder) is not None
    except ValueError:
        return False
