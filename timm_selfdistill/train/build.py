"""Build the network of a recipe."""

from collections.abc import Sequence

import torch

from timm_selfdistill.model import SelfDistillModel, wrap
from timm_selfdistill.recipe import Recipe


def build_model(recipe: Recipe, class_names: Sequence[str], dataset: str) -> SelfDistillModel:
    """Build the recipe's wrapped model.

    Args:
        recipe: The recipe.
        class_names: The classes of the data, as many as the model's where the recipe does not tell.
        dataset: What a message calls the data.

    Raises:
        ValueError: If timm cannot build the backbone, it cannot be wrapped, or it has fewer classes than the data.
    """
    section, exits = recipe.model, recipe.exits
    num_classes = section.num_classes or len(class_names)
    if num_classes < len(class_names):
        raise ValueError(f"model.num_classes: {num_classes} is less than the {len(class_names)} classes of {dataset}.")
    model = wrap(
        section.name,
        num_classes=num_classes,
        exits=exits.points,
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        hint_adapter=exits.hint_adapter,
        small_stem=section.small_stem,
        image_size=recipe.data.image_size,
        pretrained=section.pretrained,
        model_kwargs=section.kwargs,
    )
    if section.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model
