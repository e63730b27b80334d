"""The loss that trains all exits and the backbone together, and the registry of such losses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_selfdistill.losses.divergences import HINT_DISTANCES, get_divergence
from timm_selfdistill.losses.presets import BYOT_ICCV2019, PRESETS, SelfDistillationConfig, list_presets
from timm_selfdistill.losses.teachers import get_teacher
from timm_selfdistill.model import ExitOutput
from timm_selfdistill.registry import Registry

LossClass = TypeVar("LossClass", bound=type[nn.Module])

_LIMIT: Final = 1e14
_LOSSES: Registry[type[nn.Module]] = Registry("loss", "timm_selfdistill.losses")
get_loss = _LOSSES.get


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Return a decorator that registers a loss class as `name`.

    The class is an `nn.Module`, called with `(out: ExitOutput, target)`, that returns a dict of scalars with at least
    "loss", and has an attribute `needs_exits`: whether `out` must hold the exits' entries.

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

    Raises:
        ValueError: If the divergence or teacher is not registered.
    """

    def __init__(self, config: SelfDistillationConfig | None = None) -> None:
        super().__init__()
        self.config = BYOT_ICCV2019 if config is None else config
        self.needs_exits = bool(self.config.ce_weight or self.config.kd_weight or self.config.hint_weight)
        self._divergence = get_divergence(self.config.divergence)
        self._teacher = get_teacher(self.config.teacher)
        self._hint_distance = HINT_DISTANCES[self.config.hint_distance]

    @classmethod
    def from_preset(cls, name: str, **overrides: float | bool | str) -> "SelfDistillationLoss":
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
        return cls(replace(PRESETS[name], **overrides))  # type: ignore[arg-type]  # the config checks the values

    def forward(self, out: ExitOutput, target: Tensor) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            out: Logits [B, C] and features [B, D] of K exits and the backbone; features only if hints have a weight.
            target: Class indices [B] int64, or class probabilities [B, C] floating.

        Returns:
            "loss", the weighted sum, and each term that has a weight, unweighted and detached: "ce/0" to "ce/K",
            "kd/0" to "kd/K-1" and "hint/0" to "hint/K-1", shallow to deep; "ce/K" is the backbone's.

        Raises:
            ValueError: If a shape or dtype is not as above. Values are not looked at, as that would stall a GPU.
        """
        config = self.config
        if not self.needs_exits:
            out = ExitOutput(out.logits[-1:], ())
        self._check(out, target)
        exits = len(out.logits) - 1
        with torch.autocast(target.device.type, enabled=False):
            logits = _stack(out.logits)
            first = 0 if config.ce_weight else exits
            last = exits + 1 if config.deepest_ce_weight else exits
            ce = _cross_entropy(logits[first:last], target, config.label_smoothing)
            # Kind, index of the first exit, weight, and one value per exit.
            parts = [
                ("ce", first, config.ce_weight, ce[: exits - first]),
                ("ce", exits, config.deepest_ce_weight, ce[exits - first :]),
            ]
            if config.kd_weight:
                parts.append(("kd", 0, config.kd_weight, self._distill(logits, target)))
            if config.hint_weight:
                difference = _stack(out.features[:-1]) - _stack(out.features[-1:]).detach()
                parts.append(("hint", 0, config.hint_weight, self._hint_distance(difference).mean(-1)))
            loss = torch.stack([weight * values.sum() for _, _, weight, values in parts]).sum()
        terms = {"loss": loss}
        for kind, start, _, values in parts:
            terms |= {f"{kind}/{start + i}": value for i, value in enumerate(values.detach().unbind())}
        return terms

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.config).items())

    def _check(self, out: ExitOutput, target: Tensor) -> None:
        _check_entries("logits", "C", out.logits)
        if self.needs_exits and len(out.logits) == 1:
            raise ValueError(
                "The loss has terms for the exits, but the output holds one entry, the backbone's own; allowed are the "
                "output of a model with exits, called with return_exits=True, or the preset 'none'."
            )
        if self.config.hint_weight:
            _check_entries("features", "D", out.features)
            if len(out.features) != len(out.logits) or len(out.features[0]) != len(out.logits[0]):
                raise ValueError(
                    f"The output holds features {_shapes(out.features)} for logits {_shapes(out.logits)}; allowed is "
                    f"one [B, D] for each [B, C]."
                )
        shape = out.logits[0].shape
        indices = target.dtype == torch.int64 and target.shape == shape[:1]
        if not indices and not (target.is_floating_point() and target.shape == shape):
            raise ValueError(
                f"The target is {target.dtype} {list(target.shape)}; allowed are class indices, torch.int64 "
                f"{list(shape[:1])}, and class probabilities, floating {list(shape)}."
            )

    def _distill(self, logits: Tensor, target: Tensor) -> Tensor:
        config, student = self.config, logits[:-1]
        teacher = self._teacher(logits.detach())
        if teacher.shape != student.shape:
            raise ValueError(
                f"Teacher {config.teacher!r} returned {list(teacher.shape)}; allowed is one [B, C] per exit, "
                f"{list(student.shape)}."
            )
        scale = config.temperature**2 if config.t_squared else 1.0
        values = self._divergence(student, teacher, target, temperature=config.temperature, scale=scale)
        if values.shape != student.shape[:1]:
            raise ValueError(
                f"Divergence {config.divergence!r} returned {list(values.shape)}; allowed is one value per exit, "
                f"{list(student.shape[:1])}."
            )
        return values


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    exits, batch, _ = logits.shape
    if target.is_floating_point():
        target = target.to(logits.dtype)
    target = target.expand(exits, *target.shape).flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), target, reduction="none", label_smoothing=label_smoothing)
    return losses.view(exits, batch).mean(-1)


def _stack(entries: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(tuple(entries))
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    # Beyond about 1e38 differences of finite values are infinite, and zero times infinity is NaN; squares summed over
    # a batch need more room still.
    return stacked.clamp(-_LIMIT, _LIMIT)


def _check_entries(kind: str, width: str, entries: Sequence[Tensor]) -> None:
    shape = entries[0].shape if entries else torch.Size()
    valid = all(entry.shape == shape and entry.is_floating_point() for entry in entries)
    if not valid or len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"The output holds {kind} {_shapes(entries)}; allowed are floating tensors of one shape [B, {width}], "
            "none of them empty."
        )


def _shapes(entries: Sequence[Tensor]) -> str:
    return ", ".join(f"{entry.dtype} {list(entry.shape)}" for entry in entries) or "nothing"
