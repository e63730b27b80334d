"""The backbone between two exits, and each head, as a compiled function for each batch size of the buckets."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.model import SelfDistillModel

_TOLERANCE: Final = 1e-3

Compiler = Callable[[nn.Module], Callable[..., Any]]
Leave = Callable[[int, Callable[[], Tensor]], Tensor | None]


class CompiledStages:
    """A network cut at its exits; each part is compiled once for each batch size, and none while it serves.

    For each size the network is traced by `torch.export`, with all its exits, and split by what each exit depends on;
    what a later part reads is carried from part to part. The weights are those of the model. ValueError if it cannot be
    traced, or the parts give other logits.
    """

    def __init__(
        self, model: SelfDistillModel, sizes: Sequence[int], image_size: tuple[int, int] | None, compiler: Compiler
    ) -> None:
        size = model.wrap_config.image_size if image_size is None else image_size
        images = random_images(model.backbone, size, max(sizes))
        self._name, self._shape = type(model.backbone).__name__, images.shape[1:]
        with torch.no_grad(), unchanged(model):
            self._parts = {rows: _split(model, images[:rows], compiler) for rows in sizes}
            if len({tuple((part.inputs, tuple(part.outputs)) for part in parts) for parts in self._parts.values()}) > 1:
                raise ValueError(f"{self._name} runs other operations for other batch sizes, so it cannot be compiled.")
            self._check(model, images)

    def run(self, images: Tensor, leave: Leave) -> Tensor | None:
        """Run part after part on images [P, C, H, W], as `SelfDistillModel.forward_while` runs the backbone.

        `leave` is called at each exit with its index and a function that runs its head; it returns the rows [P'] of the
        images that go on, or None for all. P and P' must be among the sizes.
        """
        if images.shape[1:] != self._shape or len(images) not in self._parts:
            raise ValueError(
                f"The images have the shape {list(images.shape)}; compiled are images of {list(self._shape)} in "
                f"batches of {', '.join(map(str, self._parts))}."
            )
        if images.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        present, held = len(images), {"images": images}
        for exit in range(len(self._parts[present]) // 2):
            stage, head = self._parts[present][2 * exit : 2 * exit + 2]
            stage.run(held)
            rows = leave(exit, partial(head.run, held))
            if rows is None:
                continue
            if not len(rows):
                return None
            smaller = self._parts[len(rows)]
            needed = {name for part in smaller[2 * exit + 2 :] for name in part.inputs}
            shapes = {"images": (len(rows), *self._shape)}
            for part in smaller:
                shapes |= part.outputs
            held = {name: _take(held[name], rows, present, shapes[name]) for name in held if name in needed}
            present = len(rows)
        return self._parts[present][-1].run(held)

    def _check(self, model: SelfDistillModel, images: Tensor) -> None:
        """Compile all parts by running them, and raise ValueError unless they give the logits of the network."""
        expected = model(images, return_exits=True).logits
        for size in (*self._parts, *self._parts):  # twice, as CUDA graphs are recorded in the second run
            staying = partial(self._check_head, range(size), expected)
            self._compare(range(size), self.run(images[:size], staying), expected[-1])
        largest = max(self._parts)
        for size in self._parts:
            for exit in range(len(expected) - 1 if size < largest else 0):
                rows = torch.arange(largest - size, largest, device=images.device)
                logits = self.run(images, _leaving_at(exit, rows))
                self._compare(range(largest - size, largest), logits, expected[-1])

    def _check_head(self, rows: range, expected: Sequence[Tensor], exit: int, classify: Callable[[], Tensor]) -> None:
        self._compare(rows, classify(), expected[exit])

    def _compare(self, rows: range, found: Tensor | None, expected: Tensor) -> None:
        tolerance = _TOLERANCE if expected.dtype in (torch.float32, torch.float64) else 50 * _TOLERANCE
        part = expected[rows.start : rows.stop]
        if found is None or not float((found - part).abs().max()) <= tolerance * float(expected.abs().max()):
            raise ValueError(f"The parts of {self._name} give other logits than the whole, so it cannot be compiled.")


def _leaving_at(exit: int, rows: Tensor) -> Leave:
    """Return what lets these rows go on from one exit, and all from the others."""
    return lambda index, classify: rows if index == exit else None


@dataclass(frozen=True)
class _Part:
    """A part of the network: what it reads and computes by name, the shapes of that, and the name of its logits."""

    function: Callable[..., Any] | None  # None where it computes nothing
    inputs: tuple[str, ...]
    outputs: dict[str, tuple[int, ...]]
    logits: str

    def run(self, held: dict[str, Tensor]) -> Tensor:
        """Add what it computes to what is held, and return its logits; of a stage, anything."""
        if self.function is not None:
            held.update(zip(self.outputs, self.function(*(held[name] for name in self.inputs)), strict=True))
        return held[self.logits]


class _Everything(nn.Module):
    """The network with what its heads read, and their logits, as outputs."""

    def __init__(self, model: SelfDistillModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            outputs.extend([*taps, self.model.head_of(index).classify(*taps)])

        logits = self.model.forward_while(images, visit)
        assert logits is not None
        return [*outputs, logits]


class _Bound(nn.Module):
    """A part with its weights, which `split_module` makes arguments; `plan` has None where another value goes."""

    def __init__(self, part: nn.Module, plan: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.part = part
        self.plan = [None if weight is None else f"weight{place}" for place, weight in enumerate(plan)]
        for name, weight in zip(self.plan, plan, strict=True):
            if isinstance(weight, nn.Parameter):
                self.register_parameter(str(name), weight)
            elif weight is not None:
                self.register_buffer(str(name), weight)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        outputs: tuple[Tensor, ...] = self.part(
            *(next(given) if name is None else getattr(self, name) for name in self.plan)
        )
        return outputs


def _split(model: SelfDistillModel, images: Tensor, compiler: Compiler) -> tuple[_Part, ...]:
    """Return the 2 K + 1 parts of the network for one batch size: stage, head, stage, ..., stage."""
    try:
        # Without operations that change their input, which other parts would see.
        program = torch.export.export(_Everything(model), (images,), strict=False).run_decompositions({})
    except Exception as error:  # whatever torch raises, the network cannot be traced
        name = type(model.backbone).__name__
        raise ValueError(f"{name} cannot be traced by torch.export, so it cannot be compiled: {error}") from error
    whole = program.module(check_guards=False)
    assert isinstance(whole, fx.GraphModule)
    results: Any = whole.graph.output_node().args[0]
    # Of each part, the places of what it is for among the outputs: taps, logits, taps, ..., logits.
    ends: list[range] = []
    for point in (*model.points, None):
        for count in (len(point.taps), 1) if point is not None else (1,):
            start = ends[-1].stop if ends else 0
            ends.append(range(start, start + count))
    part_of = first_parts(whole.graph.nodes, [[results[place] for place in end] for end in ends])
    split = split_module(whole, whole, part_of.__getitem__, tuple_return=True)
    returned: Any = split.graph.output_node().args[0]
    calls = {str(node.target): node for node in split.graph.nodes if node.op == "call_module"}
    held, parts = {"images": images}, []
    for place, end in enumerate(ends):
        result, call = returned[end.start].name, calls.get(f"submod_{place}")
        if call is None:
            parts.append(_Part(None, (), {}, result))
            continue
        arguments: Any = call.args
        plan = [operator.attrgetter(str(node.target))(split) if node.op == "get_attr" else None for node in arguments]
        bound = _Bound(split.get_submodule(f"submod_{place}"), plan)
        read = tuple(node.name for node in arguments if node.op != "get_attr")
        names = {node.args[1]: node.name for node in call.users}
        found = bound(*(held[name] for name in read))
        outputs = {names[index]: value for index, value in enumerate(found)}
        held |= outputs
        shapes = {name: tuple(value.shape) for name, value in outputs.items()}
        parts.append(_Part(compiler(bound), read, shapes, result))
    return tuple(parts)


def first_parts(nodes: Iterable[fx.Node], ends: Sequence[Sequence[fx.Node]]) -> dict[fx.Node, int]:
    """Return the part of each operation of a graph: the first that ends with something that depends on it."""
    part_of: dict[fx.Node, int] = {}
    for part, results in enumerate(ends):
        stack = list(results)
        while stack:
            node = stack.pop()
            if node.op != "placeholder" and node not in part_of:
                part_of[node] = part
                stack += node.all_input_nodes
    for node in nodes:
        # No tuple goes from part to part: all that is taken from it is in its part.
        if node.target is operator.getitem and node.all_input_nodes[0] in part_of:
            part_of[node] = part_of[node.all_input_nodes[0]]
    return part_of


def _take(value: Tensor, rows: Tensor, present: int, shape: Sequence[int]) -> Tensor:
    """Return a carried tensor for some of the `present` images; `shape` is its shape for that number."""
    changed = [dim for dim, (size, other) in enumerate(zip(value.shape, shape, strict=True)) if size != other]
    if not changed:
        return value  # it has no rows of images
    dim = changed[0]
    if value.shape[dim] == present:
        return value.index_select(dim, rows)
    # Several rows for each image.
    taken: Tensor = value.unflatten(dim, (present, -1)).index_select(dim, rows).flatten(dim, dim + 1)
    return taken
