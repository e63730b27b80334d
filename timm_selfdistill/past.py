"""The model as it was when an epoch began."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.model import ExitOutput, SelfDistillModel


class PastModel(nn.Module):
    """A frozen copy of a model, taken anew at the begin of every epoch but the first; its state can be saved.

    Args:
        model: The wrapped model; it stays as it is.
    """

    def __init__(self, model: SelfDistillModel) -> None:
        super().__init__()
        self.model = deepcopy(model).requires_grad_(False).eval()
        self.epoch = 0

    def follow(self, model: SelfDistillModel, epoch: float) -> None:
        """Copy the model's state, if it is of a later epoch than the copy.

        Args:
            model: The wrapped model.
            epoch: Epochs done, with the part that is done of the present one.
        """
        if int(epoch) > self.epoch:
            self.epoch = int(epoch)
            self.model.load_state_dict(model.state_dict())

    def train(self, mode: bool = True) -> "PastModel":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input: Tensor) -> ExitOutput | None:
        """Return the logits of the backbone's own classifier for images [B, C, H, W]; None in the first epoch."""
        return ExitOutput((self.model(input),), ()) if self.epoch else None

    def get_extra_state(self) -> int:
        """Return the epoch of the copy."""
        return self.epoch

    def set_extra_state(self, state: Any) -> None:
        """Go on from the epoch that `get_extra_state` returned."""
        self.epoch = state
