"""What is made of stages that were written as ONNX: one graph that stops early by itself, or stages in int8."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from timm_selfdistill import staged
from timm_selfdistill.export import graphs
from timm_selfdistill.export.graphs import METADATA, ExportError, check_close, first_line
from timm_selfdistill.onnx import OnnxEarlyExit
from timm_selfdistill.staged import Array, Manifest

if TYPE_CHECKING:  # an optional dependency
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

_QUANTIZERS: Final = ("dynamic", "static")
_THRESHOLDS: Final = "thresholds"
_EXIT_INDEX: Final = "exit_index"


def write_nested(
    stages: Sequence[Path], path: Path, thresholds: Sequence[float], temperatures: Sequence[float], metadata: str
) -> None:
    """Write one graph that runs stage after stage, each in a branch of the one before it, until a confidence is enough.

    Inputs are `images` [1, C, H, W] and `thresholds` [K], by default those given here; outputs are `logits`
    [1, num_classes] and `exit_index` [1], int64. The graph is alone in a new folder, with its weights in a second file
    above 2 GB.
    """
    import onnx

    path.parent.mkdir()
    try:
        model = _nest([onnx.load(stage) for stage in stages], thresholds, temperatures, metadata)
        size = sum(len(tensor.raw_data) for graph in _graphs(model.graph) for tensor in graph.initializer)
        large = size > graphs.LARGEST_FILE
        onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # of onnx, of any kind
        raise ExportError(f"The stages cannot be put into one graph: {first_line(error)}.") from error


def check_nested(path: Path, images: Tensor, expected: Sequence[Tensor], always: float, what: str) -> None:
    """Raise ExportError unless one graph lets image k leave at exit k, where it is told to, with that exit's logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the thresholds are an input
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for exit, logits in enumerate(expected):
        # Nobody leaves before this exit, and everybody there.
        thresholds = [always if other == exit else math.inf for other in range(len(expected) - 1)]
        given = {staged.IMAGES: images[exit : exit + 1].numpy(), _THRESHOLDS: np.array(thresholds, np.float32)}
        try:
            found, index = session.run([staged.LOGITS, _EXIT_INDEX], given)
        except Exception as error:  # of the runtime, of any kind
            raise ExportError(f"{what} fails: {first_line(error)}.") from error
        if index.tolist() != [exit]:
            raise ExportError(f"{what} lets an image leave at exit {index.tolist()}, not at {exit}.")
        rows = logits[exit : exit + 1]
        check_close([torch.from_numpy(found)], [rows], f"{what} gives other logits at exit {exit}")


def check_quantization(mode: str | None, format_name: str, images: Sized | None) -> None:
    """Raise ValueError unless stages of this format can be quantised in this way, None for not at all."""
    if mode is not None and mode not in _QUANTIZERS:
        raise ValueError(f"quantize is {mode!r:.100}; allowed are {', '.join(_QUANTIZERS)}.")
    if mode is not None and format_name != "onnx-stages":
        raise ValueError(f"{format_name} cannot be quantised; allowed is onnx-stages.")
    if (mode == "static") != (images is not None and len(images) > 0):
        raise ValueError("calibration_images belong to quantize='static', which sets the range of each tensor by them.")


def quantize_stages(folder: Path, mode: str, images: Array | None) -> None:
    """Replace the graphs of a folder by graphs in int8, whose classifiers and rules stay in float32.

    The range of a tensor is that of the batch ("dynamic") or of all images [N, C, H, W] ("static"), so that whole
    chains of operations run in int8. ExportError if ONNX Runtime cannot quantise a stage, or run it then.
    """
    manifest = Manifest.read(folder)
    inputs = _inputs(folder, images) if images is not None else [[] for _ in manifest.stages]
    try:
        for stage, given in zip(manifest.stages, inputs, strict=True):
            _quantize(folder / stage.file, mode, given)
        files = sorted(path for path in folder.iterdir() if path.name != staged.MANIFEST)
        sha256 = {path.name: staged.sha256_of(path) for path in files}
        about = {"mode": mode, "images": 0 if images is None else len(images)}
        content = {**manifest.content, "quantized": about, "sha256": sha256}
        (folder / staged.MANIFEST).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        trial = np.random.default_rng(0).standard_normal((3, *manifest.image_shape), np.float32)
        answers = OnnxEarlyExit(folder).every_exit(trial)
    except Exception as error:  # of onnxruntime, of any kind
        raise ExportError(f"The stages cannot be quantised ({mode}): {first_line(error)}.") from error
    if not np.isfinite(answers).all():
        raise ExportError(f"The quantised stages ({mode}) give logits that are not numbers.")


