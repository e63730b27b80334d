"""What a loss may need beyond the output and the target of a batch, and how it says so."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class TrainingTime(NamedTuple):
    """How far training has come.

    Args:
        epoch: Epochs done, with the part that is done of the present one.
        epochs: Epochs in all.
    """

    epoch: float
    epochs: int


@dataclass(frozen=True)
class Needs:
    """What a loss is called with by keyword, behind `(out, target)`; the value of its attribute `needs`.

    The task provides it. Outputs of other models hold what `out` holds, and carry no gradient.

    Args:
        ema: The keyword `ema`, an `ExitOutput`: what the average of the weights answers, in eval mode.
        time: The keyword `time`, a `TrainingTime`.
    """

    ema: bool = False
    time: bool = False


def needs_of(loss: nn.Module) -> Needs:
    """Return what a loss needs; nothing if it does not say."""
    needs = getattr(loss, "needs", Needs())
    if not isinstance(needs, Needs):
        raise ValueError(f"The attribute needs of {type(loss).__name__} is {needs!r}; allowed is a Needs.")
    return needs
