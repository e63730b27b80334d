"""Recipes: everything a training run depends on, as one typed and validated YAML file."""

from timm_selfdistill.recipe.images import AugmentSection, DataSection
from timm_selfdistill.recipe.load import RecipeError, list_recipes, load_recipe, read_settings
from timm_selfdistill.recipe.network import ExitsSection, LossSection, ModelSection
from timm_selfdistill.recipe.recipe import Recipe
from timm_selfdistill.recipe.training import (
    LICENSE,
    REPO_ID,
    CheckpointSection,
    EmaSection,
    OptimizerSection,
    PushSection,
    ScheduleSection,
)

__all__ = [
    "LICENSE",
    "REPO_ID",
    "AugmentSection",
    "CheckpointSection",
    "DataSection",
    "EmaSection",
    "ExitsSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "PushSection",
    "Recipe",
    "RecipeError",
    "ScheduleSection",
    "list_recipes",
    "load_recipe",
    "read_settings",
]
