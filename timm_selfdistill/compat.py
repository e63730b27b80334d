"""Private interfaces of torch and timm that have no public counterpart, each with its reason.

Checked with torch 2.15 and timm 1.0.31.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the only way to see every operand
from torch.utils._pytree import tree_leaves as tree_leaves  # flattens the arguments that a dispatch mode is given


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place: autograd's counter, which has no public name."""
    return tensor._version


def forward_hooks(module: nn.Module, pre: bool) -> dict[int, Callable[..., Any]]:
    """Return a module's own ordered dict of hooks: torch has no public way to list, reorder or move hooks."""
    return module._forward_pre_hooks if pre else module._forward_hooks


def find_module(module: Any, path: Sequence[str]) -> Any:
    """Return the module at a path, or None; a wrapper such as torch.compile's may hand on the names inside it.

    `get_submodule` does the same several times slower, and this runs for every hook in every forward.
    """
    for name in path:
        module = module._modules.get(name) or getattr(module, name, None)
        if module is None:
            return None
    return module


def data_config_traits(backbone: nn.Module) -> dict[str, Any]:
    """Return what timm's `resolve_input_data_config` reads a model's image size from."""
    return dict(getattr(backbone, "_traits", {}))
