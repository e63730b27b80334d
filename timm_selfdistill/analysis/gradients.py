"""How much gradient reaches each stage of a backbone."""

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from timm.models import group_parameters
from torch import Tensor

from timm_selfdistill.exits import unchanged
from timm_selfdistill.model import SelfDistillModel

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps images [B, C, H, W] and targets [B] to the loss of a batch."""


def find_stages(model: SelfDistillModel) -> dict[str, list[str]]:
    """Return the names of the backbone's parameters by stage, shallow to deep, as timm groups them.

    They are the coarse groups of the backbone's `group_matcher`: the stages of a convolutional network, the blocks of a
    transformer, stem and classifier apart; for the few families without one, the backbone's children. A stage is called
    by what the names of its parameters have in common; where that is nothing, the first is "stem" and the last "head".

    Args:
        model: The wrapped model.
    """
    backbone = model.backbone
    if hasattr(backbone, "group_matcher"):
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
        ordered = [groups[index] for index in sorted(groups)]
    else:
        by_child: dict[str, list[str]] = {}
        for name, _ in backbone.named_parameters():
            by_child.setdefault(name.partition(".")[0], []).append(name)
        ordered = list(by_child.values())
    stages: dict[str, list[str]] = {}
    for place, names in enumerate(ordered):
        levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
        title = shared or {0: "stem", len(ordered) - 1: "head"}.get(place, names[0])
        stages[title if title not in stages else f"{title} ({place})"] = names
    return stages


def measure_gradients(
    model: SelfDistillModel,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: BatchLoss,
    stages: Sequence[Sequence[str]],
    *,
    seed: int,
) -> list[float | None]:
    """Return the mean magnitude of the loss's gradient in each stage.

    That is the mean of |d loss / d w| over all parameters w of the stage, and over the batches. Gradients are taken in
    training mode, with batch statistics of each batch; the model is left as it was.

    Args:
        model: The wrapped model.
        batches: Images [B, C, H, W] and targets [B], on the model's device.
        loss: The loss of a batch.
        stages: Names of the backbone's parameters in each stage.
        seed: Decides what dropout and the like draw.

    Returns:
        One number for each stage; None where it is not finite.
    """
    parameters = dict(model.backbone.named_parameters())
    names = [name for stage in stages for name in stage]
    totals = dict.fromkeys(names, 0.0)
    with unchanged(model, restore_tensors=True), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        for images, targets in batches:
            found = torch.autograd.grad(loss(images, targets), [parameters[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    totals[name] += float(gradient.abs().sum())
    means = [
        sum(totals[name] for name in stage) / sum(parameters[name].numel() for name in stage) / len(batches)
        for stage in stages
    ]
    return [mean if math.isfinite(mean) else None for mean in means]
