"""Private interfaces of other libraries that have no public counterpart, each with its reason.

Checked with torch 2.15, timm 1.0.31, torchvision 0.29, accelerate 1.15 and datasets 5.2. Only torch and timm are
loaded here; what needs another library imports it in the function.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence, ValuesView
from typing import Any

import torch
from timm.models import _hub
from torch import SymInt, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the only way to see every operand
from torch.utils._pytree import tree_leaves as tree_leaves  # flattens the arguments that a dispatch mode is given
from torch.utils._pytree import tree_map_only as tree_map_only  # torch has no public way to map nested tensors


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


def copy_without_hooks(
    module: nn.Module, dropped: Callable[[Any], bool], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Return a module without those forward hooks in it that are `dropped`; torch calls no module without its hooks.

    Modules with such hooks, and those that hold them, are copied; their parameters, buffers and other modules are
    shared, also where they are replaced later. `made` gets what stands for each module.
    """
    if module not in made:
        children = {
            name: None if child is None else copy_without_hooks(child, dropped, made)
            for name, child in module._modules.items()
        }
        kept = [
            OrderedDict((key, hook) for key, hook in hooks.items() if not dropped(hook))
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        made[module] = module
        if children != module._modules or kept != [module._forward_hooks, module._forward_pre_hooks]:
            made[module] = object.__new__(type(module))
            own = dict(zip(("_modules", "_forward_hooks", "_forward_pre_hooks"), (children, *kept), strict=True))
            made[module].__dict__.update({**module.__dict__, **own})
    return made[module]


def contents(module: nn.Module) -> list[ValuesView[Any]]:
    """Return live views of a module's attributes, of the modules in it, and of its forward hooks."""
    held = (module.__dict__, module._modules, module._forward_hooks, module._forward_pre_hooks)
    return [mapping.values() for mapping in held]


def data_config_traits(backbone: nn.Module) -> dict[str, Any]:
    """Return what timm's `resolve_input_data_config` reads a model's image size from."""
    return dict(getattr(backbone, "_traits", {}))


def cpu_capabilities() -> dict[str, Any]:
    """Return what torch tells of the CPU: its name, where known, and its instructions, of which bf16 ones matter here.

    torch before 2.7 has only private names for the instructions, and none for the name.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies in bf16 itself."""
    return any(cpu_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def batch_multiple(size: SymInt, batch: SymInt) -> int | None:
    """Return how many times a traced batch size another size is, or None if it is not a multiple for every batch.

    torch compares symbolic sizes in public only by adding guards to the graph.
    """
    ratio = size.node.expr / batch.node.expr
    return int(ratio) if ratio.is_Integer else None


BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of all of torch's batch norms, which has no public name."""


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view for autograd; torch has no public name for it."""
    return tensor._is_view()


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register a module's forward hooks with another one; torch cannot list hooks."""
    for hook in source._forward_hooks.values():
        target.register_forward_hook(hook)
    for pre_hook in source._forward_pre_hooks.values():
        target.register_forward_pre_hook(pre_hook)


def accelerate_states(*, of_processes: bool) -> list[dict[str, Any]]:
    """Return the dicts of Accelerate's state of the whole program, if asked also those about processes and devices.

    Its public names only read them, and it refuses another precision or device once they are filled.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    classes = [AcceleratorState, GradientState, *([PartialState] if of_processes else [])]
    return [cls._shared_state for cls in classes]


save_config_for_hf = _hub.save_config_for_hf
"""Writes timm's `config.json` of a backbone: the public `save_for_hf` writes all of the backbone's weights too."""


def read_remote(path: str) -> bytes | None:
    """Return the bytes at an address that `datasets` streams from, with its credentials; None for a local path.

    `datasets` stores addresses such as `zip://a.png::hf://datasets/...`, which only its own `xopen` opens.
    """
    from datasets.utils.file_utils import is_local_path, xopen

    if is_local_path(path):
        return None
    with xopen(path, "rb") as file:
        return bytes(file.read())


def dataset_of_table(table: Any, features: Any) -> Any:
    """Return a `datasets.Dataset` of a pyarrow table in memory.

    `Dataset(table)` without a fingerprint pickles the whole table to make one.
    """
    import datasets
    from datasets.fingerprint import generate_random_fingerprint
    from datasets.table import InMemoryTable

    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(InMemoryTable(table), info, fingerprint=generate_random_fingerprint())


def stored_positions(rows: Any, taken: Any) -> Any:
    """Return where rows of a `datasets.Dataset` are stored in its table: `select` and `shuffle` only keep a list."""
    return taken if rows._indices is None else rows._indices.column(0).take(taken)


def in_backward() -> bool:
    """Whether autograd runs this, as when it computes again what was checkpointed; torch has no public name for it."""
    return bool(torch._C._current_graph_task_id() != -1)
