"""The settings of the loss and of a teacher from outside: written here once, published by name, taken by recipes."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Final, Literal, get_type_hints

from pydantic import BeforeValidator, create_model, field_validator

from timm_selfdistill.checks import (
    Arguments,
    BelowOne,
    Gate,
    ModelArguments,
    NotNegative,
    Positive,
    Probability,
    Section,
    Temperature,
    Text,
    Weights,
    check,
    expand_home,
    is_number,
)
from timm_selfdistill.recipe.training_sections import LOCAL_MODEL

WEIGHTS: Final = ("ce_weight", "deepest_ce_weight", "kd_weight", "hint_weight", "deepest_kd_weight")


@dataclass(frozen=True)
class SelfDistillationConfig:
    """Settings of `SelfDistillationLoss`; the defaults are those of the preset byot-iccv2019.

    Args:
        ce_weight: Weight of each added exit's cross-entropy with the target; both papers use 1 - kd_weight.
        deepest_ce_weight: Weight of the backbone's own cross-entropy with the target.
        kd_weight: Weight of each exit's divergence from its teacher.
        hint_weight: Weight of each exit's distance from the backbone's feature.
        temperature: Softmax temperature of both sides of the divergence, from 1e-6 to 1,000; not used by "mse".
        t_squared: Multiply what is computed at the temperature T by T^2, which keeps its gradient independent of T.
        divergence: Name of a registered divergence.
        teacher: Name of a registered teacher.
        hint_distance: "squared_l2", the squared Euclidean distance of the two features, or "l2", the distance; summed
            over the width of the feature and averaged over the batch, so it does not depend on the batch size.
        label_smoothing: Share of the target given evenly to all classes, less than 1, as `F.cross_entropy` does it, for
            class indices and for probabilities. Leave it 0 where the targets are smoothed already, as timm's Mixup
            does.
        divergence_kwargs: Settings of the divergence itself, such as {"alpha": 1.0, "beta": 8.0} of "dkd".
        standardize_logits: Before any divergence, subtract the mean of each sample's logits and divide by their
            standard deviation, for exits and teachers ("Logit Standardization in Knowledge Distillation",
            https://arxiv.org/abs/2403.01427); the paper takes the temperature 2 and the weight 9.
        kd_warmup_epochs: Epochs over which `kd_weight` and `deepest_kd_weight` rise linearly from 0.
        exit_weights: One factor above 0 for all terms of each added exit, shallow to deep; None for 1.
        gate: What the gradient of an exit is multiplied by where it enters the backbone; the exit itself gets all of
            it. One number for all exits, or one each, shallow to deep: with 0 the backbone trains as it would without
            exits. "equilibrium" is 1 / (K - i + 1) for exit i of K, after https://arxiv.org/abs/1908.06294.
        gate_fade: Share of the training, its last part, over which the gate falls linearly to 0.
        deepest_kd_weight: Weight of the divergence of the backbone's own classifier from the teacher, for one that
            teaches it too: "ensemble", "ema" and "ema-same-exit" do. It is warmed up as `kd_weight` is.
        class_weights: One factor above 0 for the cross-entropy of each class with the target, of every exit and of the
            backbone, as `weight` of `F.cross_entropy`; None for 1. The weighted samples are averaged over their number,
            not over the sum of their weights. Recipes also take "balanced": N / (C n) for a class with n of the N
            training images, of C classes with images; 1 for one without.

    Raises:
        ValueError: If a value is not allowed. Names of divergence and teacher are looked up by the loss.
    """

    ce_weight: NotNegative = 0.9
    deepest_ce_weight: NotNegative = 1.0
    kd_weight: NotNegative = 0.1
    hint_weight: NotNegative = 1e-6 * 128
    temperature: Temperature = 3.0
    t_squared: bool = True
    divergence: Text = "kl"
    teacher: Text = "deepest"
    hint_distance: Literal["squared_l2", "l2"] = "squared_l2"
    label_smoothing: BelowOne = 0.0
    divergence_kwargs: Arguments = field(default_factory=dict, hash=False)
    standardize_logits: bool = False
    kd_warmup_epochs: NotNegative = 0.0
    exit_weights: Weights = None
    gate: Gate = 1.0
    gate_fade: Probability = 0.0
    deepest_kd_weight: NotNegative = 0.0
    class_weights: Weights = None

    def __post_init__(self) -> None:
        _check_fields(self, _TYPES)
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"All weights are 0; at least one of {', '.join(WEIGHTS)} must be positive.")

    def check_exits(self, num_exits: int) -> None:
        """Raise `ValueError` unless there is one weight, and one number of the gate, for each of K added exits."""
        for name in ("exit_weights", "gate"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != num_exits:
                raise ValueError(f"{name} has {len(values)} values for {num_exits} added exits; allowed is one each.")

    def check_classes(self, num_classes: int) -> None:
        """Raise `ValueError` unless there is a weight for each class, if for any."""
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} values for {num_classes} classes; allowed is one each."
            )


@dataclass(frozen=True)
class OutsideTeacherConfig:
    """How a model from outside teaches: `weight` times the divergence of each taught classifier from its logits.

    The defaults are the usual ones of "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531,
    on small images; networks for ImageNet are often taught at temperature 1.

    Args:
        weight: Weight of each of these divergences, beside what the loss has.
        temperature: Softmax temperature of both sides of the divergence, from 1e-6 to 1,000; not used by "mse".
        t_squared: Multiply what is computed at the temperature T by T^2.
        divergence: Name of a registered divergence.
        divergence_kwargs: Settings of the divergence itself, such as {"alpha": 1.0, "beta": 8.0} of "dkd".
        standardize_logits: As in `SelfDistillationConfig`.
        teaches: Whom it teaches: the added exits, the backbone's own classifier, or both.

    Raises:
        ValueError: If a value is not allowed. The divergence is looked up by the teacher.
    """

    weight: Positive = 1.0
    temperature: Temperature = 4.0
    t_squared: bool = True
    divergence: Text = "kl"
    divergence_kwargs: Arguments = field(default_factory=dict, hash=False)
    standardize_logits: bool = False
    teaches: Literal["exits", "backbone", "both"] = "both"

    def __post_init__(self) -> None:
        _check_fields(self, _TEACHER_TYPES)


def _check_fields(config: Any, types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        # As what it was checked to be: lists become tuples.
        object.__setattr__(config, name, check(name, getattr(config, name), kind))


_TYPES: Final[dict[str, Any]] = get_type_hints(SelfDistillationConfig, include_extras=True)
_TEACHER_TYPES: Final[dict[str, Any]] = get_type_hints(OutsideTeacherConfig, include_extras=True)

BYOT_ICCV2019: Final = SelfDistillationConfig()
"""Be Your Own Teacher, ICCV 2019, https://arxiv.org/abs/1905.08094

For each exit i with logits z_i and feature F_i, and C the backbone's own:
`(1 - a) CE(z_i, y) + a T^2 KL(softmax(z_C / T) || softmax(z_i / T)) + l ||F_i - F_C||^2`, and `CE(z_C, y)`; each term
a mean over the batch. The paper names neither a, T nor l. They are those of a widely used re-implementation,
https://github.com/luanyunteng/pytorch-be-your-own-teacher: a = 0.1, T = 3, and 1e-6 for the squares summed over the
batch of 128, which is l = 1.28e-4 for their mean.

That code differs from the paper, and from here: it also weights the backbone's CE by 1 - a (`deepest_ce_weight=0.9`
does so); it writes soft cross-entropy for KL (same gradient); and it leaves out of the hint where both features are
negative or zero (no difference after a ReLU).
"""

BYOT_TPAMI2021: Final = SelfDistillationConfig(
    ce_weight=0.7, kd_weight=0.3, hint_weight=0.03 * math.sqrt(128), t_squared=False, hint_distance="l2"
)
"""Self-Distillation: Towards Efficient and Compact Neural Networks, TPAMI 44(8), https://doi.org/10.1109/TPAMI.2021.3067100

