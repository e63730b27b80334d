"""Make text safe to show: what comes from elsewhere moves no cursor, and no token or private path is told."""

import html
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

Value = TypeVar("Value")

# Scripts and emoji are joined and separated by these, without effect on the text around them.
_JOINERS: Final = "\u200c\u200d"
# Control, format (which turn the direction of the text around it), surrogate and separator characters.
_HIDDEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MARKDOWN: Final = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")

_MASK: Final = "***"
_VARIABLES: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# A user and a password, or a token, before the host of an address; what a header holds; tokens of the Hub; and the
# parameters by which an address is signed.
_SECRETS: Final = (
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), _MASK),
    (re.compile(r"(authorization\W{1,6}\w+\s+|['\"]bearer\s+)[^\s'\"\\]+", re.IGNORECASE), rf"\1{_MASK}"),
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"), _MASK),
    (
        re.compile(r"([?&][\w-]*(?:token|signature|credential|password|secret|key)[\w-]*=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{_MASK}",
    ),
)
# A shorter token would be found in ordinary words.
_SHORTEST_TOKEN: Final = 6


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text in which nothing moves the cursor, turns the direction of writing or ends a line.

    Such characters are shown as Python writes them: "\x1b", "\n", "\u202e".

    Args:
        text: The text, or what has one.
        lines: Keep line breaks, in a message of several lines.
    """
    return "".join(_shown(character) if character != "\n" or not lines else "\n" for character in str(text))


def markdown_text(text: str) -> str:
    """Return text that Markdown, also within a table, and HTML show unchanged."""
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
    """Return a link in Markdown; what an address cannot hold is quoted."""
    return f"[{markdown_text(text)}]({quote(address, safe=':/@#?=&%+~')})"


def plot_text(text: str) -> str:
    """Return text that matplotlib draws unchanged, without reading mathematics between dollars."""
    text = printable(text).replace("$", r"\$")
    # A legend leaves out what begins with an underscore.
    return f" {text}" if text.startswith("_") else text


def each_text(value: Value, escape: Callable[[str], str]) -> Value:
    """Return a copy of a value that JSON can hold, with each text in it escaped, except for keys."""
    found: Any = value
    if isinstance(value, str):
        found = escape(value)
    elif isinstance(value, dict):
        found = {key: each_text(item, escape) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(each_text(item, escape) for item in value)
    return cast(Value, found)


def printable_message(message: object) -> str:
    """Return a message of one line or several for a terminal or a log, without tokens and passwords."""
    return printable(redact(str(message)), lines=True)


class PrintableFormatter(logging.Formatter):
    """Formats the records of a log for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return printable_message(super().format(record))


def redact(text: str, tokens: Iterable[str] = ()) -> str:
    """Return text without tokens and passwords.

    Args:
        text: The text.
        tokens: Tokens to look for, besides those in the environment and what looks like one.
    """
    known = {token.strip() for token in (*tokens, *(os.environ.get(name, "") for name in _VARIABLES))}
    for token in sorted(known, key=len, reverse=True):
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, _MASK)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def without_places(text: str, places: Mapping[str, str]) -> str:
    """Return text without paths of this machine.

    Args:
        text: The text.
        places: Paths, and what replaces each; any other path below the home folder is replaced by its last name.
    """
    for place in sorted(places, key=len, reverse=True):
        # Not within a longer name: /data/al is not part of /data/alice.
        text = re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w-]|\.\w)", places[place].replace("\\", r"\\"), text)
    home = os.path.expanduser("~").rstrip("/")
    if not home:
        return text
    pattern = rf"(?<![\w.-]){re.escape(home)}(?![\w-]|\.\w)((?:/[^\s/'\"`,;:()\[\]]+)*)"
    return re.sub(pattern, lambda match: match[1].rpartition("/")[2] or "~", text)


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", errors="backslashreplace").decode()


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
