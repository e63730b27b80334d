"""How a network is spread over the processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from accelerate import Accelerator
from timm.utils import dispatch_clip_grad
from torch import nn

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import EmaSection
from timm_selfdistill.task import SelfDistillationTask


class Parallelism(Protocol):
    """What the loop asks of it; all processes call every method together.

    Attributes:
        accelerator: The accelerator.
        in_parts: Whether each process has a part of the network only.
    """

    accelerator: Accelerator
    in_parts: bool

    def prepare(self, task: SelfDistillationTask, ema: EmaSection | None) -> nn.Module:
        """Spread a task's network, and make its average if asked; the optimizer is built behind it.

        Args:
            task: The task; its network is whole and on the device.
            ema: How to average the weights, or None.

        Returns:
            What takes the place of the task in a step.
        """

    def micro_step(self, prepared: nn.Module, *, first: bool, last: bool) -> Any:
        """Return the context of the forward and backward of one micro batch.

        Args:
            prepared: What `prepare` returned.
            first: Whether it is the first of its optimizer step.
            last: Whether it is the last, behind which gradients are averaged over the processes.
        """

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """Clip the gradients of parameters as timm does.

        Args:
            parameters: The parameters.
            limit: What they are clipped to.
            mode: "norm", "value" or "agc".
        """

    def state_dict(self, part: Any) -> dict[str, Any]:
        """Return the state of a network, optimizer or the like as one process would have it.

        Only the main process may use what is returned.
        """

    def load_state_dict(self, part: Any, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or what it returned with other processes or another parallelism."""

    def whole(self, model: SelfDistillModel) -> SelfDistillModel:
        """Return a network with all its weights: itself if it is whole, else a copy."""


class Replicated:
    """Each process has the whole network (DDP), or there is one process only.

    Args:
        accelerator: The accelerator.
    """

    in_parts = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(self, task: SelfDistillationTask, ema: EmaSection | None) -> nn.Module:
        """As `Parallelism`."""
        prepared: nn.Module = self.accelerator.prepare(task)
        # Behind DDP, which would count the average as part of the task.
        average_weights(task, ema)
        return prepared

    @contextmanager
    def micro_step(self, prepared: nn.Module, *, first: bool, last: bool) -> Iterator[None]:
        """As `Parallelism`."""
        with nullcontext() if last else self.accelerator.no_sync(prepared):
            yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """As `Parallelism`."""
        dispatch_clip_grad(parameters, limit, mode)

    def state_dict(self, part: Any) -> dict[str, Any]:
        """As `Parallelism`."""
        state: dict[str, Any] = part.state_dict()
        return state

    def load_state_dict(self, part: Any, state: dict[str, Any]) -> None:
        """As `Parallelism`."""
        part.load_state_dict(state)

    def whole(self, model: SelfDistillModel) -> SelfDistillModel:
        """As `Parallelism`."""
        return model


def average_weights(task: SelfDistillationTask, ema: EmaSection | None, foreach: bool = True) -> None:
    """Let a task average its weights, if asked; with `foreach`, all of them in a few operations."""
    if ema is not None:
        task.setup_ema(decay=ema.decay, use_warmup=ema.warmup, device=task.device, foreach=foreach)
