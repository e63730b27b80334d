"""A network that ends at an exit: the layers after it are removed."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_selfdistill.compat import TorchDispatchMode, tree_leaves
from timm_selfdistill.exits import Backbone, ExitPoint, random_images, unchanged
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.hooks import Hooks
from timm_selfdistill.model.interface import BackboneInterface

# A forward may read their length or run along them, so they stay, with their members removed.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def truncate(model: SelfDistillModel, exit: int) -> nn.Module:
    """Cut a network off after one of its exits.

    Which modules the exit needs is seen in one forward. The others are not copied, and the result is tried in eval and
    train mode: what the backbone turns out to look at, though it does not run it, stays. The backbone's forward then
    runs to its end through what is left, without work, where that gives the same; else an exception ends it at the
    exit, which programs that trace the network may not bear.

    Args:
        model: The wrapped model; it is not changed.
        exit: Index of the exit, 0 the shallowest; `num_exits` is the backbone's own classifier.

    Returns:
        A `TruncatedModel` in the mode of the model, which gives the logits of `model.forward_exit(x, exit)`; for the
        backbone's own classifier, a copy of the backbone.

    Raises:
        ValueError: If there is no such exit, or the model is not wrapped.
    """
    if not isinstance(model, SelfDistillModel):
        raise ValueError(f"Only a wrapped model has exits to cut at; got {type(model).__name__}: call wrap first.")
    model.check_exit(exit)
    if exit == model.num_exits:
        backbone: nn.Module = model.copy_backbone({})
        return backbone
    x = random_images(model.backbone, model.wrap_config.image_size, 2)
    with unchanged(model), torch.no_grad(), watch_usage(model.backbone) as usage:
        expected = model.forward_exit(x, exit)
    unused = list(_unused(model.backbone, usage))
    small = _cut(model, exit, unused)
    if _gives(small, x, expected):
        return _ending_by_itself(small, x)
    removed: list[nn.Module] = []
    while unused:
        module = unused.pop()
        if _gives(_cut(model, exit, [*removed, module]), x, expected):
            removed.append(module)
        else:
            unused += [child for child in module.children() if _has_tensors(child)]
    return _ending_by_itself(_cut(model, exit, removed), x)


class TruncatedModel(nn.Module, BackboneInterface):
    """A backbone up to an exit, and the exit's head; made by `truncate`.

    Args:
        backbone: The timm model, without what the exit does not need; it cannot be called on its own.
        head: The exit's head.
        point: Where the head reads the backbone.

    Attributes:
        exit_name: Name of the exit.
        num_classes: Number of logits.
        ends_by_itself: Whether the backbone's forward runs to its end through what is left of it, whose result is not
            used; otherwise an exception ends it at the exit.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, head: ExitHead, point: ExitPoint) -> None:
        super().__init__()
        self.training = head.training
        self.backbone = backbone
        self.head = head
        self.exit_name = point.name
        self.num_classes = head.classifier.out_features
        self.ends_by_itself = False
        self._hooks = Hooks(backbone, [point])

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        call = self._hooks.run(self.backbone, x, stop_at=None if self.ends_by_itself else 0)
        return self.head.classify(*call.taps[0])


class _Usage(NamedTuple):
    """What a forward used: the modules that ran, and the parameters and buffers that were read, by their id."""

    modules: set[nn.Module]
    tensors: dict[int, Tensor]


@contextmanager
def watch_usage(model: nn.Module) -> Iterator[_Usage]:
    """Record what the body uses of a model, in its own thread: others may use the model at the same time.

    Some modules apply the weight of another one that never runs itself, and some cache in eval mode what they computed
    from theirs: so what an operation reads counts, and what a module that runs owns.
    """
    usage = _Usage(set(), {})
    thread = threading.get_ident()
    known = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}

    def note(values: Any) -> None:
        usage.tensors.update({id(value): value for value in values if id(value) in known})

    def note_module(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            usage.modules.add(module)
            note(chain(module.parameters(recurse=False), module.buffers(recurse=False)))

    class OperandWatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note(tree_leaves((args, kwargs)))
            return func(*args, **(kwargs or {}))

    handles = [module.register_forward_pre_hook(note_module) for module in model.modules()]
    try:
        with OperandWatch():  # type: ignore[no-untyped-call]
            yield usage
    finally:
        for handle in handles:
            handle.remove()


class _Removed(nn.Module):
    """Takes the place of a module after the exit: holds nothing, and never runs unless it `passes` what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = False

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.passes:
            raise RuntimeError("This layer comes after the exit that the network was truncated at; it is gone.")
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do nothing: timm's models call this on all their stages."""


def _unused(module: nn.Module, usage: _Usage) -> Iterator[nn.Module]:
    """Return the largest modules inside another of which nothing was used."""
    for child in module.children():
        if not _has_tensors(child):
            continue
        if type(child) in _CONTAINERS or _is_used(child, usage):
            yield from _unused(child, usage)
        else:
            yield child


def _is_used(module: nn.Module, usage: _Usage) -> bool:
    if not usage.modules.isdisjoint(module.modules()):
        return True
    return any(id(tensor) in usage.tensors for tensor in chain(module.parameters(), module.buffers()))


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _cut(model: SelfDistillModel, exit: int, removed: list[nn.Module]) -> TruncatedModel:
    """Return a copy of the model up to an exit, without the removed modules."""
    head = model.head_of(exit)
    backbone = model.copy_backbone({id(module): _Removed() for module in removed})
    return TruncatedModel(backbone, copy.deepcopy(head, {id(head.adapter): nn.Identity()}), model.points[exit])


def _ending_by_itself(small: TruncatedModel, x: Tensor) -> TruncatedModel:
    """Let the forward run on to its end, if that gives the same logits and does not multiply more."""
    try:
        expected, macs = _trial(small, x)
        _pass_on(small, True)
        logits, more = _trial(small, x)
        fits = more <= macs and all(map(_is_close, logits, expected))
    except Exception:  # any error of the backbone means that it cannot do without what was removed
        fits = False
    _pass_on(small, fits)
    return small


def _pass_on(small: TruncatedModel, passes: bool) -> None:
    small.ends_by_itself = passes
    for module in small.modules():
        if isinstance(module, _Removed):
            module.passes = passes


def _trial(small: TruncatedModel, x: Tensor) -> tuple[list[Tensor], int]:
    """Return the logits of a copy in eval mode, in train mode and under gradient checkpointing, and the MACs of all."""
    trial = copy.deepcopy(small)
    with unchanged(trial), MacCounter() as counter:
        logits = []
        for training, checkpointing in ((False, False), (True, False), (True, True)):
            trial.train(training)
            with suppress(AssertionError, AttributeError):  # some of timm's models cannot
                trial.set_grad_checkpointing(checkpointing)
            torch.manual_seed(0)
            logits.append(trial(x).detach())
    return logits, counter.macs


def _gives(small: TruncatedModel, x: Tensor, expected: Tensor) -> bool:
    """Whether a truncated model gives the expected logits in eval mode and runs in train mode."""
    trial = copy.deepcopy(small)
    try:
        with unchanged(trial), torch.no_grad():
            logits = trial(x)
            trial.train()(x)
    except Exception:  # any error of the backbone means that it misses something
        return False
    return _is_close(logits, expected)


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    return logits.is_meta or torch.allclose(logits, expected, equal_nan=True)
