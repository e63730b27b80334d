"""Write a network that ends at an exit for use elsewhere: as safetensors, by torch.export, or as ONNX."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import check_finite, class_names, complete_names, from_pretrained, is_exported, save_exported
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.all_exits import ENSEMBLE, AllExits, ExitChoice, check_choice
from timm_selfdistill.program import ReportedError
from timm_selfdistill.truncation import TruncatedModel, truncate

FORMATS: Final = {"safetensors": "", "torch-export": ".pt2", "onnx": ".onnx"}
"""By format, what its path ends with; safetensors are a folder."""

METADATA: Final = "timm_selfdistill.json"
"""The name under which a graph's file holds what is needed to use it."""

Run = Callable[[Tensor], Tensor]
_TOLERANCE: Final = 1e-4  # largest difference of the logits, as a share of the largest logit


class ExportError(ReportedError):
    """A network that torch or ONNX cannot write, or that gave other logits once it was written; no file was left."""


def export_model(
    model: SelfDistillModel,
    exit: ExitChoice,
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
            "ensemble": it then runs all exits, and combines them as `model.ensemble` says.
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
    _check_format(format, dynamic_batch, exit)
    check_choice(model, exit)
    _check_path(path, format, overwrite)
    names = class_names(model) if label_names is None else complete_names(label_names, model.num_classes)
    check_finite(model)
    config = InputConfig.from_model(model.backbone)
    if image_size is not None:
        config = replace(config, image_size=(image_size, image_size) if isinstance(image_size, int) else image_size)
    if format == "safetensors":
        assert isinstance(exit, int)
        save_exported(model, exit, path, label_names=names, data_config=config.to_timm())
        return path
    small = AllExits(copy.deepcopy(model)) if isinstance(exit, str) else truncate(model, exit)
    small = small.eval().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    named = getattr(model.backbone, "pretrained_cfg", {})
    description = {
        "architecture": named.get("architecture", type(model.backbone).__name__),
        "exit": exit,
        "exit_name": model.ensemble.title if isinstance(exit, str) else model.exit_names[exit],
        "num_classes": model.num_classes,
        "label_names": None if names is None else list(names),
        **config.to_timm(),
    }
    metadata = json.dumps(description, indent=2)
    size = (config.channels, *config.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        # Under its final name: both formats write names of files into the file.
        staged = Path(folder) / path.name
        write = _write_onnx if format == "onnx" else _write_torch_export
        run = write(small, size, dynamic_batch, metadata, staged)
        _check_logits(run, small, size, dynamic_batch, format)
        # Weights that ONNX keeps in a separate file come before the graph that names it.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == staged):
            os.replace(file, path.parent / file.name)
    return path


def export_folder(
    source: str | Path,
    exit: ExitChoice | None = None,
    output: Path | None = None,
    *,
    format: str,
    dynamic_batch: bool = False,
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
    default_folder: str | Path | None = None,
) -> Path:
    """Write a saved model, of a run's folder, a model folder or a repository on the Hub, as `export_model` does.

    By default, the backbone's own classifier is written, to "exit-K" ("ensemble" for all exits) and the format's ending
    in the folder, or in `default_folder`; for a repository, in the working directory.
    """
    _check_format(format, dynamic_batch, exit)  # before the model is loaded
    folder = Path(source)
    model = from_pretrained(folder / "model" if (folder / "model").is_dir() else source)
    choice = model.num_exits if exit is None else exit
    if output is None:
        beside = folder if default_folder is None else Path(default_folder)
        name = choice if isinstance(choice, str) else f"exit-{choice}"
        output = (beside if beside.is_dir() else Path()) / f"{name}{FORMATS[format]}"
    return export_model(
        model,
        choice,
        output.expanduser(),
        format=format,
        dynamic_batch=dynamic_batch,
        image_size=image_size,
        overwrite=overwrite,
    )


def _check_format(name: str, dynamic_batch: bool, exit: ExitChoice | None) -> None:
    if name not in FORMATS:
        raise ValueError(f"There is no format {name!r}; allowed are {', '.join(FORMATS)}.")
    if name == "safetensors" and dynamic_batch:
        raise ValueError("safetensors hold weights, which fit batches of any size: leave out dynamic_batch.")
    if name == "safetensors" and exit == ENSEMBLE:
        raise ValueError("safetensors hold one exit; allowed for the ensemble are torch-export and onnx.")
    if name == "onnx":
        missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
        if missing:
            raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'timm_selfdistill[onnx]'.")


def _check_path(path: Path, format_name: str, overwrite: bool) -> None:
    """Raise ValueError unless the path suits the format, and is free or may be overwritten."""
    suffix = FORMATS[format_name]
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path} must end with {suffix} for the format {format_name}.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only with overwrite=True (--force).")
    if suffix and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, so it is not replaced.")
    if not suffix and path.exists() and not is_exported(path):
        raise ValueError(f"{path} was not written by an export, so nothing is written there.")


def _write_torch_export(small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, metadata: str, path: Path) -> Run:
    """Write a network by torch.export, and return what runs the file."""
    torch.export.save(_trace(small, size, dynamic_batch), path, extra_files={METADATA: metadata})
    return torch.export.load(path).module()


def _write_onnx(small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, metadata: str, path: Path) -> Run:
    """Write a network as ONNX, and return what runs the file."""
    plain = copy.deepcopy(small)
    for module in plain.modules():
        # torch.onnx fails on the strides of some fused attention (BEiT's), and writes out its parts in any case.
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]  # no tensor and no module
    program = _trace(plain, size, dynamic_batch)
    try:
        return _save_onnx(program, dynamic_batch, metadata, path, optimize=True)
    except ExportError:
        # The optimizer of torch.onnx breaks some graphs (Gemma4's).
        return _save_onnx(program, dynamic_batch, metadata, path, optimize=False)


