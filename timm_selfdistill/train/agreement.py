"""What all processes must know after a step: whether one of them is to stop, or had a loss that is not finite."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on about a step.

    Args:
        step: Which one.
        stop: Whether any of them is to stop.
        bad: Whether the loss was not finite in any of them.
        bad_here: Whether it was in this one.
    """

    step: int
    stop: bool
    bad: bool
    bad_here: bool


class Agreement:
    """Flags that count for all processes if one of them raises them.

    On a CPU the answer is about the step itself. Elsewhere it is about the step before, so that nobody waits for the
    device, unless `at_once`.

    Args:
        accelerator: The accelerator.
        at_once: Wait for the answer at every step.
    """

    def __init__(self, accelerator: Accelerator, at_once: bool = False) -> None:
        self._device = accelerator.device
        self._alone = accelerator.num_processes == 1
        self._at_once = at_once or accelerator.device.type == "cpu"
        self._pending: tuple[int, Tensor, Tensor, Any] | None = None

    def ask(self, step: int, stop: bool, bad: Tensor) -> Verdict | None:
        """Tell the others about a step, and return what is known; None if that is nothing yet.

        Args:
            step: Which one.
            stop: Whether this process is to stop.
            bad: Whether its loss was not finite: a tensor of one bool.
        """
        before = None if self._at_once else self.settle()
        mine = torch.stack([torch.tensor(stop, device=self._device), bad]).to(torch.int32)
        everybody = mine.clone()
        handle = None
        if not self._alone:
            handle = torch.distributed.all_reduce(everybody, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = step, mine, everybody, handle
        return self.settle() if self._at_once else before

    def settle(self) -> Verdict | None:
        """Return what the processes agreed on about the last step, if that was not told before."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, mine, everybody, handle = pending
        if handle is not None:
            handle.wait()
        stop, bad = everybody.tolist()
        return Verdict(step, bool(stop), bool(bad), bool(mine[1]))
