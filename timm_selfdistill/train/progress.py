"""How far a network's training has come."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """How far a network's training has come; saved with each checkpoint.

    Epochs and steps are counted over all phases.

    Args:
        phase: Index of the present phase.
        epoch: Epochs done.
        micro: Micro batches done in the present epoch.
        step: Optimizer steps done; those that were skipped count.
        first_epoch: Epochs done before the present phase.
        first_step: Steps done before it.
        seconds: Time spent on training steps.
        skipped: Steps in a row, up to the last, whose loss was not finite.
        logged: Lines of metrics.jsonl written.
        running: Means of the terms since the last of these lines, as `RunningTerms` saves them.
        best_top1: Best top-1 on the validation images, in percent.
        best_weights: The weights that had it.
    """

    phase: int = 0
    epoch: int = 0
    micro: int = 0
    step: int = 0
    first_epoch: int = 0
    first_step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    logged: int = 0
    running: dict[str, Any] | None = None
    best_top1: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def leave_epoch(self, updates: int, accumulate: int) -> None:
        """Go to the end of the present epoch.

        Args:
            updates: Steps in an epoch.
            accumulate: Micro batches in a step.
        """
        self.step += updates - self.micro // accumulate
        self.micro = updates * accumulate
