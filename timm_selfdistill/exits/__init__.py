"""Where a backbone can be tapped: the points that `feature_info` names, proved by one dry run."""

from timm_selfdistill.exits.points import (
    BackboneTaps,
    ExitPoint,
    Exits,
    Exploration,
    Tap,
    choose,
    explore,
    find_exit_points,
    named_modules,
)
from timm_selfdistill.exits.probe import Backbone, Classifier, ImageSize, pool_feature, random_images, unchanged

__all__ = [
    "Backbone",
    "BackboneTaps",
    "Classifier",
    "ExitPoint",
    "Exits",
    "Exploration",
    "ImageSize",
    "Tap",
    "choose",
    "explore",
    "find_exit_points",
    "named_modules",
    "pool_feature",
    "random_images",
    "unchanged",
]
