"""Private interfaces of torch and timm that have no public counterpart, each with its reason.

Checked with torch 2.15 and timm 1.0.31.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the only way to see every operand
from torch.utils._pytree import tree_leaves as tree_leaves  # flattens the arguments that a dispatch mode is given


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place: autograd's counter, which nothing public tells."""
    return tensor._version


def forward_hooks(module: nn.Module, pre: bool) -> dict[int, Callable[..., Any]]:
    """Return a module's own ordered dict of hooks: torch has no public way to list, reorder or move hooks."""
    return module._forward_pre_hooks if pre else module._forward_hooks


def child_of(module: nn.Module, name: str) -> Any:
    """Return a child, or what a wrapper such as torch.compile's hands on from inside; None if there is neither.

    `getattr` alone calls the wrapper's `__getattr__` for every level, on each forward.
    """
    return module._modules.get(name) or getattr(module, name, None)


def data_config_traits(backbone: nn.Module) -> dict[str, Any]:
    """Return what timm's `resolve_input_data_config` reads a model's image size from."""
    return dict(getattr(backbone, "_traits", {}))
