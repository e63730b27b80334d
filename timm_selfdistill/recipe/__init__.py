"""Recipes: everything a training run depends on, as one typed and validated YAML file."""

from timm_selfdistill.recipe.data_sections import AugmentSection, DataSection
from timm_selfdistill.recipe.load import RecipeError, dump_local, is_local, list_recipes, load_recipe, read_settings
from timm_selfdistill.recipe.loss_settings import LossSection
from timm_selfdistill.recipe.recipe import LOCAL, RECIPE, Recipe
from timm_selfdistill.recipe.training_sections import LICENSE, REPO_ID, EmaSection, ExitsSection, PushSection

__all__ = [
    "LICENSE",
    "LOCAL",
    "RECIPE",
    "REPO_ID",
    "AugmentSection",
    "DataSection",
    "EmaSection",
    "ExitsSection",
    "LossSection",
    "PushSection",
    "Recipe",
    "RecipeError",
    "dump_local",
    "is_local",
    "list_recipes",
    "load_recipe",
    "read_settings",
]
