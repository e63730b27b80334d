"""Private interfaces of other libraries, each with its reason; checked with torch 2.15, timm 1.0.31, datasets 5.2."""

from timm.models import _hub

save_config_for_hf = _hub.save_config_for_hf
"""Writes timm's `config.json` of a backbone: the public `save_for_hf` writes all of the backbone's weights too."""
