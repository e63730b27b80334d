"""The loss that trains all exits and the backbone together, and the registry of such losses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_selfdistill.losses.divergences import HINT_DISTANCES, bind_settings, standardize
from timm_selfdistill.losses.inputs import check_entries, check_target, cross_entropy, shapes, stack
from timm_selfdistill.losses.needs import Needs, TrainingTime
from timm_selfdistill.losses.presets import BYOT_ICCV2019, PRESETS, SelfDistillationConfig, list_presets
from timm_selfdistill.losses.teachers import get_teacher, needs_ema
from timm_selfdistill.model import ExitOutput
from timm_selfdistill.registry import Registry

LossClass = TypeVar("LossClass", bound=type[nn.Module])

_LOSSES: Registry[type[nn.Module]] = Registry("loss", "timm_selfdistill.losses")
get_loss = _LOSSES.get


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Return a decorator that registers a loss class as `name`.

    The class is an `nn.Module`, called with `(out: ExitOutput, target)`, that returns a dict of scalars with at least
    "loss". Its attributes say what it is given: `needs_exits`, whether `out` must hold the exits' entries (they do
    without it), and `needs`, a `Needs`, what comes by keyword (nothing without it).

    Args:
        name: What recipes call it.

    Returns:
        The decorator.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(loss: LossClass) -> LossClass:
        _LOSSES.register(name)(loss)
        return loss

    return decorate


def list_losses() -> list[str]:
    """Return the names of all registered losses, sorted."""
    return _LOSSES.names()


@register_loss("self-distillation")
class SelfDistillationLoss(nn.Module):
    """Label, distillation and hint terms of all exits, as a weighted sum.

    Has no parameters. Computed in at least float32, inside autocast too. Logits and features beyond +-1e14 count as
    +-1e14, with a gradient of zero, so that no finite input gives NaN or infinity; NaN stays NaN.

    Args:
        config: The settings; without, those of the preset byot-iccv2019.

    Attributes:
        needs_exits: Whether a term of the exits has a weight. If not, only the last entry of the output's logits is
            read, and its term is "ce/0".
        needs: Whether the teacher is the average of the weights, and whether `kd_weight` is warmed up.

    Raises:
        ValueError: If the divergence or teacher is not registered, or the divergence has no such setting.
    """

    def __init__(self, config: SelfDistillationConfig | None = None) -> None:
        super().__init__()
        self.config = BYOT_ICCV2019 if config is None else config
        self.needs_exits = bool(self.config.ce_weight or self.config.kd_weight or self.config.hint_weight)
        self._divergence = bind_settings(self.config.divergence, self.config.divergence_kwargs)
        self._teacher = get_teacher(self.config.teacher)
        distills = bool(self.config.kd_weight)
        self.needs = Needs(
            ema=distills and needs_ema(self._teacher), time=distills and bool(self.config.kd_warmup_epochs)
        )
        self._hint_distance = HINT_DISTANCES[self.config.hint_distance]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SelfDistillationLoss":
        """Return the loss with published settings.

        Args:
            name: One of `list_presets()`.
            **overrides: Fields of `SelfDistillationConfig` that differ from the preset.

        Raises:
            ValueError: If the preset or a field is unknown, or a value is not allowed.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; known are {', '.join(list_presets())}.")
        known = [field.name for field in fields(SelfDistillationConfig)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"Unknown settings {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(replace(PRESETS[name], **overrides))

    def forward(
        self, out: ExitOutput, target: Tensor, *, ema: ExitOutput | None = None, time: TrainingTime | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            out: Logits [B, C] and features [B, D] of K exits and the backbone; features only if hints have a weight.
            target: Class indices [B] int64, or class probabilities [B, C] floating.
            ema: What the average of the weights answers, for a teacher that takes it.
            time: How far training has come, for the warm-up of `kd_weight`.

        Returns:
            "loss", the weighted sum, and each term that has a weight, unweighted and detached: "ce/0" to "ce/K",
            "kd/0" to "kd/K-1" and "hint/0" to "hint/K-1", shallow to deep; "ce/K" is the backbone's.

        Raises:
            ValueError: If a shape or dtype is not as above, or `ema` or `time` is needed and missing. Values are looked
                at on the CPU only, as that would stall a GPU: there, a target must hold indices of classes, or
                probabilities that are not negative and sum to 1.
        """
        config = self.config
        if not self.needs_exits:
            out = ExitOutput(out.logits[-1:], ())
        self._check(out, target, ema)
        exits = len(out.logits) - 1
        with torch.autocast(target.device.type, enabled=False):
            logits = stack(out.logits)
            first = 0 if config.ce_weight else exits
            last = exits + 1 if config.deepest_ce_weight else exits
            ce = cross_entropy(logits[first:last], target, config.label_smoothing)
            # Kind, index of the first exit, weight, and one value per exit.
            parts = [
                ("ce", first, config.ce_weight, ce[: exits - first]),
                ("ce", exits, config.deepest_ce_weight, ce[exits - first :]),
            ]
            if config.kd_weight:
                averaged = () if ema is None or not self.needs.ema else ema.logits
                parts.append(("kd", 0, self._kd_weight(time), self._distill(logits, target, averaged)))
            if config.hint_weight:
                difference = stack(out.features[:-1]) - stack(out.features[-1:]).detach()
                parts.append(("hint", 0, config.hint_weight, self._hint_distance(difference).mean(-1)))
            loss = torch.stack(
                [
                    weight * (values if start == exits else self._weigh_exits(values)).sum()
                    for _, start, weight, values in parts
                ]
            ).sum()
        terms = {"loss": loss}
        for kind, start, _, values in parts:
            terms |= {f"{kind}/{start + i}": value for i, value in enumerate(values.detach().unbind())}
        return terms

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.config).items())

    def _check(self, out: ExitOutput, target: Tensor, ema: ExitOutput | None) -> None:
        check_entries("logits", "C", out.logits)
        if self.needs_exits and len(out.logits) == 1:
            raise ValueError(
                "The loss has terms for the exits, but the output holds one entry, the backbone's own; allowed are the "
                "output of a model with exits, called with return_exits=True, or the preset 'none'."
            )
        if self.config.hint_weight:
            check_entries("features", "D", out.features)
            if len(out.features) != len(out.logits) or len(out.features[0]) != len(out.logits[0]):
                raise ValueError(
                    f"The output holds features {shapes(out.features)} for logits {shapes(out.logits)}; allowed is "
                    f"one [B, D] for each [B, C]."
                )
        check_target(target, out.logits[0].shape)
        if self.needs_exits:
            self.config.check_exits(len(out.logits) - 1)
        if self.needs.ema:
            if ema is None:
                raise ValueError(
                    f"The teacher {self.config.teacher!r} is the average of the weights, but its output is missing: "
                    "call the loss with the keyword ema, or train a SelfDistillationTask behind task.setup_ema()."
                )
            check_entries("logits of the average", "C", ema.logits)
            if len(ema.logits) != len(out.logits) or ema.logits[0].shape != out.logits[0].shape:
                raise ValueError(
                    f"The average's output holds logits {shapes(ema.logits)}; allowed is what the model's own has, "
                    f"{shapes(out.logits)}."
                )

    def _kd_weight(self, time: TrainingTime | None) -> float:
        """Return the weight of the divergences at a time of the training."""
        config = self.config
        if not config.kd_warmup_epochs:
            return config.kd_weight
        if time is None:
            raise ValueError(
                "kd_warmup_epochs needs the time: call the loss with the keyword time, or train a SelfDistillationTask "
                "with task.set_time() before each step."
            )
        return config.kd_weight * min(time.epoch / config.kd_warmup_epochs, 1.0)

    def _weigh_exits(self, values: Tensor) -> Tensor:
        """Multiply the value of each exit by the exit's weight."""
        weights = self.config.exit_weights
        return values if weights is None else values * values.new_tensor(weights)[: len(values)]

    def _distill(self, logits: Tensor, target: Tensor, averaged: Sequence[Tensor]) -> Tensor:
        """Return each exit's divergence from its teacher, or the mean of those from its teachers."""
        student = logits[:-1]
        given = {"ema": stack(averaged).detach()} if averaged else {}
        teachers = self._teacher(logits.detach(), **given)
        if isinstance(teachers, Tensor):
            self._check_teachers(teachers.shape == student.shape, teachers.shape, student.shape)
            return self._diverge(student, teachers, target)
        sizes = [teacher.shape for teacher in teachers]
        fit = len(sizes) == len(student) and all(size[0] and size[1:] == student.shape[1:] for size in sizes)
        self._check_teachers(fit, sizes, student.shape)
        repeated = torch.cat([own.expand_as(teacher) for own, teacher in zip(student, teachers, strict=True)])
        values = self._diverge(repeated, torch.cat(tuple(teachers)), target)
        return torch.stack([of_exit.mean() for of_exit in values.split_with_sizes([size[0] for size in sizes])])

    def _check_teachers(self, fit: bool, found: Sequence[Any], student: torch.Size) -> None:
        if not fit:
            sizes = [list(size) if isinstance(size, torch.Size) else size for size in found]
            raise ValueError(
                f"Teacher {self.config.teacher!r} returned {sizes}; allowed is one [B, C] per exit, {list(student)}, "
                "or a list with one [S, B, C] per exit."
            )

    def _diverge(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the divergences of logits [N, B, C] from logits [N, B, C], one value each [N]."""
        config = self.config
        if config.standardize_logits:
            student, teacher = standardize(student), standardize(teacher)
        scale = config.temperature**2 if config.t_squared else 1.0
        values = self._divergence(student, teacher, target, temperature=config.temperature, scale=scale)
        if values.shape != student.shape[:1]:
            raise ValueError(
                f"Divergence {config.divergence!r} returned {list(values.shape)}; allowed is one value per exit, "
                f"{list(student.shape[:1])}."
            )
        return values
