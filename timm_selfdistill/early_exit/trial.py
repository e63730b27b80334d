"""Try out a backbone: after which exits it runs on with a part of its batch, and whether it runs without hooks."""

import warnings

import torch
from torch import Tensor

from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.hooks import BareBackbone


@torch.no_grad()
def try_out(model: SelfDistillModel) -> tuple[tuple[bool, ...], BareBackbone | None]:
    """Return, for each exit, whether the backbone gives the same answers on a part of the batch after it.

    Also return the backbone without hooks, if that gives the same answers.
    """
    images = random_images(model.backbone, model.wrap_config.image_size, 4)
    with unchanged(model):
        expected = model(images)
        shrinks = tuple(_shrinks(model, images, expected, exit) for exit in range(model.num_exits))
        bare = _run_bare(model, images, expected)
    if not all(shrinks):
        stuck = [name for name, fine in zip(model.exit_names[:-1], shrinks, strict=True) if not fine]
        warnings.warn(
            f"{type(model.backbone).__name__} cannot run on with a part of its batch after {', '.join(stuck)}: images "
            "that leave there get their answer, but stay in the batch until a later exit, or until all have one.",
            stacklevel=3,
        )
    return shrinks, bare


def _run_bare(model: SelfDistillModel, images: Tensor, expected: Tensor) -> BareBackbone | None:
    try:
        bare = BareBackbone(model.backbone)
        return bare if torch.equal(bare(images), expected) else None
    except Exception:  # modules that cannot be copied so raise whatever they do
        return None


def _shrinks(model: SelfDistillModel, images: Tensor, expected: Tensor, exit: int) -> bool:
    """Whether the backbone, left with two of four images at an exit, gives these two their logits."""
    rows = torch.tensor([1, 3], device=images.device)
    try:
        logits = model.forward_while(images, lambda index, taps: rows if index == exit else None)
    except Exception:  # whatever the backbone raises, it means that it cannot
        return False
    expected = expected[rows]
    if logits is None or logits.shape != expected.shape:
        return False
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
