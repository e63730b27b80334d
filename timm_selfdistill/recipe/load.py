"""Find, read and override recipes, and say everything that is wrong with them at once."""

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from timm_selfdistill.checks import did_you_mean, expand_home
from timm_selfdistill.recipe.plain_yaml import MAX_BYTES, dump, parse, unplain
from timm_selfdistill.recipe.recipe import LOCAL, RECIPE, Recipe, merge

# Of the problems of a recipe, and of what is said of each.
_MOST_PROBLEMS = 40
_MOST_CHARACTERS = 400
_LOCAL_HEADER = "# Paths of this machine that belong to the run in this folder; timm_selfdistill never pushes them."
_OVERRIDE_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")

# Where pydantic's own words would be Python's, or say less.
_PHRASES = {
    "dict_type": "must be a mapping",
    "invalid_key": "must be named by text",
    "is_instance_of": "must be a list",
    "model_type": "must be a mapping",
    "sequence_str": "must be a list",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has one line for each thing that is wrong with it.

    Args:
        source: The recipe, as messages name it.
        problems: What is wrong, each as "path: what is wrong, received ...".
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source, self.problems = source, tuple(problems)
        super().__init__(self.source, self.problems)

    def __str__(self) -> str:
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "a problem"
        shown = [_shorten(problem, _MOST_CHARACTERS) for problem in self.problems[:_MOST_PROBLEMS]]
        if len(self.problems) > len(shown):
            shown.append(f"and {len(self.problems) - len(shown):,} more")
        return "\n  ".join((f"Recipe {_shorten(self.source, _MOST_CHARACTERS)} has {count}:", *shown))


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    check: Callable[[Mapping[str, Any], bool], Sequence[str]] | None = None,
) -> Recipe:
    """Read and validate a recipe.

    The `recipe.yaml` of a run holds no paths of the machine; they are taken from the `local.yaml` beside it, and
    `output_dir` is the run's folder.

    Args:
        source: Path of a YAML file, or the name of a shipped recipe ("./name" for a file of that name), or what such a
            file holds.
        overrides: Changes as "section.key=value"; the value is read as YAML, and later ones win.
        check: Takes what the recipe holds, and whether something is wrong with it, and returns what else is.

    Returns:
        The recipe, its `output_dir` always set.

    Raises:
        RecipeError: If there is no such recipe, or if anything in it or in the overrides is wrong; lists all of it.
    """
    if isinstance(source, Mapping):
        path = Path("recipe")
        if problems := list(unplain(dict(source))):
            raise RecipeError(path.stem, problems)
        mapping = copy.deepcopy(dict(source))
    else:
        path = _shipped().get(str(source), Path(expand_home(str(source))))
        mapping = _read(path)
        beside = path.with_name(LOCAL)
        if path.name == RECIPE and is_local(beside):
            mapping = merge(mapping, _read(beside))
            mapping["output_dir"] = mapping.get("output_dir") or str(path.parent)
    problems = [problem for override in overrides for problem in _override(mapping, override)]
    if mapping.get("output_dir") is None:
        mapping["output_dir"] = f"runs/{path.stem}"
    try:
        recipe = Recipe.model_validate(mapping)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += map(_sentence, errors[:_MOST_PROBLEMS])
        # Counted, but not put into words, which takes long.
        problems += (f"{_path(item['loc'])}: is wrong" for item in errors[_MOST_PROBLEMS:])
    if check is not None:
        problems += check(mapping, bool(problems))
    if problems:
        raise RecipeError(path.stem if isinstance(source, Mapping) else str(source), list(dict.fromkeys(problems)))
    return recipe


def dump_local(recipe: Recipe) -> str:
    """Return the content of a run's `local.yaml`: the paths of this machine in its recipe."""
    return f"{_LOCAL_HEADER}\n{dump(recipe.local_paths())}"


def is_local(path: Path) -> bool:
    """Whether a file was made by `dump_local`, and is not somebody else's of the same name."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip() == _LOCAL_HEADER
    except OSError:
        return False


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Read settings "key=value", written like a recipe's overrides; a `ValueError` lists all that are wrong."""
    mapping: dict[str, Any] = {}
    if problems := [problem for override in overrides for problem in _override(mapping, override)]:
        raise ValueError("; ".join(problems))
    return mapping


def list_recipes() -> list[str]:
    """Return the names of the recipes shipped with the library, sorted."""
    return sorted(_shipped())


