"""Whose logits teach the exits: those of deeper exits, of all together, or of the average of the weights."""

from collections.abc import Callable, Sequence

from torch import Tensor

from timm_selfdistill.model import Ensemble
from timm_selfdistill.registry import Registry

Teacher = Callable[..., Tensor | Sequence[Tensor]]
"""What `register_teacher` takes."""

_TEACHERS: Registry[Teacher] = Registry("teacher", "timm_selfdistill.teachers")
get_teacher = _TEACHERS.get


def register_teacher(name: str) -> Callable[[Teacher], Teacher]:
    """Return a decorator that registers a function as the teacher `name`, for the setting `teacher`.

    The function maps the detached logits of all exits and the backbone [K + 1, B, C] to those that each exit learns
    from: [K, B, C], or a list with one [S, B, C] for each of the K exits, which then has several teachers, whose
    divergences are averaged. If it has a keyword `ema`, it is also given the logits [K + 1, B, C] of the average of the
    weights; with a keyword `ensemble`, the model's `Ensemble` as it was when training began, the mean unless it was
    fitted. If it has a keyword `backbone`, `deepest_kd_weight` may be above 0: it is then true, and the function
    returns one more, the logits that the backbone's own classifier learns from.

    Raises:
        ValueError: If the name is taken.
    """
    return _TEACHERS.register(name)


def list_teachers() -> list[str]:
    """Return the names of all registered teachers, sorted."""
    return _TEACHERS.names()


@register_teacher("deepest")
def deepest(logits: Tensor) -> Tensor:
    """The backbone's own logits, for every exit.

    Paper: "Be Your Own Teacher", https://arxiv.org/abs/1905.08094
    """
    return logits[-1:].expand_as(logits[:-1])


@register_teacher("ensemble")
def ensemble(logits: Tensor, *, backbone: bool = False, ensemble: Ensemble | None = None) -> Tensor:
    """The mean of the logits of all exits and the backbone, for every exit, and for the backbone if asked.

    Of a model whose ensemble was fitted before the training, that in place of the mean.

    Paper: "Knowledge Distillation by On-the-Fly Native Ensemble", https://arxiv.org/abs/1806.04606, which weights the
    branches by a trained gate. Also for the backbone: "Students are the Best Teacher: Exit-Ensemble Distillation with
    Multi-Exits", https://arxiv.org/abs/2104.00299
    """
    answer = logits.mean(0) if ensemble is None or ensemble.is_mean else ensemble(logits)
    return answer.expand_as(_taught(logits, backbone))


@register_teacher("next-deeper")
def next_deeper(logits: Tensor) -> Tensor:
    """The logits of the next exit, for the last added exit the backbone's.

    Paper: "Learning Lightweight Lane Detection CNNs by Self Attention Distillation", https://arxiv.org/abs/1908.00821,
    where each block imitates the attention map of the next; here the logits.
    """
    return logits[1:]


@register_teacher("all-deeper")
def all_deeper(logits: Tensor) -> list[Tensor]:
    """The logits of every deeper exit and of the backbone, each a teacher of its own.

    Paper: "Harmonized Dense Knowledge Distillation Training for Multi-Exit Architectures" (AAAI 2021),
    https://doi.org/10.1609/aaai.v35i11.17225, which learns the weights of the pairs; here they weigh the same.
    """
    return [logits[index + 1 :] for index in range(len(logits) - 1)]


@register_teacher("ema")
def ema(logits: Tensor, *, ema: Tensor, backbone: bool = False) -> Tensor:
    """The backbone's logits in the average of the weights, for every exit, and for the backbone if asked.

    Paper: "Mean teachers are better role models", https://arxiv.org/abs/1703.01780, where the average teaches the
    network's own output; here it teaches the exits.
    """
    return ema[-1:].expand_as(_taught(logits, backbone))


@register_teacher("ema-same-exit")
def ema_same_exit(logits: Tensor, *, ema: Tensor, backbone: bool = False) -> Tensor:
    """The logits of the same exit in the average of the weights.

    Paper: "Mean teachers are better role models", https://arxiv.org/abs/1703.01780
    """
    return _taught(ema, backbone)


def _taught(logits: Tensor, backbone: bool) -> Tensor:
    """Return the entries of the exits, and the backbone's if asked."""
    return logits if backbone else logits[:-1]
