"""Batch norm over several processes."""

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import Tensor

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
    """Give every process the main process's buffers: otherwise batch statistics differ after a step."""
    if accelerator.num_processes == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        # One exchange for all of them.
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, values in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
