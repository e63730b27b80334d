"""Write a network's graph by torch.export or as ONNX, without what its logits do not depend on."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from timm_selfdistill.export.errors import ExportError, first_line, name_of
from timm_selfdistill.truncation import TruncatedModel

# The name under which a file holds what a stranger needs to use it.
METADATA: Final = "timm_selfdistill.json"


def write_torch_export(
    small: nn.Module, size: tuple[int, ...], dynamic_batch: bool, metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
    """Write a network by torch.export, and return what runs the file."""
    program = _trace(small, size, dynamic_batch)
    torch.export.save(program, path, extra_files={METADATA: metadata})
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def write_onnx(
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
        raise ExportError(f"The network cannot be written as ONNX: {first_line(error)}.") from error
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
        raise ExportError(f"torch.export cannot trace {name_of(small)} {what}: {first_line(error)}{hint}.") from error
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
