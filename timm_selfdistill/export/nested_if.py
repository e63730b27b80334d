"""One ONNX graph for one image that stops early by itself: each stage stands in a branch of the stage before it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from timm_selfdistill.export import graphs
from timm_selfdistill.export.graphs import METADATA
from timm_selfdistill.staged import CONFIDENCE, IMAGES, LOGITS, TEMPERATURES, Array

if TYPE_CHECKING:  # an optional dependency
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

THRESHOLDS: Final = "thresholds"
EXIT_INDEX: Final = "exit_index"


def nest_stages(
    stages: Sequence["ModelProto"],
    thresholds: Sequence[float],
    temperatures: Sequence[float],
    metadata: str,
) -> "ModelProto":
    """Return one graph that runs stage after stage until one's confidence reaches its threshold.

    Inputs are `images` [1, C, H, W] and `thresholds` [K], by default those given here; outputs are `logits`
    [1, num_classes] and `exit_index` [1], int64.

    Args:
        stages: The graphs of the K + 1 stages, for one image; they are changed.
        thresholds: One for each added exit, infinity for never.
        temperatures: What each exit's logits are divided by.
        metadata: What is written under `METADATA`.
    """
    from onnx import TensorProto, helper, inliner, numpy_helper

    stages = [inliner.inline_local_functions(stage) if stage.functions else stage for stage in stages]
    graph = _branch([stage.graph for stage in stages], 0)
    first = stages[0]
    defaults = np.array(thresholds, np.float32)
    # An initializer that is an input too is its default.
    graph.input.append(helper.make_tensor_value_info(THRESHOLDS, TensorProto.FLOAT, defaults.shape))
    graph.initializer.append(numpy_helper.from_array(defaults, THRESHOLDS))
    graph.initializer.append(numpy_helper.from_array(np.array(temperatures, np.float32), TEMPERATURES))
    graph.input.insert(0, next(value for value in first.graph.input if value.name == IMAGES))
    opsets = {opset.domain: opset.version for stage in stages for opset in stage.opset_import}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, number) for domain, number in opsets.items()],
        ir_version=first.ir_version,
        producer_name="timm_selfdistill",
    )
    helper.set_model_props(model, {METADATA: metadata})
    return model


def save_model(model: "ModelProto", path: Path) -> None:
    """Write and check a graph; above 2 GB, its weights go to a second file beside it."""
    import onnx

    size = sum(len(tensor.raw_data) for graph in _graphs(model.graph) for tensor in graph.initializer)
    large = size > graphs.LARGEST_FILE
    onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)
    onnx.checker.check_model(path, full_check=True)


def open_nested(path: Path) -> Callable[[Array, Sequence[float]], tuple[Array, Array]]:
    """Return what runs a graph that was written: from an image and thresholds to its logits and its exit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the thresholds are an input
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Array, thresholds: Sequence[float]) -> tuple[Array, Array]:
        given = {IMAGES: image, THRESHOLDS: np.array(thresholds, np.float32)}
        logits, index = session.run([LOGITS, EXIT_INDEX], given)
        return logits, index

    return run


def _branch(stages: Sequence["GraphProto"], index: int) -> "GraphProto":
    """Return the graph of a stage and, in a branch of it, of those after it; without its inputs."""
    from onnx import TensorProto, helper

    stage = stages[index]
    shared = {IMAGES, TEMPERATURES, *(value.name for other in stages for value in (*other.input, *other.output))}
    shared -= {LOGITS, CONFIDENCE}
    _rename(stage, lambda name: name if name in shared else f"stage{index}/{name}")
    of_stage = {value.name.removeprefix(f"stage{index}/"): value for value in stage.output}
    logits, classes = of_stage[LOGITS], [size.dim_value for size in of_stage[LOGITS].type.tensor_type.shape.dim]
    outputs = [
        helper.make_tensor_value_info(_at(LOGITS, index), TensorProto.FLOAT, classes),
        helper.make_tensor_value_info(_at(EXIT_INDEX, index), TensorProto.INT64, [1]),
    ]
    nodes = list(stage.node)
    if index == len(stages) - 1:
        nodes += _answer(logits.name, index, outputs)
    else:
        nodes += _decide(of_stage[CONFIDENCE].name, index)
        left = [
            helper.make_tensor_value_info(f"{_at(LOGITS, index)}/left", TensorProto.FLOAT, classes),
            helper.make_tensor_value_info(f"{_at(EXIT_INDEX, index)}/left", TensorProto.INT64, [1]),
        ]
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
        node("Gather", [THRESHOLDS, name("place")], "any_threshold"),
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


def _at(name: str, index: int) -> str:
    """Return what an output of the whole graph is called at a stage."""
    return name if index == 0 else f"{name}/{index}"


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
