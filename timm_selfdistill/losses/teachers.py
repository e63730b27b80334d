"""Whose logits each exit learns from."""

from collections.abc import Callable

from torch import Tensor

from timm_selfdistill.registry import Registry

Teacher = Callable[[Tensor], Tensor]
"""From the detached logits of all exits and the backbone [K + 1, B, C] to those each exit learns from [K, B, C]."""

_TEACHERS: Registry[Teacher] = Registry("teacher", "timm_selfdistill.teachers")
get_teacher = _TEACHERS.get


def register_teacher(name: str) -> Callable[[Teacher], Teacher]:
    """Return a decorator that registers a function as the teacher `name`.

    Args:
        name: What `SelfDistillationConfig.teacher` and recipes call it.

    Returns:
        The decorator, for a function from the detached logits of all exits and the backbone [K + 1, B, C] to those
        that each exit learns from [K, B, C].

    Raises:
        ValueError: If the name is taken.
    """
    return _TEACHERS.register(name)


def list_teachers() -> list[str]:
    """Return the names of all registered teachers, sorted."""
    return _TEACHERS.names()


@register_teacher("deepest")
def deepest(logits: Tensor) -> Tensor:
    """The backbone's own logits, for every exit."""
    return logits[-1:].expand_as(logits[:-1])


@register_teacher("ensemble")
def ensemble(logits: Tensor) -> Tensor:
    """The mean of the logits of all exits and the backbone, for every exit."""
    return logits.mean(0, keepdim=True).expand_as(logits[:-1])


@register_teacher("next-deeper")
def next_deeper(logits: Tensor) -> Tensor:
    """The logits of the next exit, for the last added exit the backbone's."""
    return logits[1:]
