"""An exit's network: a registered body that embeds its tap, and a linear classifier."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.heads.bodies import HEADS, PUBLISHED, choose_head


class ExitHead(nn.Module):
    """An exit's network: a body that embeds what is tapped, and a linear classifier on what the body returns.

    Where the backbone has several branches at the point, each has its own body, and what they return is averaged. Where
    that is not a feature of the teacher's width, a linear layer makes one of it, for the hints only.

    Args:
        point: The exit point that is read.
        feature_dim: Width D of the teacher's feature.
        num_classes: Number of logits.
        head: Name of a registered body, or "published" for the one that suits the taps.
        head_kwargs: Further arguments of the body.
        hint_adapter: Report the feature through a trainable linear layer, as the journal version does before it
            compares features; the classifier still reads the body's own output.
    """

    def __init__(
        self,
        point: ExitPoint,
        feature_dim: int,
        num_classes: int,
        head: str = PUBLISHED,
        head_kwargs: Mapping[str, Any] | None = None,
        hint_adapter: bool = False,
    ) -> None:
        super().__init__()
        name = choose_head(point) if head == PUBLISHED else head
        bodies = [_build_body(name, tap, feature_dim, head_kwargs or {}) for tap in point.taps]
        self.body = bodies[0] if len(bodies) == 1 else _Branches(bodies)
        width = int(getattr(bodies[0], "out_features", feature_dim))
        self.classifier = nn.Linear(width, num_classes)
        self.adapter = nn.Linear(width, feature_dim) if hint_adapter or width != feature_dim else nn.Identity()

    def classify(self, *taps: Tensor) -> Tensor:
        """Return logits [B, num_classes] alone."""
        logits: Tensor = self.classifier(self.body(*taps))
        return logits

    def forward(self, *taps: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, num_classes] and the feature [B, D] that the hint compares."""
        embedding = self.body(*taps)
        return self.classifier(embedding), self.adapter(embedding)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of `num_classes` logits."""
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)


class _Branches(nn.ModuleList):
    def forward(self, *taps: Tensor) -> Tensor:
        return torch.stack([body(tap) for body, tap in zip(self, taps, strict=True)]).mean(0)


def each_head_kwargs(
    head_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]], num_exits: int
) -> tuple[Mapping[str, Any], ...]:
    """Return the arguments of each exit's head, from those of all or a list; ValueError if it is another number."""
    if isinstance(head_kwargs, Mapping):
        return (dict(head_kwargs),) * num_exits
    if len(head_kwargs) != num_exits or not all(isinstance(kwargs, Mapping) for kwargs in head_kwargs):
        raise ValueError(
            f"head_kwargs is {head_kwargs!r:.200}; allowed is a mapping, or a list of one for each of the {num_exits} "
            "exits."
        )
    return tuple(dict(kwargs) for kwargs in head_kwargs)


def _build_body(head: str, tap: Tap, feature_dim: int, head_kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the registered body `head`, unless this machine's memory cannot hold it."""
    cls = HEADS.get(head)
    allowed = list(inspect.signature(cls).parameters)[2:]
    unknown = sorted(set(head_kwargs) - set(allowed))
    if unknown:
        raise ValueError(
            f"Head {head!r} takes no argument {', '.join(unknown)}; allowed are {', '.join(allowed) or 'none'}."
        )
    if head_kwargs:
        needed, available = _num_bytes(partial(cls, tap, feature_dim, **head_kwargs)), psutil.virtual_memory().total
        if needed > available:
            raise ValueError(
                f"head_kwargs {dict(head_kwargs)}: head {head!r} at {tap.name!r} would have parameters of "
                f"{needed / 2**30:,.0f} GiB, and this machine has {available / 2**30:,.0f} GiB; give smaller numbers."
            )
    return cls(tap, feature_dim, **head_kwargs)


def _num_bytes(build: Callable[[], nn.Module]) -> float:
    """Return the size of a body's parameters, before any memory is taken for them."""
    try:
        with torch.device("meta"):
            return sum(parameter.nbytes for parameter in build().parameters())
    except (RuntimeError, TypeError, OverflowError) as error:
        # Some third-party bodies compute numbers while they are built, and fail on the meta device.
        return math.inf if "overflow" in str(error).lower() else 0
