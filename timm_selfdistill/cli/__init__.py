"""The command `timm-selfdistill`."""

from timm_selfdistill.cli.main import main as main
