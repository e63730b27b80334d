"""CIFAR networks that timm lacks; importing this package registers them with timm."""

from timm_selfdistill.backbones.cifar import default_cfgs
from timm_selfdistill.backbones.pyramidnet import PyramidNet

__all__ = ["PyramidNet", "default_cfgs"]
