"""Private interfaces of other packages, in one place: why each is needed; checked with torch 2.15, timm 1.0.31."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only as tree_map_only  # torch has no public way to map nested tensors


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view for autograd; torch has no public name for it. Checked with torch 2.15."""
    return tensor._is_view()


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register a module's forward hooks with another one; torch cannot list hooks. Checked with torch 2.15."""
    for hook in source._forward_hooks.values():
        target.register_forward_hook(hook)
    for pre_hook in source._forward_pre_hooks.values():
        target.register_forward_pre_hook(pre_hook)


def accelerate_states(*, of_processes: bool) -> list[dict[str, Any]]:
    """Return the dicts in which Accelerate keeps the state of the whole program. Checked with accelerate 1.15.

    Its public names only read them, and it refuses another precision or device once they are filled.

    Args:
        of_processes: Return those about processes and devices too.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    classes = [AcceleratorState, GradientState, *([PartialState] if of_processes else [])]
    return [cls._shared_state for cls in classes]
