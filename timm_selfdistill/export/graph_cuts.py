"""Cut the graph of a network with all its exits into stages, each with what one more exit needs.

A stage holds the operations that its exit's outputs depend on and no earlier stage holds. What an operation of an
earlier stage gives to a later one is carried from stage to stage, with a row for each image, so that images can leave
between stages. What does not depend on the images, sizes, and views of what is carried are computed in each stage that
uses them.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from timm_selfdistill.compat import batch_multiple
from timm_selfdistill.early_exit.compiled_stages import first_parts
from timm_selfdistill.export.graphs import ExportError
from timm_selfdistill.staged import TensorSpec

_ATEN = torch.ops.aten
# They make no tensor smaller, and no numbers.
_VIEWS: Final = {
    *(_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.flatten.using_ints),
    *(_ATEN.permute.default, _ATEN.transpose.int, _ATEN.t.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim),
    *(_ATEN.squeeze.dims, _ATEN.squeeze.default, _ATEN.expand.default, _ATEN.clone.default, _ATEN.alias.default),
    *(_ATEN.detach.default, _ATEN.contiguous.default, _ATEN.unflatten.int),
}


class Stage(NamedTuple):
    """One stage of a network, and its tensors in order: first those that are carried, then those of the exit."""

    network: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class _Place(NamedTuple):
    """Where a carried tensor has its images: `multiple` rows for each one along a dimension."""

    dim: int
    multiple: int
    rest: tuple[int, ...]  # the sizes without that dimension


def cut(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[Sequence[str]], titles: Sequence[str]
) -> list[Stage]:
    """Cut the graph of a network, whose first input are the images; ExportError if that cannot be.

    `outputs` are the names, for each stage, of the outputs that it ends with, in the order of the graph's; `titles` are
    what the exits are called in messages. Where the images' first dimension is dynamic, all that is carried has it.
    """
    return _Cuts(program, inputs, outputs, titles).stages()


class _Cuts:
    def __init__(
        self, program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[Sequence[str]], titles: Sequence[str]
    ) -> None:
        # Without operations that write into their inputs, which no other stage would see.
        program = program.run_decompositions({})
        self._program, self._titles = program, titles
        self._nodes: list[Node] = list(program.graph.nodes)
        by_name = {node.name: node for node in self._nodes}
        self._inputs: dict[Node, str] = {}
        self._tensors: dict[Node, tuple[str, Any]] = {}
        given = iter(inputs)
        for spec in program.graph_signature.input_specs:
            node = by_name[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                self._inputs[node] = next(given)
            else:
                target = str(spec.target)
                values: Mapping[str, Any] = program.state_dict if target in program.state_dict else program.constants
                self._tensors[node] = (target, values[target])
        self._images = next(iter(self._inputs))
        self._batch = self._images.meta["val"].shape[0]
        returned: Any = self._nodes[-1].args[0]
        specs = zip(program.graph_signature.output_specs, returned, strict=True)
        results = iter([node for spec, node in specs if spec.kind == OutputKind.USER_OUTPUT])
        self._results = [[(name, next(results)) for name in names] for names in outputs]
        self._stage_of = first_parts(self._nodes, [[node for _, node in ends] for ends in self._results])
        self._moving = self._find_moving()

    def stages(self) -> list[Stage]:
        """Return the stages."""
        stages = range(len(self._results))
        wanted = [self._wanted(index) for index in stages]
        entering = [
            [node for node in self._nodes if node in wanted[index] and self._enters(node, index)] for index in stages
        ]
        everywhere = set().union(*entering)
        carried = [node for node in self._nodes if node in everywhere and node not in self._inputs]
        names = {**self._inputs, **{node: f"carried_{count}" for count, node in enumerate(carried)}}
        places: dict[Node, _Place | None] = {}
        for index, nodes in enumerate(entering):
            for node in nodes:
                if node in self._moving and node not in places:
                    places[node] = self._place(node, index)
        leaving = [[node for node in carried if self._stage_of[node] == index] for index in stages]
        return [self._build(index, wanted[index], entering[index], leaving[index], names, places) for index in stages]

    def _find_moving(self) -> set[Node]:
        """Return what depends on the numbers in the images, and not only on how many there are."""
        moving = {self._images}
        for node in self._nodes:
            if not isinstance(node.meta.get("val"), torch.SymInt) and not moving.isdisjoint(node.all_input_nodes):
                moving.add(node)
        return moving

    def _enters(self, node: Node, index: int) -> bool:
        """Whether what a stage needs comes from outside it."""
        if node in self._inputs:
            return True
        if node not in self._moving or node.target in _VIEWS:
            return False
        return self._stage_of[node] != index

    def _wanted(self, index: int) -> set[Node]:
        """Return all that a stage computes, and all that enters it."""
        wanted = {node for _, node in self._results[index]}
        for node in reversed(self._nodes):
            if node in wanted and not self._enters(node, index) and self._size(node) is None:
                wanted.update(node.all_input_nodes)
        return wanted

    def _size(self, node: Node) -> int | None:
        """Return how many times the number of images the size is that a node asks for; None for other nodes."""
        if node.target is not _ATEN.sym_size.int or not isinstance(self._batch, torch.SymInt):
            return None
        return batch_multiple(node.meta["val"], self._batch)

    def _place(self, node: Node, index: int) -> _Place | None:
        """Return where a carried tensor has its images; None where the graph takes one image only."""
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise self._no_rows(index, node, f"which is not a tensor but {type(value).__name__}")
        if not isinstance(self._batch, torch.SymInt):
            return None
        multiples = [0 if isinstance(size, int) else batch_multiple(size, self._batch) for size in value.shape]
        found = [dim for dim, multiple in enumerate(multiples) if multiple != 0]
        if len(found) != 1 or (multiple := multiples[found[0]]) is None:
            raise self._no_rows(index, node, f"of shape {[str(size) for size in value.shape]}")
        rest = tuple(int(size) for dim, size in enumerate(value.shape) if dim != found[0])
        return _Place(found[0], multiple, rest)

    def _no_rows(self, index: int, node: Node, what: str) -> ExportError:
        return ExportError(
            f"The network cannot be cut after exit {index - 1} ({self._titles[index - 1]}): the rest of it reads the "
            f"tensor {node.name}, {what}, which has no row for each image."
        )

    def _build(
        self,
        index: int,
        wanted: set[Node],
        entering: Sequence[Node],
        leaving: Sequence[Node],
        names: Mapping[Node, str],
        places: Mapping[Node, _Place | None],
    ) -> Stage:
        graph = fx.Graph()
        made: dict[Node, Any] = {}
        tensors: dict[str, Any] = {}
        arriving = {node: graph.placeholder(names[node]) for node in entering}
        rows = next((place for node, place in arriving.items() if node in self._moving), None)
        for node, place in arriving.items():
            made[node] = _unpack(graph, place, places.get(node))
        for node in self._nodes:
            if node not in wanted or node in made:
                continue
            size = self._size(node)
            if node in self._tensors:
                target, tensors[target] = self._tensors[node]
                made[node] = graph.get_attr(target)
            elif node.op == "get_attr":  # the body of an operation such as a loop
                target = str(node.target)
                tensors[target] = self._program.graph_module.get_submodule(target)
                made[node] = graph.get_attr(target)
            elif size is not None:
                count = graph.call_function(_ATEN.sym_size.int, (rows, 0))
                made[node] = count if size == 1 else graph.call_function(operator.mul, (count, size))
            else:
                made[node] = graph.node_copy(node, made.__getitem__)
        packed = [_pack(graph, made[node], places[node]) for node in leaving]
        graph.output((*packed, *(made[node] for _, node in self._results[index])))
        inputs = [_spec(names[node], node, places.get(node)) for node in entering]
        outputs = [_spec(names[node], node, places.get(node)) for node in leaving]
        outputs += [_spec(name, node, None) for name, node in self._results[index]]
        return Stage(fx.GraphModule(tensors, graph), tuple(inputs), tuple(outputs))


def _spec(name: str, node: Node, place: _Place | None) -> TensorSpec:
    value = node.meta["val"]
    shape: list[int | None] = [size if isinstance(size, int) else None for size in value.shape]
    if place is not None:
        shape = [None, *place.rest] if place.multiple == 1 else [None, place.multiple, *place.rest]
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shape))


def _pack(graph: fx.Graph, node: Any, place: _Place | None) -> Any:
    """Give a tensor its images as first dimension, the further rows of each as second."""
    if place is None:
        return node
    if place.dim:
        order = [place.dim, *(dim for dim in range(len(place.rest) + 1) if dim != place.dim)]
        node = graph.call_function(_ATEN.permute.default, (node, order))
    if place.multiple != 1:
        node = graph.call_function(_ATEN.reshape.default, (node, [-1, place.multiple, *place.rest]))
    return node


def _unpack(graph: fx.Graph, node: Any, place: _Place | None) -> Any:
    """Undo `_pack`."""
    if place is None:
        return node
    if place.multiple != 1:
        node = graph.call_function(_ATEN.reshape.default, (node, [-1, *place.rest]))
    if place.dim:
        order = [*range(1, place.dim + 1), 0, *range(place.dim + 1, len(place.rest) + 1)]
        node = graph.call_function(_ATEN.permute.default, (node, order))
    return node
