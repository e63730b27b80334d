"""Where a backbone can be tapped: the points that `feature_info` names, proved by one dry run."""

from timm_selfdistill.exits.candidates import Backbone, Classifier
from timm_selfdistill.exits.choose import BackboneTaps, Exits, choose, find_exit_points, named_modules
from timm_selfdistill.exits.dry_run import pool_feature, random_images, unchanged, untouched
from timm_selfdistill.exits.points import ExitPoint, Exploration, Tap, explore

__all__ = [
    "Backbone",
    "BackboneTaps",
    "Classifier",
    "ExitPoint",
    "Exits",
    "Exploration",
    "Tap",
    "choose",
    "explore",
    "find_exit_points",
    "named_modules",
    "pool_feature",
    "random_images",
    "unchanged",
    "untouched",
]
