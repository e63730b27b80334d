"""What goes wrong in an export, and how messages tell it."""

from torch import nn

from timm_selfdistill.failures import ReportedError
from timm_selfdistill.truncation import TruncatedModel


class ExportError(ReportedError):
    """A network that torch or ONNX cannot write, or that was not the same once it was written; no file was left."""


def name_of(small: nn.Module) -> str:
    """Return what messages call a network."""
    if isinstance(small, TruncatedModel):
        return f"{type(small.backbone).__name__}, cut off behind {small.exit_name},"
    return type(small).__name__


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message; those of torch go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error)).rstrip(".")
