"""Trace a network, write its graph to a file that is read again and run, and say what the file holds."""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import class_names, complete_names
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import AllExits, EachExit
from timm_selfdistill.program import ReportedError
from timm_selfdistill.truncation import TruncatedModel

METADATA: Final = "timm_selfdistill.json"
"""The name under which a graph's file holds what is needed to use it."""

LARGEST_FILE: int = 1_500_000_000
"""Bytes of weights from which an ONNX graph keeps them in a second file: protobuf takes no message above 2 GiB."""

SUFFIXES: Final = {"onnx": ".onnx", "torch-export": ".pt2"}
"""By kind of graph, what the names of its files end with."""

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
TOLERANCE: Final = 1e-4  # largest difference of the logits, as a share of the largest logit


class ExportError(ReportedError):
    """A network that torch or ONNX cannot write, or that gave other logits once it was written; no file was left."""


@dataclass(frozen=True)
class Interface:
    """Names of a graph's inputs and outputs, and which inputs have a first dimension of any size, the same for all."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: tuple[bool, ...]

    @property
    def dynamic(self) -> bool:
        """Whether the graph takes batches of any size."""
        return any(self.batched)

    def dynamic_shapes(self, batch: object) -> tuple[dict[int, object] | None, ...] | None:
        """Return what torch is told about the shapes of the inputs: `batch` for each first dimension of any size."""
        return tuple({0: batch} if each else None for each in self.batched) if self.dynamic else None


def check_packages(kind: str) -> None:
    """Raise ValueError if a package is missing that graphs of this kind need."""
    if kind == "onnx":
        missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
        if missing:
            raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'timm_selfdistill[onnx]'.")


def check_path(path: Path, suffix: str, format_name: str, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise ValueError unless a path ends as its format wants, "" for a folder, and is free or may be overwritten."""
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path} must end with {suffix} for the format {format_name}.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; it is replaced only with overwrite=True (--force).")
    if suffix and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, so it is not replaced.")
    if not suffix and path.exists() and not is_ours(path):
        raise ValueError(f"{path} was not written by an export, so nothing is written there.")


def input_config(model: SelfDistillModel, image_size: int | tuple[int, int] | None) -> InputConfig:
    """Return how a model's images are prepared, of this size where one is given."""
    config = InputConfig.from_model(model.backbone)
    if image_size is None:
        return config
    return replace(config, image_size=(image_size, image_size) if isinstance(image_size, int) else image_size)


def describe(model: SelfDistillModel, label_names: Sequence[str] | None, config: InputConfig) -> dict[str, Any]:
    """Return what is written beside a graph: what it was made of, its classes, and how images are prepared."""
    names = class_names(model) if label_names is None else complete_names(label_names, model.num_classes)
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


def copy_to_trace(network: nn.Module, kind: str) -> nn.Module:
    """Return a copy of a network, in which tracing may leave something, as its graph is to be."""
    network = copy.deepcopy(network)
    if kind == "onnx":
        # torch.onnx fails on the strides of some fused attention (BEiT's), and writes out its parts in any case.
        for module in network.modules():
            if getattr(module, "fused_attn", False):
                module.fused_attn = False  # type: ignore[assignment]  # no tensor and no module
    return network


