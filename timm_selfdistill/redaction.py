"""Leave out of text what nobody may read: tokens, passwords, and where things are on this machine."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Final

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
# A shorter one would be found in words that are none.
_LEAST: Final = 6


def redact(text: str, tokens: Iterable[str] = ()) -> str:
    """Return text without tokens and passwords.

    Args:
        text: The text.
        tokens: Tokens to look for, besides those in the environment and what looks like one.
    """
    known = {token.strip() for token in (*tokens, *(os.environ.get(name, "") for name in _VARIABLES))}
    for token in sorted(known, key=len, reverse=True):
        if len(token) >= _LEAST:
            text = text.replace(token, _MASK)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def without_places(text: str, places: Mapping[str, str]) -> str:
    """Return text that tells nothing of where things are on this machine.

    Args:
        text: The text.
        places: Paths, and what stands for each; for any other below the home folder, its last name does.
    """
    for place in sorted(places, key=len, reverse=True):
        # Not within a longer name: /data/al is no part of /data/alice.
        text = re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w-]|\.\w)", places[place].replace("\\", r"\\"), text)
    home = os.path.expanduser("~").rstrip("/")
    if not home:
        return text
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w-]|\.\w)((?:/[^\s/'\"`,;:()\[\]]+)*)", _last_name, text)


def _last_name(match: re.Match[str]) -> str:
    return match[1].rpartition("/")[2] or "~"
