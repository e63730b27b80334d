"""Text from elsewhere (names of files, classes, data sets, what is in a stranger's file), as it may be shown."""

import html
import logging
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

from timm_selfdistill.redaction import redact

Value = TypeVar("Value")

# What scripts and emoji are joined and separated by has no effect beyond the letters beside it.
_JOINERS: Final = "\u200c\u200d"
# Control, format (which turn the direction of the text around it), surrogate and separator characters.
_HIDDEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MARKDOWN: Final = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text in which nothing moves the cursor, turns the direction of writing or ends a line.

    Such characters are shown as Python writes them: "\x1b", "\n", "\u202e".

    Args:
        text: The text, or what has one.
        lines: Keep line breaks, in a message of several lines.
    """
    return "".join(_shown(character) if character != "\n" or not lines else "\n" for character in str(text))


def markdown_text(text: str) -> str:
    """Return text that Markdown, also within a table, and HTML show as it is."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", html.escape(printable(text), quote=False))


def markdown_code(text: str) -> str:
    """Return text as a span of code in Markdown."""
    text = printable(text)
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence} {text} {fence}" if text.startswith("`") or text.endswith("`") else f"{fence}{text}{fence}"


def markdown_block(text: str, language: str) -> str:
    """Return lines as a block of code in Markdown, which nothing in them ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text.rstrip(), lines=True)}\n{fence}\n"


def markdown_link(text: str, address: str) -> str:
    """Return a link in Markdown.

    Args:
        text: What is shown.
        address: Where it leads to; what an address cannot hold is quoted.
    """
    return f"[{markdown_text(text)}]({quote(address, safe=':/@#?=&%+~')})"


def plot_text(text: str) -> str:
    """Return text that matplotlib draws as it is, without reading mathematics between dollars."""
    text = printable(text).replace("$", r"\$")
    # A legend leaves out what begins with an underscore.
    return f" {text}" if text.startswith("_") else text


def each_text(value: Value, escape: Callable[[str], str]) -> Value:
    """Return a copy of what JSON can hold with every text in it escaped, but for the keys.

    Args:
        value: Objects, lists, tuples, texts, numbers.
        escape: One of the functions above.
    """
    return cast(Value, _each(value, escape))


def printable_message(message: object) -> str:
    """Return a message of one line or several for a terminal or a log, without tokens and passwords."""
    return printable(redact(str(message)), lines=True)


class PrintableFormatter(logging.Formatter):
    """Formats the records of a log for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return printable_message(super().format(record))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", errors="backslashreplace").decode()


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _each(value: Any, escape: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: _each(item, escape) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(item, escape) for item in value)
    return value
