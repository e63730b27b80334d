"""The types of a recipe's fields, which check their values, and what all sections have in common.

Names of heads, losses, optimizers and the like are looked up by the parts that own them, so that reading a recipe needs
neither torch nor timm.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be two numbers above 0, the smaller one first")
    return pair


def _arguments(*reserved: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a check of arguments passed on to others: finite numbers, and none of those given by keys of their own."""

    def check(arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(arguments.keys() & set(reserved)):
            raise ValueError(f"must not set {', '.join(taken)}, which this library passes itself")
        if not _all_finite(arguments):
            raise ValueError("must hold finite numbers only")
        if _sum_of_whole(arguments) > _MAX_SUM:
            raise ValueError(f"must hold whole numbers that add up to at most {_MAX_SUM:,}")
        return arguments

    return check


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_all_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _sum_of_whole(value: Any) -> int:
    """Return the sum of the whole numbers: as long is what is listed by widths, depths and sizes, at most."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_sum_of_whole, value))
    return abs(value) if isinstance(value, int) else 0


_MAX_SUM = 2**24
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
# A saved model takes no larger image either.
ImageSide = Annotated[int, Field(ge=1, le=4096)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
ExitWeights = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
Epochs = Annotated[tuple[Count, ...], Field(strict=False)]
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments())]
ModelArguments = Annotated[dict[str, Any], AfterValidator(_arguments("model_name", "pretrained", "num_classes"))]
OptimizerArguments = Annotated[
    dict[str, Any],
    AfterValidator(
        _arguments("model_or_params", "opt", "lr", "weight_decay", "momentum", "layer_decay", "filter_bias_and_bn")
    ),
]


class Section(BaseModel):
    """A part of a recipe: immutable, complete, and without unknown keys."""

    # Defaults are validated too because the checks that compare fields must see them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
