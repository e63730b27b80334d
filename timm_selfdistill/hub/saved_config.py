"""`config.json` of a saved model: timm's, with one more key of ours; checked before anything is built."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from timm.data.model_config import resolve_input_data_config

from timm_selfdistill.checks import is_integer, is_number
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.heads import AUTO, PUBLISHED
from timm_selfdistill.model import SelfDistillModel

CONFIG: Final = "config.json"
KEY: Final = "timm_selfdistill"
_FORMAT_VERSION: Final = 1
# More than the deepest of timm's networks has blocks.
_MAX_EXITS: Final = 1000
_MAX_PIXELS: Final = 4096 * 4096
_MAX_RESIZED_PIXELS: Final = 4 * _MAX_PIXELS
# A configuration with the names of 100,000 classes is about half as large.
_MAX_BYTES: Final = 8 * 2**20
_MAX_VALUES: Final = 10_000
_MAX_CLASSES: Final = 2**24
# Of all whole numbers but the number of classes: widths, depths, sizes. Lists as long as their sum take little memory.
_MAX_SUM: Final = 2**20
_MAX_NAME: Final = 1_000
_LABELS: Final = ("num_classes", "label_names", "label_descriptions")
_MAX_DEPTH: Final = 20
# Where and as what the weights are kept is for this library to decide: on "meta", a model would have none.
_REFUSED_KEYS: Final = ("device", "dtype")


@dataclass(frozen=True)
class Saved:
    """Our key of the configuration: how to wrap the backbone, and the weights' checksums.

    With `exit`, the weights are those of a network that ends there. `run` is what a training run says of itself.
    Without `ensemble`, it is the mean. `head_kwargs` are those of all exits, or a list of those of each.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: int
    exits: Annotated[list[str], Field(min_length=1, max_length=_MAX_EXITS)]
    head: str
    head_kwargs: dict[str, Any] | list[dict[str, Any]]
    hint_adapter: bool
    small_stem: bool
    image_size: Annotated[list[int], Field(min_length=2, max_length=2)]
    sha256: dict[str, str]
    early_exit: Any = None
    exit: int | None = None
    run: Any = None
    ensemble: Any = None


