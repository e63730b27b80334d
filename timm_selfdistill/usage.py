"""Which modules and tensors of a model a run uses."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Usage:
    """What was used.

    Attributes:
        modules: The modules that ran, to their end or not.
        tensors: The model's parameters and buffers that an operation read or a module that ran owns, by their id.
    """

    modules: set[nn.Module] = field(default_factory=set)
    tensors: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def watch_usage(model: nn.Module) -> Iterator[Usage]:
    """Record what the body uses of a model, in its own thread: others may use the model meanwhile.

    Some modules apply the weight of another one that never runs itself, and some keep in eval mode what they once
    computed from theirs: so both what ran and what was read count.
    """
    usage = Usage()
    thread = threading.get_ident()
    known = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}

    def note(tensor: Any) -> None:
        if id(tensor) in known:
            usage.tensors[id(tensor)] = tensor

    def note_module(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread:
            return
        usage.modules.add(module)
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            note(tensor)

    handles = [module.register_forward_pre_hook(note_module) for module in model.modules()]
    try:
        with _OperandWatch(note):
            yield usage
    finally:
        for handle in handles:
            handle.remove()


class _OperandWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `note` with every operand of every operation."""

    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for operand in tree_leaves((args, kwargs)):
            self.note(operand)
        return func(*args, **(kwargs or {}))
