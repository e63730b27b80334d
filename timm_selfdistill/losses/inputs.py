"""What every loss does with the output and the target of a batch before it computes."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES: Final = (1e-6, 1e3)
"""The least and the greatest temperature. Below, logits overflow float32. Above, the softmaxes are so flat that their
divergence is rounding: at 1,000 it is right to some percent for logits that differ by 1, at 10,000 it is not.
"""

_NO_INDEX: Final = torch.iinfo(torch.int64).min
_LIMIT: Final = 1e14
# How far the sum of a sample's probabilities may be from 1: what rounding makes of many classes in half precision.
_SUM_TOLERANCE: Final = 0.01


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
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        target,
        reduction="none",
        label_smoothing=label_smoothing,
        # torch leaves out samples of the class -100, without a word; here no class index is left out.
        ignore_index=_NO_INDEX,
    )
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

    Values are looked at on the CPU and outside `torch.compile` only: to read them would stall a GPU, on which a class
    index out of range ends in an assertion of its own.

    Raises:
        ValueError: If it holds neither class indices [B] nor class probabilities [B, C], an index is none of a class,
            or probabilities are negative or do not sum to 1.
    """
    indices = target.dtype == torch.int64 and target.shape == shape[:1]
    if not indices and not (target.is_floating_point() and target.shape == shape):
        raise ValueError(
            f"The target is {target.dtype} {list(target.shape)}; allowed are class indices, torch.int64 "
            f"{list(shape[:1])}, and class probabilities, floating {list(shape)}."
        )
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(target, shape[1])


def _check_values(target: Tensor, classes: int) -> None:
    """Raise ValueError unless a target holds indices of classes, or probabilities."""
    low, high = (value.item() for value in target.detach().aminmax())
    if not target.is_floating_point():
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"The target holds the class index {wrong}; allowed are 0 to {classes - 1}.")
        return
    sums = target.detach().sum(-1, dtype=torch.promote_types(target.dtype, torch.float32))
    off = int((sums - 1).abs().nan_to_num(nan=torch.inf).argmax())
    # Written so that NaN is refused.
    if not low >= 0 or not abs(float(sums[off]) - 1) <= _SUM_TOLERANCE:
        raise ValueError(
            f"The target holds class probabilities from {low:g} to {high:g}, those of sample {off} with the sum "
            f"{float(sums[off]):g}; allowed are numbers of 0 or more with the sum 1 for each sample."
        )


def shapes(entries: Sequence[Tensor]) -> str:
    """Return dtypes and shapes for a message."""
    return ", ".join(f"{entry.dtype} {list(entry.shape)}" for entry in entries) or "nothing"
