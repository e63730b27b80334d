"""What a model changes of the backward pass: gradients of the exits, and batch norms under gradient checkpointing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.compat import BatchNorm, forward_hooks, in_backward

_MOMENTUM = "_momentum_outside_recomputation"


class GradientGate(nn.Module):
    """Runs the heads on what was tapped, and scales the gradient that goes back from each of them into the backbone.

    What the heads read is not changed, and neither are the heads' own gradients. In eval mode, and until `set` is
    called, every gradient passes whole.
    """

    share: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # One for each exit, shallow to deep; none for 1.
        self.factors: tuple[float, ...] = ()
        # What is left of every factor; a tensor, as a compiler would make a new program for every number.
        self.register_buffer("share", None, persistent=False)
        # The random states of the heads of a closed gate, which draw numbers of their own.
        self.random: dict[str, Tensor] = {}

    def set(self, factors: Sequence[float], fades: bool, device: torch.device) -> None:
        """Set the factor of each exit, shallow to deep; `fades` says that `fade` will lower them, on this device."""
        self.factors, self.random = tuple(factors), {}
        self.share = torch.ones((), device=device) if fades and any(factors) else None

    def fade(self, share: float) -> None:
        """Let a share of every factor be left, from 0 to 1."""
        if self.share is not None:
            self.share.fill_(share)

    @property
    def is_closed(self) -> bool:
        """Whether no exit's gradient reaches the backbone: it then trains as it would without exits."""
        return bool(self.factors) and not any(self.factors)

    def forward(
        self, heads: Iterable[nn.Module], taps: Mapping[int, tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Run each head on the tensors that were tapped for it, and return its logits [B, C] and feature [B, D]."""
        if not self.training or not self.factors:
            return [head(*taps[index]) for index, head in enumerate(heads)]
        # Copied, as another forward may broadcast the buffers before this one's backward.
        share = None if self.share is None else self.share.clone()
        # Decided here, as torch.compile of torch 2.6 cannot enter a context manager of this class.
        open_to_all = not self.is_closed or torch.compiler.is_compiling()
        with nullcontext() if open_to_all else self._own_random(taps[0][0].device):
            return [
                head(*(_scale(tensor, factor, share) for tensor in taps[index]))
                for index, (head, factor) in enumerate(zip(heads, self.factors, strict=True))
            ]

    @contextmanager
    def _own_random(self, device: torch.device) -> Iterator[None]:
        """Let the heads of a closed gate draw random numbers without taking any from the backbone."""
        kind, devices = device.type, [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices, device_type="cuda" if kind == "cpu" else kind):
            module = None if kind == "cpu" else torch.get_device_module(device)
            if self.random:
                torch.set_rng_state(self.random["cpu"])
                if module is not None:
                    module.set_rng_state(self.random[kind], device)
            yield
            self.random = {"cpu": torch.get_rng_state()}
            if module is not None:
                self.random[kind] = module.get_rng_state(device)


class _ScaledGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied by a number and by a scalar tensor, if there is one."""

    @staticmethod
    def forward(x: Tensor, factor: float, share: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor | None], output: Tensor) -> None:
        _, ctx.factor, share = inputs
        ctx.save_for_backward(share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return gradient * (ctx.factor if share is None else ctx.factor * share), None, None


def _scale(x: Tensor, factor: float, share: Tensor | None) -> Tensor:
    """Return a tensor whose gradient will be scaled."""
    if not factor:
        # Zeros would bring infinities of a head into the backbone too.
        return x.detach()
    if factor == 1 and share is None:
        return x
    scaled: Tensor = _ScaledGradient.apply(x, factor, share)
    return scaled


def set_grad_checkpointing(backbone: Any, enable: bool) -> None:
    """Switch a backbone's gradient checkpointing; its batch norms keep their statistics while backward runs them again.

    Their hooks belong to no model, and so are copied with the backbone.
    """
    backbone.set_grad_checkpointing(enable)
    for module in backbone.modules():
        if not isinstance(module, BatchNorm):
            continue
        for is_before, hook in ((True, _hold), (False, _release)):
            hooks = forward_hooks(module, is_before)
            for key in [key for key, other in hooks.items() if other is hook]:
                del hooks[key]
        if enable:
            module.register_forward_pre_hook(_hold)
            # Recomputation ends by an exception, in whichever module all is there that backward needs.
            module.register_forward_hook(_release, always_call=True)


def _hold(module: BatchNorm, args: Any) -> None:
    if torch.compiler.is_compiling() or not (module.training and module.track_running_stats and in_backward()):
        return
    setattr(module, _MOMENTUM, module.momentum)
    # torch mixes the new statistics in with this share.
    module.momentum = 0.0


def _release(module: BatchNorm, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not hasattr(module, _MOMENTUM):
        return
    module.momentum = getattr(module, _MOMENTUM)
    delattr(module, _MOMENTUM)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)
