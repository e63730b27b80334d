"""YAML 1.2 restricted to plain values: what a recipe may hold, and nothing that constructs, repeats or surprises."""

import io
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# Ten times the longest recipe one would write, and what is read within a second or two.
MAX_BYTES: Final = 64 * 2**10
_MAX_VALUES: Final = 10_000
_MAX_DEPTH = 20
_MAX_DIGITS = 25
_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_PREFIX + name for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep"
_yaml = partial(YAML, typ="safe", pure=True)


def parse(text: str, depth: int = 0) -> tuple[Any, list[str]]:
    """Read a document of text, numbers, true, false, null, lists and mappings with text keys.

    Args:
        text: The document.
        depth: How many levels deep its value will be placed in another one.

    Returns:
        The value (None for an empty document, or where there are problems) and a sentence for each problem.
    """
    try:
        if problem := _excess(text, depth):
            return None, [problem]
        yaml = _yaml()
        root = yaml.compose(text)
        problems = list(dict.fromkeys(_problems(root, depth))) if root is not None else []
        if re.search(r"^%", text, flags=re.MULTILINE):
            problems.append("directives (%) are not allowed: recipes are YAML 1.2")
        return (None, problems) if problems or root is None else (yaml.constructor.construct_document(root), [])
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return None, [f"{where}not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}"]
    except YAMLError as error:
        return None, [f"not valid YAML: {str(error).splitlines()[0]}"]
    except RecursionError:
        return None, [_TOO_DEEP]
    except ValueError as error:  # a scalar that does not fit its explicit tag, such as `!!int x`
        return None, [f"not valid YAML: {error}"]
    except LookupError:  # the same, such as `!!bool x` or an empty `!!float`
        return None, ["not valid YAML: a value does not fit its explicit tag"]


def _excess(text: str, depth: int) -> str | None:
    """Say in what a document is too large to be composed; reading its events alone costs little up to there."""
    if len(text) > MAX_BYTES:
        return f"has {len(text):,} characters; allowed are {MAX_BYTES:,}"
    values = 0
    for event in _yaml().parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        values += isinstance(event, NodeEvent)
        # One level more is what `_problems` names.
        if depth > _MAX_DEPTH + 1:
            return f"line {event.start_mark.line + 1}: {_TOO_DEEP}"
        if values > _MAX_VALUES:
            return f"holds more than {_MAX_VALUES:,} values"
    return None


def unplain(value: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """Yield what a value at a path and depth holds that `parse` would not return, each as "path: what is wrong"."""
    if depth > _MAX_DEPTH:
        yield f"{path}: {_TOO_DEEP}"
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from unplain(item, f"{path}.{key or repr(key)}".removeprefix("."), depth + 1)
            else:
                yield f"{path or 'the recipe'}: a key must be text, received {key!r}"
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from unplain(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str):
        if not _is_unicode(value):
            yield f"{path}: {value!r} is not valid Unicode"
    elif isinstance(value, int):
        if abs(value) >= 10**_MAX_DIGITS:
            yield f"{path}: has more than {_MAX_DIGITS} digits"
    elif not isinstance(value, float | None):
        yield f"{path}: must be text, a number, true, false, null, a list or a mapping, received {value!r}"


def dump(value: dict[str, Any]) -> str:
    """Return plain values as a document that `parse` reads back to equal ones."""
    yaml: Any = _yaml()  # without types for these settings
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def _problems(node: Node, depth: int) -> Iterator[str]:
    """Yield what is not allowed in a composed document, before anything is constructed from it."""
    where = f"line {node.start_mark.line + 1}: "
    if node.anchor:
        # Stopping here keeps a document whose aliases multiply ("billion laughs") from being walked.
        yield f"{where}anchors and aliases are not allowed, received &{node.anchor}"
    elif depth > _MAX_DEPTH:
        yield where + _TOO_DEEP
    elif str(node.tag) not in _PLAIN_TAGS:
        yield (
            f"{where}{_excerpt(node)} is {str(node.tag).replace(_PREFIX, '!!')}; only text, numbers, true, false, "
            "null, lists and mappings are allowed (put what is meant as text in quotes)"
        )
    elif isinstance(node, ScalarNode):
        if str(node.tag) == _PREFIX + "int" and len(node.value) > _MAX_DIGITS:
            yield f"{where}{_excerpt(node)} has more than {_MAX_DIGITS} digits"
        if not _is_unicode(node.value):
            yield f"{where}{_excerpt(node)} is not valid Unicode"
    elif isinstance(node, SequenceNode):
        for item in node.value:
            yield from _problems(item, depth + 1)
    elif isinstance(node, MappingNode):
        yield from _key_problems(node)
        for _, value in node.value:
            yield from _problems(value, depth + 1)


def _key_problems(node: MappingNode) -> Iterator[str]:
    first_lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or str(key.tag) != _PREFIX + "str":
            yield f"line {line}: a key must be text, received {_excerpt(key)}"
        elif key.value in first_lines:
            yield f"line {line}: duplicate key {key.value!r}, given first in line {first_lines[key.value]}"
        else:
            first_lines[key.value] = line
            yield from _problems(key, 0)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _excerpt(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        return "a mapping" if isinstance(node, MappingNode) else "a list"
    return repr(node.value if len(node.value) <= 60 else node.value[:57] + "...")
