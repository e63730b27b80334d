"""The types of settings, which check their values: for recipes, configurations and arguments alike."""

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# Of the whole numbers in arguments: lists of widths, depths and sizes get as long as their sum, at most.
_MAX_SUM = 2**24


def check(name: str, value: Any, kind: Any) -> Any:
    """Return a value that is of a type.

    Args:
        name: What the message calls it.
        value: The value.
        kind: The type, such as `Positive`; its `Field(description=...)`, if any, says what is allowed.

    Raises:
        ValueError: If the value is of another type; bool is not a number here.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        descriptions = [getattr(part, "description", None) for part in getattr(kind, "__metadata__", ())]
        text = next(filter(None, descriptions), error.errors()[0]["msg"].removeprefix("Input should be "))
        raise ValueError(f"{name} is {value!r}; allowed is {text}.") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_STRICT)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return the end of a message that names what is like a word: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


class Section(BaseModel):
    """A part of a recipe: immutable, complete, and without unknown keys."""

    # Defaults are validated too because the checks that compare fields must see them.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, **_STRICT)

    @field_validator("*")
    @classmethod
    def _check_conflict(cls, value: Any, info: ValidationInfo) -> Any:
        if problem := cls.conflict(str(info.field_name), value, info.data):
            raise ValueError(problem)
        return value

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        """Say what is wrong with the value of a field, given the fields before it as far as they are valid."""
        return None


def expand_home(path: str) -> str:
    """Return a path with a leading ~ replaced by the home folder.

    Raises:
        ValueError: If it is the home folder of a user who does not exist.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("must not begin with ~ unless that is a home folder (./~ is a file of that name)")
    return expanded


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be two numbers above 0, the smaller one first")
    return pair


def _factors(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) and value else [value]
    if value != "equilibrium" and not all(is_number(number) and number >= 0 for number in numbers):
        raise ValueError("must be a number of 0 or more, a list with one for each exit, or equilibrium")
    return tuple(value) if isinstance(value, list) else value


def _arguments(*reserved: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return a check of arguments passed on to others: finite numbers, and none of those given by keys of their own."""

    def check_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if taken := sorted(arguments.keys() & set(reserved)):
            raise ValueError(f"must not set {', '.join(taken)}, which this library passes itself")
        leaves = _leaves(arguments)
        if not all(math.isfinite(leaf) for leaf in leaves if isinstance(leaf, float)):
            raise ValueError("must hold finite numbers only")
        if sum(abs(leaf) for leaf in leaves if isinstance(leaf, int)) > _MAX_SUM:
            raise ValueError(f"must hold whole numbers that add up to at most {_MAX_SUM:,}")
        return arguments

    return check_arguments


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


Number = Annotated[float, Field(description="a finite number")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
NotNegative = Annotated[float, Field(ge=0, description="a finite number, 0 or more")]
Probability = Annotated[float, Field(ge=0, le=1, description="a finite number, from 0 to 1")]
Share = Annotated[float, Field(gt=0, le=1, description="a finite number above 0, up to 1")]
BelowOne = Annotated[float, Field(ge=0, lt=1, description="a finite number from 0 to 1, less than 1")]
# Below, logits overflow float32. Above, the softmaxes are so flat that their divergence is rounding: right to some
# percent at 1,000 for logits that differ by 1, wrong at 10,000.
Temperature = Annotated[float, Field(ge=1e-6, le=1e3, description="a finite number, from 1e-06 to 1000")]
Count = Annotated[int, Field(ge=1, description="a whole number, 1 or more")]
Text = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Text, AfterValidator(expand_home)]
# A saved model takes no larger image either.
ImageSide = Annotated[int, Field(ge=1, le=4096)]
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Epochs = Annotated[tuple[Count, ...], Field(strict=False)]
Weights = Annotated[
    Annotated[Sequence[Positive], Field(min_length=1), AfterValidator(tuple)] | None,
    Field(description="None or a list of numbers above 0"),
]
Gate = Annotated[
    float | tuple[float, ...] | Literal["equilibrium"],
    BeforeValidator(_factors),
    Field(description='a number of 0 or more, a sequence with one for each exit, or "equilibrium"'),
]


def _check_mapping(value: Any) -> Any:
    # pydantic 2.11 says of what is none that it is no list either.
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping")
    return value


_Mapping = Annotated[Mapping[str, Any], BeforeValidator(_check_mapping)]
Arguments = Annotated[_Mapping, AfterValidator(_arguments()), Field(description="a mapping, with finite numbers only")]
ModelArguments = Annotated[_Mapping, AfterValidator(_arguments("model_name", "pretrained", "num_classes"))]
OptimizerArguments = Annotated[
    _Mapping,
    AfterValidator(
        _arguments("model_or_params", "opt", "lr", "weight_decay", "momentum", "layer_decay", "filter_bias_and_bn")
    ),
]
