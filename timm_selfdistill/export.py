"""Write a network that ends at an exit for use elsewhere: as safetensors, by torch.export, or as ONNX."""

import copy
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from timm_selfdistill.data import InputConfig
from timm_selfdistill.hub import class_names, from_pretrained, is_exported, save_exported
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.truncation import TruncatedModel, truncate

# By format, what its path ends with; safetensors are a folder.
FORMATS: Final = {"safetensors": "", "torch-export": ".pt2", "onnx": ".onnx"}
# Largest difference of the logits, as a share of the largest logit.
TOLERANCE: Final = 1e-4
# The name under which a file holds what a stranger needs to use it.
METADATA: Final = "timm_selfdistill.json"


class ExportError(RuntimeError):
    """A network that torch or ONNX cannot write, or that was not the same once it was written; no file was left."""


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
        label_names: Class names, in the order of the logits; those that were saved with the model by default.
        overwrite: Whether to replace what an earlier export wrote to the path.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is not allowed, the path is taken, or a package that the format needs is missing.
        ExportError: If torch or ONNX cannot write the network, or what was written gives other logits.
    """
    path = Path(path)
    _check_format(format, dynamic_batch)
    _check_path(path, format, overwrite)
    names = class_names(model) if label_names is None else tuple(label_names)
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"{len(names)} label_names for {model.num_classes} classes: give one for each.")
    input = InputConfig.from_model(model.backbone)
    if image_size is not None:
        input = replace(input, image_size=(image_size, image_size) if isinstance(image_size, int) else image_size)
    if format == "safetensors":
        save_exported(model, exit, path, label_names=names, data_config=input.to_timm())
        return path
    small = truncate(model, exit).eval().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    metadata = json.dumps(_describe(model, exit, input, names), indent=2)
    write = _write_onnx if format == "onnx" else _write_torch_export
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
        output = (folder if folder.is_dir() else Path()) / f"exit-{exit}{FORMATS[format]}"
    return export_model(
        model,
        exit,
        output,
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


def _write_torch_export(
    small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
    """Write a network by torch.export, and return what runs the file."""
    program = _trace(small, size, dynamic_batch)
    torch.export.save(program, path, extra_files={METADATA: metadata})
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _write_onnx(
    small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
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


def _save_onnx(
    program: ExportedProgram, dynamic_batch: bool, metadata: str, path: Path, *, optimize: bool
) -> Callable[[Tensor], Tensor]:
    """Write a graph as ONNX, and return what runs the file."""
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
            # The tape of a cut network, which is empty again at the end.
            warnings.filterwarnings("ignore", message=".*certain side effects")
            program = torch.export.export(
                small,
                (images,),
                dynamic_shapes=({0: Dim("batch")},) if dynamic_batch else None,
                # A cut network's forward ends by an exception, which only the strict tracer can follow.
                strict=isinstance(small, TruncatedModel),
            )
    except Exception as error:  # of the tracer or the network, of any kind
        hint = "; it may work without dynamic_batch, for one image at a time" if dynamic_batch else ""
        what = "with a dynamic batch" if dynamic_batch else "at all"
        raise ExportError(f"torch.export cannot trace {_name(small)} {what}: {_first_line(error)}{hint}.") from error
    return _prune(program)


def _prune(program: ExportedProgram) -> ExportedProgram:
    """Remove from a graph the nodes and tensors that its output does not depend on, and where its code stood."""
    graph, signature = program.graph, program.graph_signature
    graph.eliminate_dead_code()
    unused = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    kept = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT or spec.arg.name not in unused]
    for spec in signature.input_specs:
        if spec not in kept:
            graph.erase_node(unused[spec.arg.name])
    for node in graph.nodes:
        # Lines of source files of this machine.
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
                f"{_name(small)}, exported to {format}, fails on a batch of {batch_size}: {_first_line(error)}"
            ) from error
        off = float((found - expected).abs().max())
        # Written so that NaN is a difference.
        if not off <= TOLERANCE * float(expected.abs().max()):
            raise ExportError(
                f"{_name(small)}, exported to {format}, gives other logits for a batch of {batch_size}: they differ by "
                f"up to {off:.2g}, the largest is {float(expected.abs().max()):.2g}."
            )


def _name(small: nn.Module) -> str:
    """Return what messages call a network."""
    if isinstance(small, TruncatedModel):
        return f"{type(small.backbone).__name__}, cut off behind {small.exit_name},"
    return type(small).__name__


def _first_line(error: Exception) -> str:
    """Return the beginning of an error's message; those of torch go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error)).rstrip(".")
