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

    def regroup(self, before: int, now: int, updates: int, accumulate: int, *, streaming: bool) -> str:
        """Find the place where another number of processes goes on, and say where it is.

        Args:
            before: Number of processes so far.
            now: Number of processes from now on.
            updates: Steps in an epoch.
            accumulate: Micro batches in a step.
            streaming: Whether the epoch cannot be entered again, as the processes' shares of it are others.
        """
        if before == now or not streaming:
            self.micro = self.micro * before // now
            return f"behind step {self.step}, with the images that are left of the epoch"
        self.step += updates - self.micro // accumulate
        self.micro = updates * accumulate
        return f"at the end of epoch {self.epoch + 1}, as the shares of the stream are others"
