"""A wrapped model that answers with the ensemble of all its exits."""

from typing import Final, Literal

from torch import Tensor, nn

from timm_selfdistill.model.network import SelfDistillModel

ENSEMBLE: Final = "ensemble"
"""What stands in place of an exit's index where all exits answer together."""

ExitChoice = int | Literal["ensemble"]


class AllExits(nn.Module):
    """Runs all exits that have a weight, and combines their logits as the model's `ensemble` says.

    Args:
        model: The wrapped model; its mode is this module's.
    """

    def __init__(self, model: SelfDistillModel) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        model, ensemble = self.model, self.model.ensemble
        found: dict[int, Tensor] = {}

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            if ensemble.weights[index]:
                found[index] = model.head_of(index).classify(*taps)

        last = model.forward_while(x, visit)
        assert last is not None  # no image leaves
        # What stands for a member without a weight is not looked at.
        return ensemble([found.get(index, last) for index in range(model.num_exits + 1)])


def check_choice(model: SelfDistillModel, exit: ExitChoice) -> None:
    """Raise ValueError unless this is the index of an exit, `num_exits`, or "ensemble"."""
    if exit == ENSEMBLE:
        return
    if isinstance(exit, str):
        raise ValueError(f"There is no exit {exit!r:.100}; allowed are 0 to {model.num_exits} and {ENSEMBLE!r}.")
    model.check_exit(exit)
