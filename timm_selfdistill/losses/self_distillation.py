"""The loss that trains all exits and the backbone together."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.losses.divergences import HINT_DISTANCES, bind_divergence
from timm_selfdistill.losses.protocol import (
    Needs,
    TrainingTime,
    check_entries,
    check_target,
    cross_entropy,
    register_loss,
    shapes,
    stack,
)
from timm_selfdistill.losses.teachers import get_teacher
from timm_selfdistill.model import Ensemble, ExitOutput
from timm_selfdistill.recipe.loss_settings import DEFAULT_PRESET, PRESETS, SelfDistillationConfig, list_presets


@register_loss("self-distillation")
class SelfDistillationLoss(nn.Module):
    """Label, distillation and hint terms of all exits, as a weighted sum.

    With logits z_i, feature F_i and weight w_i of each exit i, and z and F of the backbone, it is the sum of
    `w_i (ce_weight CE(z_i, y) + kd_weight D(z_i, t_i) + hint_weight H(F_i, F))` over the exits and of
    `deepest_ce_weight CE(z, y) + deepest_kd_weight D(z, t)`. CE is the cross-entropy with the target y, D the
    divergence from the logits t of the teacher, H the distance of two features.

    Has no parameters. Computed in at least float32, inside autocast too. Logits and features beyond +-1e14 count as
    +-1e14, with a gradient of zero, so that no finite input gives NaN or infinity; NaN stays NaN.

    Args:
        config: The settings, or the name of a preset, one of `list_presets()`; ensemble-distillation by default.

    Attributes:
        config: The settings.
        needs: What the loss is called with besides `out` and `target`. Without `needs.exits`, also called
            `needs_exits`, it reads the last entry of the output only.

    Raises:
        ValueError: If the preset, divergence or teacher is unknown, or the divergence has no such setting.
    """

    def __init__(self, config: SelfDistillationConfig | str = DEFAULT_PRESET) -> None:
        super().__init__()
        self.config = config = _preset(config) if isinstance(config, str) else config
        self._divergence = bind_divergence(config)
        self._teacher = get_teacher(config.teacher)
        self._hint_distance = HINT_DISTANCES[config.hint_distance]
        takes = signature(self._teacher).parameters
        if config.deepest_kd_weight and "backbone" not in takes:
            raise ValueError(
                f"deepest_kd_weight is {config.deepest_kd_weight}, but the teacher {config.teacher!r} has nothing to "
                "teach the backbone; allowed are those that do, such as ensemble, ema and ema-same-exit."
            )
        self._distils = distils = bool(config.kd_weight or config.deepest_kd_weight)
        exits = bool(config.ce_weight or config.hint_weight) or distils
        self.needs = Needs(
            exits=exits,
            features=bool(config.hint_weight),
            ema=distils and "ema" in takes,
            time=bool(distils and config.kd_warmup_epochs),
            ensemble=distils and "ensemble" in takes,
            gate=config.gate if exits else 1.0,
            gate_fade=config.gate_fade if exits else 0.0,
        )

    @property
    def needs_exits(self) -> bool:
        return self.needs.exits

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SelfDistillationLoss":
        """Return the loss with published settings.

        Args:
            name: One of `list_presets()`.
            **overrides: Fields of `SelfDistillationConfig` that differ from the preset.

        Raises:
            ValueError: If the preset or a field is unknown, or a value is not allowed.
        """
        preset = _preset(name)
        known = [field.name for field in fields(SelfDistillationConfig)]
        if unknown := sorted(overrides.keys() - set(known)):
            raise ValueError(f"Unknown settings {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(replace(preset, **overrides))

    def forward(
        self,
        out: ExitOutput,
        target: Tensor,
        *,
        ema: ExitOutput | None = None,
        time: TrainingTime | None = None,
        ensemble: Ensemble | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            out: Logits [B, C] and features [B, D] of K exits and the backbone; features only if hints have a weight.
            target: Class indices [B] int64, or class probabilities [B, C] floating.
            ema: The output of the average of the weights, for a teacher that takes it.
            time: How far training has come, for the warm-up of `kd_weight`.
            ensemble: How the outputs are combined, for a teacher that takes it; their mean by default.

        Returns:
            "loss", the weighted sum, and each term that has a weight, unweighted and detached: "ce/0" to "ce/K",
            "kd/0" to "kd/K" and "hint/0" to "hint/K-1", shallow to deep; "ce/K" and "kd/K" are the backbone's.

        Raises:
            ValueError: If a shape or dtype is not as above, `ema` or `time` is needed and missing, or, on the CPU only,
                a target holds no indices of classes, or probabilities that are negative or do not sum to 1.
        """
        config = self.config
        out = self._checked(out, target, ema)
        with torch.autocast(target.device.type, enabled=False):
            logits = stack(out.logits)
            none = logits.new_zeros(0)
            entropies = cross_entropy(logits, target, config.label_smoothing, config.class_weights)
            ce = entropies[:-1] if config.ce_weight else none
            ce_backbone = entropies[-1:] if config.deepest_ce_weight else none
            kd, kd_backbone = self._distill(logits, target, ema, ensemble) if self._distils else (none, none)
            hint = self._compare_features(out.features) if config.hint_weight else none
            warmth = self._warmth(time)
            loss = (
                config.ce_weight * self._sum_exits(ce)
                + config.deepest_ce_weight * ce_backbone.sum()
                + config.kd_weight * warmth * self._sum_exits(kd)
                + config.hint_weight * self._sum_exits(hint)
                + config.deepest_kd_weight * warmth * kd_backbone.sum()
            )
        terms = {"loss": loss}
        deepest = len(out.logits) - 1
        shown = (("ce", 0, ce), ("ce", deepest, ce_backbone), ("kd", 0, kd), ("kd", deepest, kd_backbone))
        for kind, first, values in (*shown, ("hint", 0, hint)):
            # `|=` is not for torch.compile of torch 2.6.
            terms.update({f"{kind}/{index}": value for index, value in enumerate(values.detach().unbind(), first)})
        return terms

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.config).items())

    def _distill(
        self, logits: Tensor, target: Tensor, ema: ExitOutput | None, ensemble: Ensemble | None
    ) -> tuple[Tensor, Tensor]:
        """Return the divergences of the exits [K] and of the backbone [1] from their teachers, [0] without a weight."""
        config, none = self.config, logits.new_zeros(0)
        given: dict[str, Any] = {"ema": stack(ema.logits).detach()} if ema is not None and self.needs.ema else {}
        if self.needs.ensemble:
            given["ensemble"] = Ensemble.mean(len(logits)) if ensemble is None else ensemble
        if not config.deepest_kd_weight:
            return self._compare(logits[:-1], self._teacher(logits.detach(), **given), target), none
        values = self._compare(logits, self._teacher(logits.detach(), backbone=True, **given), target)
        return values[:-1] if config.kd_weight else none, values[-1:]

    def _compare(self, student: Tensor, teachers: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the divergence of each student from its teacher, or the mean of those from its teachers [N]."""
        shape = list(student.shape)
        found: list[Any]
        if isinstance(teachers, Tensor):
            found = list(teachers.shape)
            fit = found == shape
        else:
            found = [list(teacher.shape) for teacher in teachers]
            fit = len(found) == len(student) and all(size[0] and size[1:] == shape[1:] for size in found)
        if not fit:
            raise ValueError(
                f"Teacher {self.config.teacher!r} returned {found}; allowed is one [B, C] per exit, {shape}, "
                "or a list with one [S, B, C] per exit."
            )
        if isinstance(teachers, Tensor):
            return self._divergence(student, teachers, target)
        repeated = torch.cat([own.expand_as(teacher) for own, teacher in zip(student, teachers, strict=True)])
        values = self._divergence(repeated, torch.cat(tuple(teachers)), target)
        return torch.stack([of_exit.mean() for of_exit in values.split_with_sizes([len(each) for each in teachers])])

    def _compare_features(self, features: Sequence[Tensor]) -> Tensor:
        """Return the distance of each exit's feature from the backbone's [K]."""
        return self._hint_distance(stack(features[:-1]) - stack(features[-1:]).detach()).mean(-1)

    def _warmth(self, time: TrainingTime | None) -> float:
        """Return the share of the divergences' weights at a time of the training."""
        if not self.config.kd_warmup_epochs or not self.needs.time:
            return 1.0
        if time is None:
            raise ValueError(
                "kd_warmup_epochs needs the time: call the loss with the keyword time, or train a SelfDistillationTask "
                "with task.set_time() before each step."
            )
        return min(time.epoch / self.config.kd_warmup_epochs, 1.0)

    def _sum_exits(self, values: Tensor) -> Tensor:
        weights = self.config.exit_weights
        return (values if weights is None else values * values.new_tensor(weights)[: len(values)]).sum()

    def _checked(self, out: ExitOutput, target: Tensor, ema: ExitOutput | None) -> ExitOutput:
        """Return the output that the loss is computed from; raise ValueError if a shape or dtype is wrong."""
        if isinstance(out, Tensor):
            raise ValueError(
                f"The output is one tensor {list(out.shape)}; allowed is an ExitOutput, which the model returns "
                "when it is called with return_exits=True."
            )
        if not self.needs.exits:
            out = ExitOutput(out.logits[-1:], ())
        check_entries("logits", "C", out.logits)
        if self.needs.exits and len(out.logits) == 1:
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
        self.config.check_classes(out.logits[0].shape[-1])
        if self.needs.exits:
            self.config.check_exits(len(out.logits) - 1)
        if self.needs.ema:
            if ema is None:
                raise ValueError(
                    f"The teacher {self.config.teacher!r} is the average of the weights, but its output is missing: "
                    "call the loss with the keyword ema, or train a SelfDistillationTask after task.setup_ema()."
                )
            check_entries("logits of the average", "C", ema.logits)
            if len(ema.logits) != len(out.logits) or ema.logits[0].shape != out.logits[0].shape:
                raise ValueError(
                    f"The average's output holds logits {shapes(ema.logits)}; allowed is what the model's own has, "
                    f"{shapes(out.logits)}."
                )
        return out


def _preset(name: str) -> SelfDistillationConfig:
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; known are {', '.join(list_presets())}.")
    return PRESETS[name]
