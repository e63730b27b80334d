"""The settings of a teacher from outside: written here once, and taken by recipes."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final, Literal, get_type_hints

from pydantic import BaseModel, create_model, field_validator

from timm_selfdistill.checks import Arguments, ModelArguments, Positive, Section, Temperature, Text, check, expand_home
from timm_selfdistill.recipe.training_sections import LOCAL_MODEL


@dataclass(frozen=True)
class OutsideTeacherConfig:
    """How a model from outside teaches: `weight` times the divergence of each taught classifier from its logits.

    The defaults are the usual ones of "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531,
    on small images; networks for ImageNet are often taught at temperature 1.

    Args:
        weight: Weight of each of these divergences, beside what the loss has.
        temperature: Softmax temperature of both sides of the divergence, from 1e-6 to 1,000; not used by "mse".
        t_squared: Multiply what is computed at the temperature T by T^2, which keeps its gradient independent of T.
        divergence: Name of a registered divergence.
        divergence_kwargs: Settings of the divergence itself, such as {"alpha": 1.0, "beta": 8.0} of "dkd".
        standardize_logits: Before any divergence, subtract the mean of each sample's logits and divide by their
            standard deviation.
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
        for name, kind in _TYPES.items():
            object.__setattr__(self, name, check(name, getattr(self, name), kind))


_TYPES: Final[dict[str, Any]] = get_type_hints(OutsideTeacherConfig, include_extras=True)
_DEFAULTS: Final[dict[str, Any]] = {
    each.name: {} if each.default is MISSING else each.default for each in fields(OutsideTeacherConfig)
}
_FIELDS: Any = {name: (kind, _DEFAULTS[name]) for name, kind in _TYPES.items()}


class _Source(BaseModel):
    name: Text
    kwargs: ModelArguments = {}


_Settings: Any = create_model("_Settings", __base__=_Source, **_FIELDS)


class TeacherSection(_Settings, Section):  # type: ignore[misc]  # a class made of the fields above
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
        return OutsideTeacherConfig(**{name: getattr(self, name) for name in _TYPES})
