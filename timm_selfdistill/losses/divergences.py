"""Distances of logits, and of features, from those of the teacher."""

import math
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_selfdistill.checks import Number, check, is_number
from timm_selfdistill.recipe.loss_settings import OutsideTeacherConfig, SelfDistillationConfig
from timm_selfdistill.registry import Registry

Settings = SelfDistillationConfig | OutsideTeacherConfig


class Divergence(Protocol):
    """Distance of the exits' logits from their teachers': any function that is called like this."""

    def __call__(
        self, student: Tensor, teacher: Tensor, target: Tensor, /, *, temperature: float, scale: float
    ) -> Tensor:
        """Compare logits, which come in at least float32 and within +-1e14: squares and sums of them stay finite.

        Further keywords with a default are settings of the divergence: `SelfDistillationConfig.divergence_kwargs`.

        Args:
            student: Logits of the K exits [K, B, C]; an exit with S teachers comes S times.
            teacher: Logits each of them learns from [K, B, C], detached.
            target: Class indices [B] or class probabilities [B, C].
            temperature: What logits are divided by before a softmax.
            scale: Factor for what was computed at that temperature: T^2 with `t_squared`, else 1.

        Returns:
            Mean over the batch, one value per exit [K].
        """


_DIVERGENCES: Registry[Divergence] = Registry("divergence", "timm_selfdistill.divergences")


def register_divergence(name: str) -> Callable[[Divergence], Divergence]:
    """Return a decorator that registers a `Divergence` as `name`, for the setting `divergence`.

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

    Its gradient is that of the soft cross-entropy in published code; the value is smaller by the teacher's entropy, so
    it is zero where both agree.

    Paper: "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(-1) * scale


@register_divergence("jensen-shannon")
def jensen_shannon(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, scale: float) -> Tensor:
    """(KL(teacher || m) + KL(student || m)) / 2 of the softmaxes at `temperature` and their mean m, times `scale`.

    Symmetric, and at most log 2 before it is scaled.

    Paper: "Divergence Measures Based on the Shannon Entropy", https://doi.org/10.1109/18.61115
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    mean = torch.logaddexp(student, teacher) - math.log(2)
    sides = [F.kl_div(mean, side, reduction="none", log_target=True).sum(-1).mean(-1) for side in (teacher, student)]
    return (sides[0] + sides[1]) / 2 * scale


@register_divergence("dkd")
def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float,
    scale: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: `alpha` TCKD + `beta` NCKD, at `temperature`, times `scale`.

    TCKD is KL(teacher || student) of {target class, all others}, NCKD that of the others, renormalised among them.
    TCKD + NCKD times the teacher's probability of the others would be `kl`. A target of probabilities counts as its
    likeliest class, the first of several. With two classes, NCKD is zero.

    Paper: "Decoupled Knowledge Distillation", https://arxiv.org/abs/2203.08679; beta = 8 is its value for most pairs of
    networks on CIFAR-100, at temperature 4 with T^2, weight 1 and 20 epochs of warm-up.
    """
    is_target = _is_target(target, student)
    logs = [F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher)]
    # Log-probabilities of the target class, and of all others together.
    student_target, teacher_target = (log.masked_fill(~is_target, 0).sum(-1) for log in logs)
    student_rest, teacher_rest = (log.masked_fill(is_target, -math.inf).logsumexp(-1) for log in logs)
    tckd = teacher_target.exp() * (teacher_target - student_target) + teacher_rest.exp() * (teacher_rest - student_rest)
    student_others, teacher_others = (_others(logits / temperature, is_target) for logits in (student, teacher))
    nckd = F.kl_div(student_others, teacher_others, reduction="none", log_target=True).sum(-1)
    return (alpha * tckd + beta * nckd).mean(-1) * scale


@register_divergence("nkd")
def nkd(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, scale: float, gamma: float = 1.5
) -> Tensor:
    """Normalised distillation: -t log s + `gamma` `scale` CE(teacher's others, student's others).

    t and s are the probabilities of the target class, at temperature 1; the others, at `temperature`, are renormalised
    among them. A cross-entropy: it is not zero where both agree. A target of probabilities counts as its likeliest
    class, the first of several, as in the published code.

    Paper: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
    Customized Soft Labels", https://arxiv.org/abs/2303.13005; gamma = 1.5 is its value at temperature 1, on CIFAR-100
    it takes 3.5 at temperature 3.
    """
    is_target = _is_target(target, student)
    student_target, teacher_target = (
        F.log_softmax(logits, dim=-1).masked_fill(~is_target, 0).sum(-1) for logits in (student, teacher)
    )
    student_others, teacher_others = (_others(logits / temperature, is_target) for logits in (student, teacher))
    # At the target class, where there is nothing to compare, the student's entry is 0.
    others = -(teacher_others.exp() * student_others).sum(-1)
    return (gamma * scale * others - teacher_target.exp() * student_target).mean(-1)


@register_divergence("mse")
def mse(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, scale: float) -> Tensor:
    """Mean over batch and classes of the squared difference of the logits; without temperature and scale.

    Paper: "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation",
    https://arxiv.org/abs/2105.08919
    """
    return (student - teacher).square().mean((1, 2))


def bind_divergence(config: Settings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the divergence of a configuration, as a function of student [N, B, C], teacher [N, B, C] and target."""
    divergence, settings = _DIVERGENCES.get(config.divergence), config.divergence_kwargs
    defaults = {
        key: parameter.default
        for key, parameter in signature(divergence).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is not Parameter.empty
    }
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise ValueError(
            f"divergence_kwargs: the divergence {config.divergence!r} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(defaults) or 'none'}."
        )
    for key, value in settings.items():
        if is_number(defaults[key]):
            check(f"divergence_kwargs: {key}", value, Number)
    return partial(_compare, partial(divergence, **settings) if settings else divergence, config)


