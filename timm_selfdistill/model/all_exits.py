"""A wrapped model that runs all its exits in one forward: what each answers, or what they answer together."""

from collections.abc import Callable, Sequence
from typing import Final, Literal

from torch import Tensor, nn

from timm_selfdistill.model.network import SelfDistillModel

ENSEMBLE: Final = "ensemble"
"""What stands in place of an exit's index where all exits answer together."""

ExitChoice = int | Literal["ensemble"]


class _Whole(nn.Module):
    """A module around a wrapped model.

    Args:
        model: The wrapped model; its mode is this module's.
    """

    def __init__(self, model: SelfDistillModel) -> None:
        super().__init__()
        self.training = model.training
        self.model = model


class AllExits(_Whole):
    """Runs all exits that have a weight, and combines their logits as the model's `ensemble` says."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        ensemble = self.model.ensemble
        found = _run(self.model, x, lambda index: bool(ensemble.weights[index]))
        # What stands for a member without a weight is not looked at.
        return ensemble([found.get(index, found[self.model.num_exits]) for index in range(self.model.num_exits + 1)])


class EachExit(_Whole):
    """Runs all exits, and returns the logits of each."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, C, H, W] to K + 1 logits [B, num_classes], shallow to deep, the last the backbone's own."""
        found = _run(self.model, x, lambda index: True)
        return tuple(found[index] for index in range(self.model.num_exits + 1))


def check_choice(model: SelfDistillModel, exit: int | str, words: Sequence[str] = (ENSEMBLE,)) -> None:
    """Raise ValueError unless this is the index of an exit, `num_exits`, or one of the words."""
    if exit in words:
        return
    if isinstance(exit, str):
        allowed = [f"0 to {model.num_exits}", *map(repr, words)]
        raise ValueError(f"There is no exit {exit!r:.100}; allowed are {', '.join(allowed[:-1])} and {allowed[-1]}.")
    model.check_exit(exit)


def _run(model: SelfDistillModel, x: Tensor, runs: Callable[[int], bool]) -> dict[int, Tensor]:
    """Return the logits of the exits whose heads are to run, and of the backbone, by index."""
    found: dict[int, Tensor] = {}

    def visit(index: int, taps: tuple[Tensor, ...]) -> None:
        if runs(index):
            found[index] = model.head_of(index).classify(*taps)

    last = model.forward_while(x, visit)
    assert last is not None  # no image leaves
    found[model.num_exits] = last
    return found
