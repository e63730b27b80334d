"""Recipes: everything a training run depends on, as one typed and validated YAML file."""

from timm_selfdistill.recipe.data_sections import AugmentSection as AugmentSection
from timm_selfdistill.recipe.data_sections import DataSection as DataSection
from timm_selfdistill.recipe.load import RecipeError as RecipeError
from timm_selfdistill.recipe.load import dump_local as dump_local
from timm_selfdistill.recipe.load import is_local as is_local
from timm_selfdistill.recipe.load import list_recipes as list_recipes
from timm_selfdistill.recipe.load import load_recipe as load_recipe
from timm_selfdistill.recipe.load import read_settings as read_settings
from timm_selfdistill.recipe.load import read_shipped as read_shipped
from timm_selfdistill.recipe.load import summary_of as summary_of
from timm_selfdistill.recipe.loss_settings import LossSection as LossSection
from timm_selfdistill.recipe.loss_settings import OutsideTeacherConfig as OutsideTeacherConfig
from timm_selfdistill.recipe.loss_settings import TeacherSection as TeacherSection
from timm_selfdistill.recipe.recipe import LOCAL as LOCAL
from timm_selfdistill.recipe.recipe import RECIPE as RECIPE
from timm_selfdistill.recipe.recipe import Recipe as Recipe
from timm_selfdistill.recipe.training_sections import LICENSE as LICENSE
from timm_selfdistill.recipe.training_sections import REPO_ID as REPO_ID
from timm_selfdistill.recipe.training_sections import EmaSection as EmaSection
from timm_selfdistill.recipe.training_sections import ExitsSection as ExitsSection
from timm_selfdistill.recipe.training_sections import PushSection as PushSection