def read_shipped(name: str) -> str:
    """Return the text of a shipped recipe; a name that none has is a `ValueError`."""
    if (path := _shipped().get(name)) is None:
        known = list_recipes()
        raise ValueError(
            f"There is no shipped recipe {name!r}; shipped are {', '.join(known)}{did_you_mean(name, known)}"
        )
    return path.read_text(encoding="utf-8")


def summary_of(name: str) -> str:
    """Return the beginning of the comment of a shipped recipe, up to the first full stop or colon."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), read_shipped(name).splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"[.:](?:\s|$)", comment, maxsplit=1)[0]


def _shipped() -> dict[str, Path]:
    """Return the shipped recipes' files by name: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in folder.glob("*.yaml")}


def _read(path: Path) -> dict[str, Any]:
    """Return the file's mapping, or raise RecipeError."""
    problems: list[str] = []
    value = None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            problems = [f"has more than {MAX_BYTES:,} bytes, the most that is allowed"]
        else:
            value, problems = parse(data.decode("utf-8-sig"))
    except FileNotFoundError:
        known = list_recipes()
        hint = did_you_mean(path.stem, known)
        problems = [f"neither the path of a file nor a shipped recipe; shipped are {', '.join(known)}{hint}"]
    except UnicodeDecodeError as error:
        problems = [f"must be text in UTF-8: {error.reason} at byte {error.start}"]
    except (OSError, ValueError) as error:
        problems = [f"cannot be read: {getattr(error, 'strerror', None) or error}"]
    if not problems and not isinstance(value, dict):
        received = "an empty file" if value is None else _show(value)
        problems = [f"must be a mapping of sections, such as `model: {{name: resnet18}}`, received {received}"]
    if problems:
        raise RecipeError(str(path), problems)
    return dict(value or {})


def _override(mapping: dict[str, Any], override: str) -> Iterator[str]:
    """Write one "section.key=value" into `mapping`, or yield what is wrong with it."""
    key, equals, text = override.partition("=")
    where = f"override {_shorten(repr(override), 200)}: "
    if not equals or not _OVERRIDE_KEY.fullmatch(key):
        yield f"{where}must have the form section.key=value"
        return
    if not text.strip():
        yield f"{where}has no value; write {key}=null if none is meant"
        return
    *parents, last = key.split(".")
    value, problems = parse(text, depth=len(parents) + 1)
    if problems:
        yield from (where + problem for problem in problems)
        return
    for depth, parent in enumerate(parents, start=1):
        if mapping.get(parent) is None:
            mapping[parent] = {}
        mapping, owner = mapping[parent], mapping
        if not isinstance(mapping, dict):
            yield f"{where}{'.'.join(parents[:depth])} is not a mapping, received {_show(owner[parent])}"
            return
    mapping[last] = value


def _sentence(error: ErrorDetails) -> str:
    """Say one of pydantic's errors as "path: what is wrong, received ..."."""
    location, kind = error["loc"], error["type"]
    if kind == "extra_forbidden":
        allowed = _section(location[:-1]).model_fields
        hint = did_you_mean(str(location[-1]), allowed) or f"; allowed are {', '.join(allowed)}"
        return f"{_path(location)}: unknown key{hint}"
    if kind == "conflict":
        return f"{_path(location)}.{error['msg']}"
    if kind == "missing" and isinstance(location[-1], str):
        return f"{_path(location)}: is required"
    hint = ""
    if kind == "literal_error" and isinstance(error["input"], str):
        hint = did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    if kind == "missing":
        location, phrase = location[:-1], "must have 2 entries"  # only pairs have a fixed length
    else:
        phrase = _PHRASES.get(kind) or re.sub(r"^(Value error, must|\w+ should)", "must", error["msg"])
    return f"{_path(location)}: {phrase}, received {_show(error['input'])}{hint}"


def _section(parents: Sequence[int | str]) -> type[BaseModel]:
    """Return the class of the section at a path."""
    section: type[BaseModel] = Recipe
    for name in parents:
        annotation = section.model_fields[str(name)].annotation
        kinds = (annotation, *get_args(annotation))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section


def _path(location: Sequence[int | str]) -> str:
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part or repr(part)}" for part in location
    ).removeprefix(".")


def _show(value: Any) -> str:
    """Return a value as a recipe writes it, shortened."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _shorten(repr(list(value) if isinstance(value, tuple) else value), 80)


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