For each exit i: `(1 - a) CE(z_i, y) + a KL(softmax(z_C / T) || softmax(z_i / T)) + l ||A_i F_i - F_C||`, and
`CE(z_C, y)`; each term a mean over the batch. a = 0.3 and T = 3, without T^2, are those of the authors' code,
https://github.com/ArchipLab-LinfengZhang/pytorch-self-distillation-final. A_i is a trainable linear adapter: it
belongs to the model (`wrap(..., hint_adapter=True)`).

That code takes `torch.dist` of the two [B, D] matrices times 0.03, which is the root of the summed squares of the whole
batch and so grows with sqrt(B). Here l = 0.03 sqrt(128) for the mean of the samples' distances: at the published batch
of 128 the same value and gradient when all samples are equally far, a smaller value otherwise. It also leaves the hint
out for the deepest added exit (its comment says the shallowest); here every exit has one. It writes soft cross-entropy
for KL (same gradient).
"""

DEEP_SUPERVISION: Final = SelfDistillationConfig(ce_weight=1.0, kd_weight=0.0, hint_weight=0.0)
"""Deeply-Supervised Nets, AISTATS 2015, https://arxiv.org/abs/1409.5185, and the ablation a = l = 0 of ICCV 2019.

`CE(z_i, y)` for each exit and the backbone, each with weight 1 and a mean over the batch: what the exits alone do,
without any distillation. The 2015 paper uses squared hinge losses whose weights fade; the ablation, as here, does not.
"""

ENSEMBLE_DISTILLATION: Final = SelfDistillationConfig(
    ce_weight=1.0, kd_weight=0.3, hint_weight=0.0, teacher="ensemble", deepest_kd_weight=0.3
)
"""The default: `deep-supervision`, and the ensemble of all classifiers teaches each of them.

