"""A learning rate of its own for the heads, which are new where a network is fine-tuned."""

import torch

from timm_selfdistill.checks import Positive, check
from timm_selfdistill.model.network import SelfDistillModel

_SCALE = "heads_lr_scale"


def scale_heads_lr(optimizer: torch.optim.Optimizer, model: SelfDistillModel, scale: float) -> None:
    """Multiply the learning rate of all heads: those of the exits, and the backbone's own classifier.

    Call it once, before a schedule is made: those of torch and timm start from the rate of each group. A group with
    heads and other parameters becomes two; weight decay and all else stay.

    Args:
        optimizer: An optimizer of the model's parameters that has not taken a step.
        model: The model.
        scale: The factor, above 0.

    Raises:
        ValueError: If the factor is not above 0, or the optimizer has taken a step.
    """
    scale = check("scale", scale, Positive)
    if optimizer.state:
        raise ValueError("The optimizer has taken a step already; allowed is one that has not.")
    if scale == 1:
        return
    of_heads = set(model.parameters()) - set(model.backbone.parameters())
    for name in model.taps.classifier.modules:
        of_heads.update(model.backbone.get_submodule(name).parameters())
    for group in list(optimizer.param_groups):
        heads = [parameter for parameter in group["params"] if parameter in of_heads]
        rest = [parameter for parameter in group["params"] if parameter not in of_heads]
        if not heads:
            continue
        scaled = {"lr": group["lr"] * scale, _SCALE: scale}
        if rest:
            group["params"] = rest
            optimizer.add_param_group({**group, **scaled, "params": heads})
        else:
            group.update(scaled)


def unscaled_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the highest learning rate of all groups, without the factor of the heads."""
    return float(max(group["lr"] / group.get(_SCALE, 1.0) for group in optimizer.param_groups))