def _compare(divergence: Divergence, config: Settings, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    if config.standardize_logits:
        student, teacher = standardize(student), standardize(teacher)
    scale = config.temperature**2 if config.t_squared else 1.0
    values = divergence(student, teacher, target, temperature=config.temperature, scale=scale)
    if values.shape != student.shape[:1]:
        raise ValueError(
            f"Divergence {config.divergence!r} returned {list(values.shape)}; allowed is one value per exit, "
            f"{list(student.shape[:1])}."
        )
    return values


def standardize(logits: Tensor) -> Tensor:
    """Return each sample's logits [..., C] minus their mean, divided by their standard deviation plus 1e-7.

    Paper: "Logit Standardization in Knowledge Distillation", https://arxiv.org/abs/2403.01427. As in its code, the
    variance is the sum of squares divided by C - 1. Logits that are all equal become 0, with a gradient of 0.
    """
    if logits.shape[-1] < 2:
        raise ValueError("standardize_logits needs two classes or more, but there is one only.")
    centred = logits - logits.mean(-1, keepdim=True)
    # Its gradient, unlike that of std, is finite where all logits are equal.
    std: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    constant = logits.amax(-1, keepdim=True) == logits.amin(-1, keepdim=True)
    # Equal logits leave rounding; divided by 1e-7, its gradient would be infinite in float16.
    return (centred / (std + 1e-7)).masked_fill(constant, 0)


def _is_target(target: Tensor, logits: Tensor) -> Tensor:
    """Return whether a class is the sample's target [B, C], for class indices or probabilities."""
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError("dkd and nkd compare the classes that are not the target, but there is one class only.")
    indices = target.argmax(-1) if target.is_floating_point() else target
    return F.one_hot(indices, classes).bool()


def _others(logits: Tensor, is_target: Tensor) -> Tensor:
    """Return the log-probabilities [K, B, C] of the other classes among themselves, with 0 for the target class."""
    return F.log_softmax(logits.masked_fill(is_target, -math.inf), dim=-1).masked_fill(is_target, 0)


def _squared_l2(difference: Tensor) -> Tensor:
    return difference.square().sum(-1)


def _l2(difference: Tensor) -> Tensor:
    # Its gradient at zero is zero, where that of sqrt(sum of squares) is NaN.
    norm: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return norm


HINT_DISTANCES: Final = {"squared_l2": _squared_l2, "l2": _l2}