With E the mean of all logits, or the fitted ensemble of a model that has one, for each exit and the backbone:
`CE(z_i, y) + 0.3 T^2 KL(softmax(E / T) || softmax(z_i / T))`, T = 3; each term a mean over the batch. The ensemble as
the teacher of all exits is that of "Students are the Best Teacher: Exit-Ensemble Distillation with Multi-Exits",
https://arxiv.org/abs/2104.00299, whose weights are others. This is no paper's loss: it was chosen on images held out of
training, docs/gain.md.
"""

NONE: Final = SelfDistillationConfig(ce_weight=0.0, kd_weight=0.0, hint_weight=0.0)
"""The baseline: `CE(z_C, y)`, a mean over the batch, of the backbone alone; the exits need not run."""

PRESETS: Final[dict[str, SelfDistillationConfig]] = {
    "byot-iccv2019": BYOT_ICCV2019,
    "byot-tpami2021": BYOT_TPAMI2021,
    "deep-supervision": DEEP_SUPERVISION,
    "ensemble-distillation": ENSEMBLE_DISTILLATION,
    "none": NONE,
}
DEFAULT_PRESET: Final = "ensemble-distillation"


def list_presets() -> list[str]:
    """Return the names of the presets of `SelfDistillationLoss`, sorted."""
    return sorted(PRESETS)


def _class_weights(value: Any) -> Any:
    if value is None or value == "balanced":
        return value
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) < 2 or not all(is_number(number) and number > 0 for number in numbers):
        raise ValueError("must be balanced, null or a list with a number above 0 for each class")
    return tuple(map(float, numbers))


_NULLABLE: Any = {name: (kind | None, None) for name, kind in _TYPES.items()}
# Only the data tells what "balanced" stands for.
_ClassWeights = Annotated[Literal["balanced"] | tuple[float, ...] | None, BeforeValidator(_class_weights)]
_NULLABLE["class_weights"] = (_ClassWeights, None)
_LossFields: Any = create_model(
    "_LossFields", name=(Text, "self-distillation"), preset=(Text | None, DEFAULT_PRESET), **_NULLABLE
)


class LossSection(_LossFields, Section):  # type: ignore[misc]  # a class made of the fields above
    """The training loss: a preset and what differs from it.

    Args:
        name: Name of a registered loss.
        preset: Name of published settings.
        SelfDistillationConfig: Each of its fields; null keeps the preset's value.
        kwargs: Arguments of a loss without exits, or of one registered by another package.
    """

    kwargs: Arguments = {}

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of `SelfDistillationConfig` that differ from the preset; balanced weights are left to the data."""
        found = {name: getattr(self, name) for name in _TYPES if getattr(self, name) is not None}
        return {name: value for name, value in found.items() if (name, value) != ("class_weights", "balanced")}

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        if name == "kwargs" and value and before.get("name") == cls.model_fields["name"].default:
            return "must be empty for this library's own loss, whose settings are the other keys of `loss`"
        return None


_TAUGHT: Any = {
    each.name: (_TEACHER_TYPES[each.name], {} if each.default is MISSING else each.default)
    for each in fields(OutsideTeacherConfig)
}
_TeacherFields: Any = create_model("_TeacherFields", name=(Text, ...), kwargs=(ModelArguments, {}), **_TAUGHT)


class TeacherSection(_TeacherFields, Section):  # type: ignore[misc]  # a class made of the fields above
    """A model from outside that teaches, frozen.

    Args:
        name: Name of a timm model, whose pretrained weights are taken; or a model's folder or repository on the Hub,
            one of this library's or of timm's.
        kwargs: Further arguments of `timm.create_model`; weights in a file are
            `pretrained_cfg_overlay: {file: PATH}`.
        OutsideTeacherConfig: Each of its fields.
    """

    @field_validator("name")
    @classmethod
    def _expand_name(cls, value: str) -> str:
        prefix = LOCAL_MODEL if value.startswith(LOCAL_MODEL) else ""
        return prefix + expand_home(value.removeprefix(prefix))

    @property
    def config(self) -> OutsideTeacherConfig:
        """How it teaches."""
        return OutsideTeacherConfig(**{name: getattr(self, name) for name in _TEACHER_TYPES})
