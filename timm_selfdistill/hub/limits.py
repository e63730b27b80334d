"""What a stranger's `config.json` may ask for, checked before anything is built from it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

MAX_PIXELS: Final = 4096 * 4096
_MAX_RESIZED_PIXELS: Final = 4 * MAX_PIXELS
# A configuration with the names of 100,000 classes is about half as large.
_MAX_BYTES: Final = 8 * 2**20
_MAX_VALUES: Final = 10_000
_MAX_CLASSES: Final = 2**24
# Of all whole numbers but the number of classes: widths, depths, sizes. Lists as long as their sum take little memory.
_MAX_SUM: Final = 2**20
_MAX_NAME: Final = 1_000
_LABELS: Final = ("num_classes", "label_names", "label_descriptions")
_MAX_DEPTH: Final = 20
# Where and as what the weights are kept is for this library to say: on "meta", a model would have none.
_REFUSED_KEYS: Final = ("device", "dtype")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: If it is too large, no JSON, or holds a key twice or a number that is none.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; allowed are {_MAX_BYTES:,}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deep.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_config(config: Mapping[str, Any]) -> None:
    """Check what a configuration asks for beyond the weights, which tell how large a model is.

    Args:
        config: timm's configuration, with our key or without.

    Raises:
        ValueError: If an argument of the model is of another kind than JSON has, too large or refused, or if the image
            is too large.
    """
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    for name, value in (("model_args", arguments), ("pretrained_cfg", pretrained)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r:.80}; allowed is an object.")
    refused = [key for key in _REFUSED_KEYS if key in arguments]
    if refused:
        raise ValueError(f"model_args holds {', '.join(refused)}, which is for the loading side to say.")
    classes = {key: arguments.get(key) for key in ("num_classes",)}
    classes["num_classes of the whole"] = config.get("num_classes")
    for name, value in classes.items():
        if isinstance(value, int) and not 0 <= value <= _MAX_CLASSES:
            raise ValueError(f"{name} is {value}; allowed are 0 to {_MAX_CLASSES}.")
    labels = config.get("label_names")
    if isinstance(labels, list) and any(len(str(name)) > _MAX_NAME for name in labels):
        raise ValueError(f"label_names holds one of more than {_MAX_NAME:,} characters, the most that is allowed.")
    plain = {key: value for key, value in pretrained.items() if key not in _LABELS}
    check_arguments("pretrained_cfg", plain)
    check_arguments("model_args", {key: value for key, value in arguments.items() if key != "num_classes"})
    for prefix in ("", "test_"):
        if (size := pretrained.get(f"{prefix}input_size")) is not None:
            _check_input(prefix, size, pretrained.get(f"{prefix}crop_pct"))


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check the number and the size of the values in arguments.

    Raises:
        ValueError: If there are too many, or they are too large.
    """
    values = list(_leaves(name, arguments, 0, [0]))
    whole = sum(abs(value) for value in values if isinstance(value, int))
    if whole > _MAX_SUM:
        raise ValueError(f"The whole numbers in {name} add up to more than {_MAX_SUM:,}, the most that is allowed.")


def check_image(name: str, size: Iterable[int]) -> None:
    """Check height and width of an image.

    Raises:
        ValueError: If they are no numbers of pixels, or too many.
    """
    height, width = size
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width))
    if not whole or height * width > MAX_PIXELS:
        raise ValueError(
            f"{name} is {height!r:.40} x {width!r:.40}; allowed are whole numbers of pixels, {MAX_PIXELS:,} in all."
        )


def _check_input(prefix: str, size: Any, crop_pct: Any) -> None:
    """Check the size of images, and of what they are resized to before the border is cut."""
    name = f"{prefix}input_size"
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise ValueError(f"{name} is {size!r:.80}; allowed are channels, height and width.")
    check_image(name, size[1:])
    if crop_pct is None:
        return
    number = isinstance(crop_pct, int | float) and not isinstance(crop_pct, bool)
    if not number or not 0 < crop_pct < math.inf or size[1] * size[2] / crop_pct**2 > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{prefix}crop_pct is {crop_pct!r:.40} for images of {size[1]} x {size[2]}; allowed is a share by which "
            f"they are resized to {_MAX_RESIZED_PIXELS:,} pixels or less."
        )


def _leaves(name: str, value: Any, depth: int, count: list[int]) -> Iterable[Any]:
    """Yield the values in nested objects and lists, while they are not too many."""
    count[0] += 1
    if count[0] > _MAX_VALUES:
        raise ValueError(f"{name} holds more than {_MAX_VALUES:,} values, the most that is allowed.")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} is nested more than {_MAX_DEPTH} levels deep.")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(name, item, depth + 1, count)
        return
    if isinstance(value, float) and not abs(value) <= _MAX_SUM:
        raise ValueError(f"{name} holds the number {value}; allowed are finite ones up to {_MAX_SUM:,}.")
    yield value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} stands in it twice")
    return found
