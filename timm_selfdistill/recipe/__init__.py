"""Recipes: everything a training run depends on, as one typed and validated YAML file."""

from timm_selfdistill.recipe.images import AugmentSection, DataSection
from timm_selfdistill.recipe.load import (
    RecipeError,
    dump_local,
    is_local,
    list_recipes,
    load_recipe,
    read_settings,
)
from timm_selfdistill.recipe.local_paths import LOCAL, RECIPE
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
    "LOCAL",
    "RECIPE",
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
    "dump_local",
    "is_local",
    "list_recipes",
    "load_recipe",
    "read_settings",
]
