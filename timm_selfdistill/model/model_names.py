"""Whether timm has a model of a name, and weights for it, without building or downloading anything."""

import difflib
from typing import Final

import timm
from timm.models import get_pretrained_cfg, is_model_pretrained

import timm_selfdistill.backbones  # noqa: F401  # registers our networks with timm

# What timm takes in front of a model's name: where its configuration is.
SOURCES: Final = ("hf-hub:", "hf_hub:", "local-dir:")
_MOST_SIMILAR = 3


def model_problem(name: str, *, pretrained: bool = False) -> str | None:
    """Return what is wrong with the name of a timm model, None if nothing is known to be.

    Args:
        name: The name, with a tag of pretrained weights or without.
        pretrained: Whether weights are wanted.
    """
    if name.startswith(SOURCES):
        return None
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return f"must be the name of a timm model, received {name!r}{_hint(architecture, timm.list_models())}"
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            known = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
            listed = f"; {architecture} has {', '.join(known)}" if known else f"; {architecture} has none"
            return f"has no weights {tag!r}{listed}{_hint(tag, known)}"
    if pretrained and not is_model_pretrained(name):
        return f"must be false, as timm has no weights of {name!r}"
    return None


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=_MOST_SIMILAR)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
