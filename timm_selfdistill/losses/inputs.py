"""What every loss does with the output and the target of a batch before it computes."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_LIMIT: Final = 1e14


def stack(entries: Sequence[Tensor]) -> Tensor:
    """Stack tensors in at least float32, clamped to +-1e14."""
    stacked = torch.stack(tuple(entries))
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    # Beyond about 1e38 differences of finite values are infinite, and zero times infinity is NaN; squares summed over
    # a batch need more room still.
    return stacked.clamp(-_LIMIT, _LIMIT)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of logits [K, B, C] with class indices [B] or probabilities [B, C], a mean each [K]."""
    exits, batch, _ = logits.shape
    if target.is_floating_point():
        target = target.to(logits.dtype)
    target = target.expand(exits, *target.shape).flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), target, reduction="none", label_smoothing=label_smoothing)
    return losses.view(exits, batch).mean(-1)


def check_entries(kind: str, width: str, entries: Sequence[Tensor]) -> None:
    """Check that logits or features are floating tensors of one shape.

    Args:
        kind: What they are, for the message.
        width: Name of their second dimension, for the message.
        entries: The tensors.

    Raises:
        ValueError: If they are not, or empty.
    """
    shape = entries[0].shape if entries else torch.Size()
    valid = all(entry.shape == shape and entry.is_floating_point() for entry in entries)
    if not valid or len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"The output holds {kind} {shapes(entries)}; allowed are floating tensors of one shape [B, {width}], "
            "none of them empty."
        )


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Check that a target fits logits of a shape [B, C].

    Raises:
        ValueError: If it holds neither class indices [B] nor class probabilities [B, C].
    """
    indices = target.dtype == torch.int64 and target.shape == shape[:1]
    if not indices and not (target.is_floating_point() and target.shape == shape):
        raise ValueError(
            f"The target is {target.dtype} {list(target.shape)}; allowed are class indices, torch.int64 "
            f"{list(shape[:1])}, and class probabilities, floating {list(shape)}."
        )


def shapes(entries: Sequence[Tensor]) -> str:
    """Return dtypes and shapes for a message."""
    return ", ".join(f"{entry.dtype} {list(entry.shape)}" for entry in entries) or "nothing"
