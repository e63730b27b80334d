"""Where a backbone can be tapped: the points that `feature_info` names, proved by one dry run."""

from timm_selfdistill.exits.points import DEFAULT_EXITS as DEFAULT_EXITS
from timm_selfdistill.exits.points import BackboneTaps as BackboneTaps
from timm_selfdistill.exits.points import ExitPoint as ExitPoint
from timm_selfdistill.exits.points import Exits as Exits
from timm_selfdistill.exits.points import Exploration as Exploration
from timm_selfdistill.exits.points import Tap as Tap
from timm_selfdistill.exits.points import choose as choose
from timm_selfdistill.exits.points import explore as explore
from timm_selfdistill.exits.points import find_exit_points as find_exit_points
from timm_selfdistill.exits.probe import Backbone as Backbone
from timm_selfdistill.exits.probe import Classifier as Classifier
from timm_selfdistill.exits.probe import pool_feature as pool_feature
from timm_selfdistill.exits.probe import random_images as random_images
from timm_selfdistill.exits.probe import unchanged as unchanged
