"""Where a backbone can be tapped: the points that `feature_info` names, proved by one dry run."""

from timm_selfdistill.exits.candidates import Backbone
from timm_selfdistill.exits.dry_run import pool_feature
from timm_selfdistill.exits.points import BackboneTaps, ExitPoint, Exits, find_exit_points

__all__ = ["Backbone", "BackboneTaps", "ExitPoint", "Exits", "find_exit_points", "pool_feature"]
