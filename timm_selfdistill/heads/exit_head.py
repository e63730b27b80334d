"""An exit's network: a registered body for each tapped tensor, and a linear classifier."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.heads.bodies import HEADS


class ExitHead(nn.Module):
    """An exit's network: a body that embeds what is tapped, and a linear classifier on what the body returns.

    Where the backbone has several branches there, each has a body of its own, and their features are averaged.

    Args:
        point: The exit point that is read.
        feature_dim: Width D of the teacher's feature.
        num_classes: Number of logits.
        head: Name of a registered body, or "auto": `token` for NLC, NCL and NHWC taps, `bottleneck` for an NCHW tap,
            `linear` for each of several NCHW branches.
        head_kwargs: Further arguments of the body.
        hint_adapter: Report the feature through a trainable linear layer, as the journal version does before it
            compares features; the classifier still reads the body's own output.

    Raises:
        ValueError: If the name or an argument of the head is unknown, or the head cannot read the tap's layout.
    """

    def __init__(
        self,
        point: ExitPoint,
        feature_dim: int,
        num_classes: int,
        head: str = "auto",
        head_kwargs: Mapping[str, Any] | None = None,
        hint_adapter: bool = False,
    ) -> None:
        super().__init__()
        name = choose_head(point) if head == "auto" else head
        bodies = [_build_body(name, tap, feature_dim, head_kwargs or {}) for tap in point.taps]
        self.body = bodies[0] if len(bodies) == 1 else _Branches(bodies)
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.adapter = nn.Linear(feature_dim, feature_dim) if hint_adapter else nn.Identity()

    def classify(self, *taps: Tensor) -> Tensor:
        """Return logits [B, num_classes] alone."""
        logits: Tensor = self.classifier(self.body(*taps))
        return logits

    def forward(self, *taps: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, num_classes] and the feature [B, D] that the hint compares."""
        feature = self.body(*taps)
        return self.classifier(feature), self.adapter(feature)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of `num_classes` logits."""
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)


class _Branches(nn.ModuleList):
    """One body a branch; the mean of what they return."""

    def forward(self, *taps: Tensor) -> Tensor:
        return torch.stack([body(tap) for body, tap in zip(self, taps, strict=True)]).mean(0)


def choose_head(point: ExitPoint) -> str:
    """Return the name of the head that "auto" means at an exit point."""
    if any(tap.layout != "NCHW" for tap in point.taps):
        return "token"
    return "bottleneck" if len(point.taps) == 1 else "linear"


def _build_body(head: str, tap: Tap, feature_dim: int, head_kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the registered body `head`."""
    cls = HEADS.get(head)
    allowed = list(inspect.signature(cls).parameters)[2:]
    unknown = sorted(set(head_kwargs) - set(allowed))
    if unknown:
        raise ValueError(
            f"Head {head!r} takes no argument {', '.join(unknown)}; allowed are {', '.join(allowed) or 'none'}."
        )
    build = partial(cls, tap, feature_dim, **head_kwargs)
    if head_kwargs:
        _check_memory(build, f"head_kwargs {dict(head_kwargs)}: head {head!r} at {tap.name!r}")
    return build()


def _check_memory(build: Callable[[], nn.Module], what: str) -> None:
    """Refuse a body that this machine's memory cannot hold, before any of it is taken."""
    available = psutil.virtual_memory().total
    try:
        with torch.device("meta"):
            needed = sum(parameter.nbytes for parameter in build().parameters())
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            return  # some third-party bodies compute numbers while they are built
        raise ValueError(f"{what} would have more parameters than can be counted; give smaller numbers.") from error
    if needed > available:
        raise ValueError(
            f"{what} would have parameters of {needed / 2**30:,.0f} GiB, and this machine has {available / 2**30:,.0f} "
            "GiB of memory; give smaller numbers."
        )
