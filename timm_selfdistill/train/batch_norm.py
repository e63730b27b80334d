"""Batch norm over several processes."""

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm

from timm_selfdistill.model import SelfDistillModel


def synchronize_batch_norm(model: SelfDistillModel) -> SelfDistillModel:
    """Let every batch norm normalise by the statistics of all processes' images.

    Keys and values of the state dict stay as they are, and so do the hooks, although timm puts other modules in the
    place of batch norms.

    Args:
        model: The wrapped model; changed in place.

    Returns:
        The model.
    """
    before = dict(model.named_modules(remove_duplicate=False))
    convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not before[name]:
            for hook in before[name]._forward_hooks.values():
                module.register_forward_hook(hook)
            for pre_hook in before[name]._forward_pre_hooks.values():
                module.register_forward_pre_hook(pre_hook)
    return model


def share_buffers(model: SelfDistillModel, accelerator: Accelerator) -> None:
    """Give every process the main process's buffers: under DDP, batch statistics differ after the last step."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
