"""How far logits, and features, are from those of the teacher."""

from collections.abc import Callable
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_selfdistill.registry import Registry


class Divergence(Protocol):
    """How far the exits' logits are from their teachers': any function that is called like this."""

    def __call__(
        self, student: Tensor, teacher: Tensor, target: Tensor, /, *, temperature: float, scale: float
    ) -> Tensor:
        """Compare logits, which arrive in at least float32 and within +-1e14: squares and sums of them stay finite.

        Args:
            student: Logits of the K exits [K, B, C].
            teacher: Logits each of them learns from [K, B, C], detached.
            target: Class indices [B] or class probabilities [B, C].
            temperature: What logits are divided by before a softmax.
            scale: Factor for what was computed at that temperature: T^2 with `t_squared`, else 1.

        Returns:
            Mean over the batch, one value per exit [K].
        """


_DIVERGENCES: Registry[Divergence] = Registry("divergence", "timm_selfdistill.divergences")
get_divergence = _DIVERGENCES.get


def register_divergence(name: str) -> Callable[[Divergence], Divergence]:
    """Return a decorator that registers a function as the divergence `name`.

    Args:
        name: What `SelfDistillationConfig.divergence` and recipes call it.

    Returns:
        The decorator, for a function that is called as `Divergence` says.

    Raises:
        ValueError: If the name is taken.
    """
    return _DIVERGENCES.register(name)


def list_divergences() -> list[str]:
    """Return the names of all registered divergences, sorted."""
    return _DIVERGENCES.names()


@register_divergence("kl")
def kl(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, scale: float) -> Tensor:
    """KL(teacher || student) of the softmaxes at `temperature`, times `scale`.

    Its gradient is that of the soft cross-entropy which published code uses; the value is smaller by the teacher's
    entropy, so that it is zero where both agree.
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(-1) * scale


@register_divergence("mse")
def mse(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, scale: float) -> Tensor:
    """Mean over batch and classes of the squared difference of the logits; has no temperature, so no scale either.

    Paper: "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
    https://arxiv.org/abs/2105.08919
    """
    return (student - teacher).square().mean((1, 2))


def _squared_l2(difference: Tensor) -> Tensor:
    return difference.square().sum(-1)


def _l2(difference: Tensor) -> Tensor:
    # Its gradient at zero is zero, where that of sqrt(sum of squares) is NaN.
    norm: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return norm


HINT_DISTANCES: Final = {"squared_l2": _squared_l2, "l2": _l2}