def trace(network: nn.Module, examples: Sequence[Tensor], interface: Interface) -> ExportedProgram:
    """Return the graph of a network in eval mode, without what its outputs do not depend on.

    There is an example of each input; of those of any size, a batch of two.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The hooks of a cut network record, and have forgotten it at the end.
            warnings.filterwarnings("ignore", message=".*certain side effects")
            program = torch.export.export(
                network,
                tuple(examples),
                dynamic_shapes=interface.dynamic_shapes(Dim("batch")),
                # Only the strict tracer, which is several times slower, can follow the exception that ends a forward.
                strict=isinstance(network, TruncatedModel) and not network.ends_by_itself,
            )
    except Exception as error:  # of the tracer or the network, of any kind
        how, hint = "at all", ""
        if interface.dynamic:
            how, hint = "with a dynamic batch", "; it may work without dynamic_batch, for one image at a time"
        raise ExportError(f"torch.export cannot trace {name_of(network)} {how}: {first_line(error)}{hint}.") from error
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


def write_graph(program: ExportedProgram, interface: Interface, kind: str, metadata: str, path: Path) -> Run:
    """Write a graph, "onnx" or "torch-export", to a file, and return what runs the file."""
    if kind == "torch-export":
        torch.export.save(program, path, extra_files={METADATA: metadata})
        network = torch.export.load(path).module()
        return lambda inputs: _flat(network(*inputs))
    try:
        return _save_onnx(program, interface, metadata, path, optimize=True)
    except ExportError:
        # The optimizer of torch.onnx breaks some graphs (Gemma4's).
        return _save_onnx(program, interface, metadata, path, optimize=False)


def _save_onnx(program: ExportedProgram, interface: Interface, metadata: str, path: Path, *, optimize: bool) -> Run:
    import onnxruntime

    noisy = logging.getLogger("onnx_ir")  # of what its optimizer leaves as it is
    level = noisy.level
    try:
        noisy.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=interface.inputs,
                output_names=interface.outputs,
                dynamic_shapes=interface.dynamic_shapes("batch"),
                optimize=optimize,
                verbose=False,
            )
        assert onnx_program is not None
        onnx_program.model.metadata_props[METADATA] = metadata
        tensors = [*program.state_dict.values(), *program.constants.values()]
        size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        onnx_program.save(path, external_data=size > LARGEST_FILE)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # those of torch.onnx and ONNX Runtime have no other common base
        raise ExportError(f"The network cannot be written as ONNX: {first_line(error)}.") from error
    finally:
        noisy.setLevel(level)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(interface.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(interface.outputs), given)]

    return run


def check_run(run: Run, network: nn.Module, batches: Iterable[Tensor], format_name: str) -> None:
    """Raise ExportError unless what was written gives a network's logits for batches of images."""
    written = f"{name_of(network)}, exported to {format_name},"
    for images in batches:
        with torch.no_grad():
            expected = _flat(network(images))
            try:
                found = run([images])
            except Exception as error:  # of the runtime, of any kind
                raise ExportError(f"{written} fails on a batch of {len(images)}: {first_line(error)}") from error
        check_close(found, expected, f"{written} gives other logits for a batch of {len(images)}")


def check_close(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raise ExportError, which begins with `what`, unless logits are those of the network."""
    for written, logits in zip(found, expected, strict=True):
        difference, largest = float((written - logits).abs().max()), float(logits.abs().max())
        if not difference <= TOLERANCE * largest:  # so that NaN is a difference
            raise ExportError(f"{what}: they differ by up to {difference:.2g}, the largest is {largest:.2g}.")


def move_files(staged: Path, path: Path) -> None:
    """Move a graph from a folder of its own to its path, with the weights that ONNX keeps beside it, or without them
    in place of a graph that had some.
    """
    replaces = path.exists()
    weights = f"{path.name}.data"
    is_large = (staged.parent / weights).exists()
    # The graph, which names them, comes last.
    for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
        os.replace(file, path.parent / file.name)
    if replaces and not is_large:
        (path.parent / weights).unlink(missing_ok=True)


def name_of(network: nn.Module) -> str:
    """Return what a network is called in messages."""
    if isinstance(network, AllExits | EachExit):
        return f"{type(network.model.backbone).__name__} with all its exits"
    if isinstance(network, TruncatedModel):
        return f"{type(network.backbone).__name__} (cut off after {network.exit_name})"
    return type(network).__name__


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message; those of torch go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error)).rstrip(".")


def _flat(output: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (output,) if isinstance(output, Tensor) else output
