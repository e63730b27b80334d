"""The command `timm-selfdistill`: one module a command, imported when that command is run."""

from timm_selfdistill.cli.main import main

__all__ = ["main"]
