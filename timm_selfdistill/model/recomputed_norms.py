"""Batch statistics under gradient checkpointing: a forward that backward runs again must not count twice."""

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from timm_selfdistill.compat import forward_hooks, in_backward

_MOMENTUM = "_momentum_outside_recomputation"


def set_grad_checkpointing(backbone: Any, enable: bool) -> None:
    """Switch a backbone's gradient checkpointing; its batch norms keep their statistics while backward runs them again.

    Args:
        backbone: A timm model, whose modules get hooks that belong to no model, and so are copied with it.
        enable: Whether to switch it on; off, the hooks are removed.
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
