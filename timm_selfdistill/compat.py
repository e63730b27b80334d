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


def forward_hooks(module: Any, pre: bool, path: Sequence[str] = ()) -> dict[int, Callable[..., Any]]:
    """Return the ordered dict of the hooks of a module, or of the one at a path in it; an empty one if there is none.

    torch has no public way to list, reorder or move hooks. `get_submodule` is several times slower, and this runs for
    every hook in every forward; a wrapper such as torch.compile's may hand on the names inside it.
    """
    for name in path:
        module = module._modules.get(name) or getattr(module, name, None)
        if module is None:
            return {}
    hooks: dict[int, Callable[..., Any]] = module._forward_pre_hooks if pre else module._forward_hooks
    return hooks


def data_config_traits(backbone: nn.Module) -> dict[str, Any]:
    """Return what timm's `resolve_input_data_config` reads a model's image size from."""
    return dict(getattr(backbone, "_traits", {}))