def _save_onnx(program: ExportedProgram, dynamic_batch: bool, metadata: str, path: Path, *, optimize: bool) -> Run:
    import onnxruntime

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
                optimize=optimize,
                verbose=False,
            )
        assert onnx_program is not None
        onnx_program.model.metadata_props[METADATA] = metadata
        onnx_program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # those of torch.onnx and ONNX Runtime have no other common base
        raise ExportError(f"The network cannot be written as ONNX: {_first_line(error)}.") from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _trace(small: nn.Module, size: tuple[int, ...], dynamic_batch: bool) -> ExportedProgram:
    """Return the graph of a network, without what its logits do not depend on."""
    images = torch.zeros(2 if dynamic_batch else 1, *size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The hooks of a cut network record, and have forgotten it at the end.
            warnings.filterwarnings("ignore", message=".*certain side effects")
            program = torch.export.export(
                small,
                (images,),
                dynamic_shapes=({0: Dim("batch")},) if dynamic_batch else None,
                # A cut network's forward ends by an exception, which only the strict tracer can follow.
                strict=isinstance(small, TruncatedModel),
            )
    except Exception as error:  # of the tracer or the network, of any kind
        how, hint = "at all", ""
        if dynamic_batch:
            how, hint = "with a dynamic batch", "; it may work without dynamic_batch, for one image at a time"
        raise ExportError(f"torch.export cannot trace {_name_of(small)} {how}: {_first_line(error)}{hint}.") from error
    return _prune(program)


def _prune(program: ExportedProgram) -> ExportedProgram:
    """Remove from a graph the nodes and tensors that its output does not depend on, and the names of source files."""
    graph, signature = program.graph, program.graph_signature
    graph.eliminate_dead_code()
    unused = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    kept = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT or spec.arg.name not in unused]
    for spec in signature.input_specs:
        if spec not in kept:
            graph.erase_node(unused[spec.arg.name])
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    targets = {spec.target for spec in kept}
    return ExportedProgram(
        program.graph_module,
        graph,
        ExportGraphSignature(kept, signature.output_specs),
        {name: tensor for name, tensor in program.state_dict.items() if name in targets},
        program.range_constraints,
        program.module_call_graph,
        # Without example inputs, torch.export.save writes nothing that would be unpickled.
        example_inputs=None,
        constants={name: value for name, value in program.constants.items() if name in targets},
        verifiers=program.verifiers,
    )


def _check_logits(run: Run, small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, format_name: str) -> None:
    """Raise ExportError unless what was written gives a network's logits for random images."""
    generator = torch.Generator().manual_seed(0)
    written = f"{_name_of(small)}, exported to {format_name},"
    for batch_size in (1, 3) if dynamic_batch else (1,):
        images = torch.randn(batch_size, *size, generator=generator)
        with torch.no_grad():
            expected = small(images)
            try:
                found = run(images)
            except Exception as error:  # of the runtime, of any kind
                raise ExportError(f"{written} fails on a batch of {batch_size}: {_first_line(error)}") from error
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= _TOLERANCE * largest:  # so that NaN is a difference
            raise ExportError(
                f"{written} gives other logits for a batch of {batch_size}: they differ by up to {difference:.2g}, the "
                f"largest is {largest:.2g}."
            )


def _name_of(small: nn.Module) -> str:
    if isinstance(small, AllExits):
        return f"{type(small.model.backbone).__name__} with all its exits"
    if isinstance(small, TruncatedModel):
        return f"{type(small.backbone).__name__} (cut off after {small.exit_name})"
    return type(small).__name__


def _first_line(error: Exception) -> str:
    """Return the beginning of an error's message; those of torch go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error)).rstrip(".")