def _nest(
    stages: Sequence["ModelProto"], thresholds: Sequence[float], temperatures: Sequence[float], metadata: str
) -> "ModelProto":
    """Return one graph of the K + 1 stages for one image, which are changed."""
    from onnx import TensorProto, helper, inliner, numpy_helper

    stages = [inliner.inline_local_functions(stage) if stage.functions else stage for stage in stages]
    graph = _branch([stage.graph for stage in stages], 0)
    first = stages[0]
    defaults = np.array(thresholds, np.float32)
    # An initializer that is an input too is its default.
    graph.input.append(helper.make_tensor_value_info(_THRESHOLDS, TensorProto.FLOAT, defaults.shape))
    graph.initializer.append(numpy_helper.from_array(defaults, _THRESHOLDS))
    graph.initializer.append(numpy_helper.from_array(np.array(temperatures, np.float32), staged.TEMPERATURES))
    graph.input.insert(0, next(value for value in first.graph.input if value.name == staged.IMAGES))
    opsets = {opset.domain: opset.version for stage in stages for opset in stage.opset_import}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, number) for domain, number in opsets.items()],
        ir_version=first.ir_version,
        producer_name="timm_selfdistill",
    )
    helper.set_model_props(model, {METADATA: metadata})
    return model


def _branch(stages: Sequence["GraphProto"], index: int) -> "GraphProto":
    """Return the graph of a stage and, in a branch of it, of those after it; without its inputs."""
    from onnx import TensorProto, helper

    stage = stages[index]
    shared = {value.name for other in stages for value in (*other.input, *other.output)}
    shared = (shared | {staged.IMAGES, staged.TEMPERATURES}) - {staged.LOGITS, staged.CONFIDENCE}
    _rename(stage, lambda name: name if name in shared else f"stage{index}/{name}")
    of_stage = {value.name.removeprefix(f"stage{index}/"): value for value in stage.output}
    logits = of_stage[staged.LOGITS]
    classes = [size.dim_value for size in logits.type.tensor_type.shape.dim]

    def answer(ending: str) -> list["ValueInfoProto"]:
        # What an output of the whole graph is called at a stage.
        ending = ending if index == 0 else f"/{index}{ending}"
        return [
            helper.make_tensor_value_info(f"{staged.LOGITS}{ending}", TensorProto.FLOAT, classes),
            helper.make_tensor_value_info(f"{_EXIT_INDEX}{ending}", TensorProto.INT64, [1]),
        ]

    outputs, left = answer(""), answer("/left")
    nodes = list(stage.node)
    if index == len(stages) - 1:
        nodes += _answer(logits.name, index, outputs)
    else:
        nodes += _decide(of_stage[staged.CONFIDENCE].name, index)
        nodes.append(
            helper.make_node(
                "If",
                [f"stage{index}/leaves"],
                [value.name for value in outputs],
                name=f"stage{index}/if",
                then_branch=helper.make_graph(_answer(logits.name, index, left), f"exit{index}", [], left),
                else_branch=_branch(stages, index + 1),
            )
        )
    graph: GraphProto = helper.make_graph(nodes, f"stage{index}", [], outputs, initializer=stage.initializer)
    return graph