def describe(
    model: SelfDistillModel,
    sha256: dict[str, str],
    *,
    early_exit: EarlyExitConfig | None = None,
    exit: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> Saved:
    """Return our key for a model; `sha256` holds the checksum of each file of weights."""
    config = model.wrap_config
    # The dry run's size, not the saved input size, at which the taps' grids may differ.
    if config.image_size is not None:
        check_image("image_size", config.image_size)
    own_size = resolve_input_data_config(model.backbone, {"mean": 0.5, "std": 0.5})["input_size"][1:]
    return Saved(
        format_version=_FORMAT_VERSION,
        exits=[point.name for point in model.points],
        head=config.head,
        head_kwargs=list(map(dict, config.head_kwargs)),
        hint_adapter=config.hint_adapter,
        small_stem=config.small_stem,
        image_size=list(config.image_size or own_size),
        sha256=sha256,
        early_exit=None if early_exit is None else early_exit.to_json(),
        exit=exit,
        run=None if run is None else dict(run),
        ensemble=None if exit is not None or model.ensemble.is_mean else model.ensemble.to_json(),
    )


def read_config(folder: Path) -> Saved:
    """Return our key of the configuration in a folder, after all of the configuration was checked."""
    path = folder / CONFIG
    if not path.is_file():
        message = f"{folder} holds no model: there is no {CONFIG} in it."
        if (folder / "checkpoints").is_dir():
            message += (
                " Of a run that was stopped, --from-checkpoint takes the newest checkpoint, and "
                f"`timm-selfdistill finish {folder}` makes the model of it."
            )
        raise ValueError(message)
    config = read_json(path)
    ours = config.get(KEY) if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"{path} has no key {KEY!r}: a model of plain timm is loaded by timm.create_model.")
    version = ours.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r:.40}, this version of timm_selfdistill reads {_FORMAT_VERSION}: "
            "upgrade timm_selfdistill."
        )
    try:
        check_config(config)
        saved = TypeAdapter(Saved).validate_json(json.dumps(ours), strict=True)
        _check_arguments("head_kwargs", saved.head_kwargs)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is damaged: in {KEY!r}, {wrong:.1000}.") from error
    except ValueError as error:
        raise ValueError(f"{path} asks for what is not allowed: {error}") from error
    # Written before there were budgets, when "auto" stood for the published heads.
    return replace(saved, head=PUBLISHED) if saved.head == AUTO else saved


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; ValueError if it is too large, no JSON, or readers could differ on its meaning."""
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
    """Raise ValueError if timm's configuration has arguments that are too large, refused, or not of JSON's kinds."""
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    for name, value in (("model_args", arguments), ("pretrained_cfg", pretrained)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r:.80}; allowed is an object.")
    refused = [key for key in _REFUSED_KEYS if key in arguments]
    if refused:
        raise ValueError(f"model_args holds {', '.join(refused)}, which is for the loading side to say.")
    classes = {"num_classes": arguments.get("num_classes"), "num_classes of the whole": config.get("num_classes")}
    for name, value in classes.items():
        if isinstance(value, int) and not 0 <= value <= _MAX_CLASSES:
            raise ValueError(f"{name} is {value}; allowed are 0 to {_MAX_CLASSES}.")
    labels = config.get("label_names")
    if isinstance(labels, list) and any(len(str(name)) > _MAX_NAME for name in labels):
        raise ValueError(f"label_names holds one of more than {_MAX_NAME:,} characters, the most that is allowed.")
    _check_arguments("pretrained_cfg", {key: value for key, value in pretrained.items() if key not in _LABELS})
    _check_arguments("model_args", {key: value for key, value in arguments.items() if key != "num_classes"})
    for prefix in ("", "test_"):
        if (size := pretrained.get(f"{prefix}input_size")) is not None:
            _check_input(prefix, size, pretrained.get(f"{prefix}crop_pct"))


def check_image(name: str, size: Iterable[int]) -> None:
    """Raise ValueError unless height and width of an image are numbers of pixels, and not too many."""
    height, width = size
    whole = all(is_integer(side) and side > 0 for side in (height, width))
    if not whole or height * width > _MAX_PIXELS:
        raise ValueError(
            f"{name} is {height!r:.40} x {width!r:.40}; allowed are whole numbers of pixels, {_MAX_PIXELS:,} in all."
        )


def class_names(model: SelfDistillModel) -> tuple[str, ...] | None:
    """Return a model's class names in the order of the logits, or None where none were saved with it.

    Names that the backbone had before its classifier was replaced are not the model's.
    """
    config = getattr(model.backbone, "pretrained_cfg", {})
    names = config.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list | tuple):
        raise ValueError(f"The model's label_names are {names!r:.200}; allowed is a list of names.")
    if model.num_classes not in (len(names), config.get("num_classes", model.num_classes)):
        return None
    return complete_names(tuple(map(str, names)), model.num_classes)


def complete_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return a name for each class: those given, and for the rest, which no data had, their indices."""
    if len(names) > num_classes:
        raise ValueError(
            f"{len(names)} label_names ({', '.join(map(str, names[:5])):.200}, ...) for {num_classes} classes: give at "
            "most one for each."
        )
    given = set(names)
    rest = (str(index) for index in range(len(names), num_classes))
    return (*names, *(name if name not in given else f"class {name}" for name in rest))


def _check_arguments(name: str, arguments: Mapping[str, Any] | Sequence[Any]) -> None:
    """Check the number and the size of the values in nested objects and lists."""
    count = total = 0
    waiting: list[tuple[Any, int]] = [(arguments, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"{name} holds more than {_MAX_VALUES:,} values, the most that is allowed.")
        if depth > _MAX_DEPTH:
            raise ValueError(f"{name} is nested more than {_MAX_DEPTH} levels deep.")
        if isinstance(value, Mapping | list | tuple):
            waiting += ((item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value))
        elif isinstance(value, float) and not abs(value) <= _MAX_SUM:
            raise ValueError(f"{name} holds the number {value}; allowed are finite ones up to {_MAX_SUM:,}.")
        elif isinstance(value, int):
            total += abs(value)
    if total > _MAX_SUM:
        raise ValueError(f"The whole numbers in {name} add up to more than {_MAX_SUM:,}, the most that is allowed.")


def _check_input(prefix: str, size: Any, crop_pct: Any) -> None:
    """Check the size of images, and of what they are resized to before the border is cut."""
    name = f"{prefix}input_size"
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise ValueError(f"{name} is {size!r:.80}; allowed are channels, height and width.")
    check_image(name, size[1:])
    if crop_pct is None:
        return
    if not is_number(crop_pct) or crop_pct <= 0 or size[1] * size[2] / crop_pct**2 > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{prefix}crop_pct is {crop_pct!r:.40} for images of {size[1]} x {size[2]}; allowed is a share by which "
            f"they are resized to {_MAX_RESIZED_PIXELS:,} pixels or less."
        )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r:.80} stands in it twice")
    return found
