"""What a loss may need beyond the output and the target of a batch, and how it says so."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import nn


class TrainingTime(NamedTuple):
    """How far training has come.

    Attributes:
        epoch: Epochs done, with the part that is done of the present one.
        epochs: Epochs in all.
    """

    epoch: float
    epochs: int


@dataclass(frozen=True)
class Needs:
    """What a loss needs beyond `(out, target)`; the value of its attribute `needs`.

    The task gives it by keyword, and recipes see to the batches. Outputs of other models hold what `out` holds, and
    carry no gradient.

    Args:
        ema: The keyword `ema`, an `ExitOutput`: what the average of the weights answers, in eval mode.
        past: The keyword `past`, an `ExitOutput`: what the backbone as it was when the epoch began answers, in eval
            mode; None in the first epoch.
        time: The keyword `time`, a `TrainingTime`.
        batches: What a batch holds beside the samples that it draws. "paired": for each one another of its class,
            behind them all; `out` and `target` are without those, and the keyword `partners`, an `ExitOutput`, holds
            what the model answers to them. "repeated": before them, those that were drawn in the batch before.
    """

    ema: bool = False
    past: bool = False
    time: bool = False
    batches: Literal["plain", "paired", "repeated"] = "plain"
    exits: bool = True


def needs_of(loss: nn.Module) -> Needs:
    """Return what a loss needs; nothing if it does not say."""
    needs = getattr(loss, "needs", Needs())
    if not isinstance(needs, Needs):
        raise ValueError(f"The attribute needs of {type(loss).__name__} is {needs!r}; allowed is a Needs.")
    return replace(needs, exits=bool(getattr(loss, "needs_exits", needs.exits)))