def _decide(confidence: str, index: int) -> list["NodeProto"]:
    """Return the nodes that compute whether the image leaves: never where the confidence is NaN or infinite."""
    from onnx import helper, numpy_helper

    def name(what: str) -> str:
        return f"stage{index}/{what}"

    def constant(what: str, value: Any) -> "NodeProto":
        return helper.make_node("Constant", [], [name(what)], name=name(what), value=numpy_helper.from_array(value))

    def node(kind: str, inputs: Sequence[str], what: str) -> "NodeProto":
        return helper.make_node(kind, list(inputs), [name(what)], name=name(what))

    return [
        constant("place", np.array([index], np.int64)),
        constant("infinity", np.array([np.inf], np.float32)),
        node("Gather", [_THRESHOLDS, name("place")], "any_threshold"),
        node("CastLike", [name("any_threshold"), confidence], "threshold"),
        node("CastLike", [name("infinity"), confidence], "limit"),
        node("GreaterOrEqual", [confidence, name("threshold")], "reaches"),
        node("Less", [confidence, name("limit")], "is_finite"),
        node("And", [name("reaches"), name("is_finite")], "leaves"),
    ]


def _answer(logits: str, index: int, outputs: Sequence["ValueInfoProto"]) -> list["NodeProto"]:
    """Return the nodes that give an exit's logits and its index."""
    from onnx import helper, numpy_helper

    named, numbered = (value.name for value in outputs)
    value = numpy_helper.from_array(np.array([index], np.int64))
    return [
        helper.make_node("Identity", [logits], [named], name=named),
        helper.make_node("Constant", [], [numbered], name=numbered, value=value),
    ]


def _rename(graph: "GraphProto", new: Callable[[str], str]) -> None:
    """Give the values and nodes of a graph, and of the graphs in it, other names."""
    for part in _graphs(graph):
        for values in (part.input, part.output, part.initializer, part.value_info):
            for value in values:
                value.name = new(value.name)
        for node in part.node:
            node.name = new(node.name)
            for names in (node.input, node.output):
                names[:] = [new(name) if name else name for name in names]


def _graphs(graph: "GraphProto") -> Iterator["GraphProto"]:
    """Yield a graph and all that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _inputs(folder: Path, images: Array) -> list[list[dict[str, Array]]]:
    """Return, for each stage, its inputs for images, one after the other, as the stages before it give them."""
    network = OnnxEarlyExit(folder)
    seen: list[list[dict[str, Array]]] = [[] for _ in network.manifest["stages"]]
    for image in np.split(images, len(images)):
        for stage, given in enumerate(network.stage_inputs(image)):
            seen[stage].append(given)
    return seen


def _quantize(path: Path, mode: str, given: Sequence[Mapping[str, Array]]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # without types
        rows = iter(given)

        def get_next(self) -> Any:
            return next(self.rows, None)

    kept = _of_answer(onnx.load(path, load_external_data=False).graph)
    weights = path.with_name(f"{path.name}.data")  # of a large graph
    quantized = path.parent / "quantized" / path.name
    quantized.parent.mkdir()
    large = {"use_external_data_format": weights.exists()}
    if mode == "dynamic":
        # ONNX Runtime has convolutions of uint8 weights only.
        quantize_dynamic(path, quantized, weight_type=QuantType.QUInt8, nodes_to_exclude=kept, **large)
    else:
        quantize_static(
            path,
            quantized,
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=kept,
            **large,
        )
    weights.unlink(missing_ok=True)
    for file in quantized.parent.iterdir():
        file.replace(path.parent / file.name)
    quantized.parent.rmdir()


def _of_answer(graph: "GraphProto") -> list[str]:
    """Return the names of the nodes that give an exit's logits, and of those after them."""
    reached = {staged.LOGITS, staged.OWN_LOGITS}
    names = []
    for node in graph.node:
        if not reached.isdisjoint([*node.input, *node.output]):
            reached.update(node.output)
            names.append(node.name)
    return names
