"""Batch norm over several processes, and on a single image."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from timm_selfdistill.data import InputConfig
from timm_selfdistill.exits import untouched
from timm_selfdistill.losses import needs_of
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train.phases import Phase


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


def check_one_image(
    model: SelfDistillModel, input: InputConfig, phases: Iterable[Phase], recipe: Recipe, num_processes: int
) -> None:
    """Refuse a recipe that leaves a process one image at a time, where the network cannot train on one.

    Batch norm needs two values a channel: one image is enough for it only where its feature maps are larger than one
    position. So the network is tried, and left as it was.

    Args:
        model: The wrapped model.
        input: What it takes.
        phases: What is trained.
        recipe: The recipe.
        num_processes: Number of processes.

    Raises:
        ValueError: If it cannot train on one image.
    """
    alone = num_processes == 1 or not recipe.sync_batchnorm
    if recipe.batch_size != num_processes * recipe.optimizer.accumulate or not alone:
        return
    images = torch.zeros(1, input.channels, *input.image_size)
    for phase in phases:
        needs = needs_of(phase.loss)
        if needs.batches == "paired":  # with a second image
            continue
        before = [buffer.clone() for buffer in model.buffers()]
        with untouched(model), torch.no_grad():
            model.train()
            if phase.regime == "frozen":
                model.backbone.eval()
            try:
                model(images, return_exits=needs.exits)
            except ValueError as error:  # of torch's batch norm, or of a head
                raise ValueError(
                    f"batch_size: {recipe.batch_size} leaves one image for each of {num_processes} process(es) and "
                    f"optimizer.accumulate={recipe.optimizer.accumulate} micro batch(es), which the batch norm of "
                    f"{recipe.model.name} cannot train on at {' x '.join(map(str, input.image_size))} pixels; allowed "
                    f"are multiples of {recipe.batch_size} from {2 * recipe.batch_size} on, or fewer micro batches."
                ) from error
            finally:
                for buffer, value in zip(model.buffers(), before, strict=True):
                    buffer.copy_(value)


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
