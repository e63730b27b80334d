"""A network in parts: each process keeps its share of every weight, gradient and optimizer state (FSDP2).

torch's `fully_shard` does it, on CPUs and GPUs alike. Accelerate is told nothing of it: it would shard on GPUs only,
and does not know what the layers of timm's networks are.
"""

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import group_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map_only

from timm_selfdistill.losses import needs_of
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import EmaSection
from timm_selfdistill.task import SelfDistillationTask, unwrapped_model
from timm_selfdistill.train.batch_norm import share_buffers
from timm_selfdistill.train.parallel import average_weights

# What `accelerate launch` hands on of a configuration with distributed_type FSDP, and which values are done.
_DONE = {
    "FSDP_VERSION": ("2",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_AUTO_WRAP_POLICY": ("no_wrap",),
    "FSDP_IGNORED_MODULES": (),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false",),
}

# timm's optimizers that step weights in parts as they step whole ones (the slow tests of test_sharding compare them).
# Others raise an error, or, as muon, do something else.
OPTIMIZERS = (
    *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adamwlegacy", "adan", "adanw"),
    *("adopt", "adoptw", "lamb", "lambc", "lambw", "laprop", "larc", "lars", "lion", "madgrad", "madgradw", "momentum"),
    *("nadam", "nadamlegacy", "nadamw", "nesterov", "nesterovw", "radam", "radamw", "rmsprop"),
    *("rmsproptf", "rmsproptfw", "sgd", "sgdw"),
)


def asks_for_sharding() -> bool:
    """Return whether the launch asks for FSDP2, as Accelerate's environment variables say.

    Raises:
        ValueError: If it asks for FSDP in a way that is not done.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    asked = {"FSDP_VERSION": "1"} | {name: os.environ[name] for name in _DONE if name in os.environ}
    for name, value in asked.items():
        if value.lower() not in _DONE[name]:
            allowed = " or ".join(_DONE[name]) or "nothing: leave it out"
            raise ValueError(
                f"Accelerate was told to use FSDP with {name}={value}; allowed is {allowed}, as in "
                "recipes/accelerate/fsdp2.yaml. Without FSDP, distributed_type MULTI_GPU leaves the network whole."
            )
    return True


def refuse_optimizer(name: str) -> None:
    """Refuse an optimizer that does not step weights in parts as it would step whole ones.

    Raises:
        ValueError: If it is not known to.
    """
    if name.lower() not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name: {name} is not known to work where each process has a part of the network (FSDP2); "
            f"allowed there are {', '.join(OPTIMIZERS)}."
        )


def refuse_loss(loss: nn.Module) -> None:
    """Refuse a loss that trains along, or for which another network, or the network again, runs beside its step.

    Raises:
        ValueError: If it does.
    """
    needs = needs_of(loss)
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"The loss {type(loss).__name__} has parameters of its own, which are not trained where each process has a "
            "part of the network (FSDP2). Without FSDP, distributed_type MULTI_GPU leaves the network whole."
        )
    if needs.ema or needs.past or needs.batches == "paired":
        raise ValueError(
            f"The loss {type(loss).__name__} has {needs}, which is not done where each process has a part of the "
            "network (FSDP2); allowed there are losses without ema, past and paired batches. Without FSDP, "
            "distributed_type MULTI_GPU leaves the network whole."
        )


class Sharded:
    """Each process has a part of the network; weights are gathered unit by unit, where they are computed with.

    Args:
        accelerator: The accelerator.
    """

    in_parts = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._blank: SelfDistillModel | None = None

    def prepare(self, task: SelfDistillationTask, ema: EmaSection | None) -> nn.Module:
        """As `Parallelism`."""
        model = unwrapped_model(task.trainable_module)
        self._blank = copy.deepcopy(model).to("meta")
        for parameter in model.parameters():
            # fully_shard takes no other layout: channels_last weights are stored row by row.
            parameter.data = parameter.data.contiguous()
            # Each process keeps a part of its own weights, which must be the same. (DDP does that too.)
            torch.distributed.broadcast(parameter.data, src=0)
        # Only the precision, not DDP.
        prepared: nn.Module = self.accelerator.prepare_model(task, evaluation_mode=True)
        # One operation cannot average weights in parts and buffers, which are whole.
        average_weights(task, ema, foreach=False)
        self._shard(model)
        if ema is not None:
            self._shard(unwrapped_model(task.get_trainable_module(ema=True)))
        return prepared

    @contextmanager
    def micro_step(self, prepared: nn.Module, *, first: bool, last: bool) -> Iterator[None]:
        """As `Parallelism`."""
        assert isinstance(prepared, SelfDistillationTask)
        model: Any = unwrapped_model(prepared.trainable_module)
        if first:
            # As DDP does with `broadcast_buffers`.
            share_buffers(model, self.accelerator)
        model.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """As `Parallelism`."""
        if mode != "agc":
            dispatch_clip_grad(parameters, limit, mode)
            return
        for parameter in parameters:
            gradient = parameter.grad
            assert isinstance(parameter, DTensor)
            assert isinstance(gradient, DTensor)
            # The norms are those of rows, which are whole in a part, and of vectors, which are not.
            in_rows = parameter.ndim > 1
            stand_in = nn.Parameter(parameter.to_local() if in_rows else parameter.full_tensor())
            stand_in.grad = gradient.to_local() if in_rows else gradient.full_tensor()
            dispatch_clip_grad([stand_in], limit, mode)
            if not in_rows:
                gradient.copy_(_split(stand_in.grad, gradient))

    def state_dict(self, part: Any) -> dict[str, Any]:
        """As `Parallelism`."""
        state: dict[str, Any] = _gather(part.state_dict(), keep=self.accelerator.is_main_process)
        return state

    def load_state_dict(self, part: Any, state: dict[str, Any]) -> None:
        """As `Parallelism`."""
        if isinstance(part, nn.Module):
            state = {name: _split(state[name], value) for name, value in part.state_dict().items()}
        elif isinstance(part, torch.optim.Optimizer):
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            moments = {
                index: {name: _split(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            state = {**state, "state": moments}
        part.load_state_dict(state)

    def whole(self, model: SelfDistillModel) -> SelfDistillModel:
        """As `Parallelism`."""
        if not isinstance(model, FSDPModule):
            return model
        assert self._blank is not None
        whole = copy.deepcopy(self._blank).to_empty(device=self.accelerator.device)
        whole.load_state_dict(_gather(model.state_dict(), keep=True))
        # Those that a state dict leaves out, too.
        for buffer, value in zip(whole.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)
        return whole

    def _shard(self, model: SelfDistillModel) -> None:
        """Let each process keep its part of a network, in place."""
        for unit in [*find_units(model), model]:
            # First of all, for what the taps record too.
            unit.register_forward_hook(_copy_views, prepend=True)
            fully_shard(unit, mesh=self._mesh)


def find_units(model: SelfDistillModel) -> list[nn.Module]:
    """Return the modules whose weights are gathered together: timm's layers of the backbone, and each exit's head.

    What belongs to none of them, such as the stem and the classifier, is gathered with the network as a whole.

    Args:
        model: The wrapped model.
    """
    backbone = model.backbone
    if not hasattr(backbone, "group_matcher"):
        return list(model.heads)
    layers = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    # The first and last layer, timm's places for all that is no block, need not be modules that are called.
    ends = {min(layers.values()), max(layers.values())}
    layer_of = {
        parameter: None if layers[name] in ends else layers[name] for name, parameter in backbone.named_parameters()
    }
    uses = _uses(backbone)
    # A weight that is used elsewhere too must be there at both times.
    alone = [unit for unit in _in_one_layer(backbone, layer_of) if all(uses[p] == n for p, n in _uses(unit).items())]
    return [*alone, *model.heads]


def _in_one_layer(module: nn.Module, layer_of: Mapping[nn.Parameter, float | None]) -> list[nn.Module]:
    """Return the largest modules that have weights of one layer only, but for single ones, which are too small."""
    children = list(module.children())
    # A list is not called, and so gathers nothing.
    is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    layers = {layer_of[parameter] for parameter in module.parameters()}
    if children and is_called and len(layers) == 1 and None not in layers:
        return [module]
    return [unit for child in children for unit in _in_one_layer(child, layer_of)]


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def _copy_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Copy what a unit returns as a view: changed in place, it would not tell when its weights are needed again."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)


def _gather(value: Any, *, keep: bool) -> Any:
    """Return a state with whole tensors, on the CPU, in the place of those in parts; None there unless `keep`.

    All processes gather them, one by one.
    """
    if isinstance(value, DTensor):
        whole: Tensor = value.full_tensor()
        return whole.detach().cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: _gather(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_gather(item, keep=keep) for item in value)
    return value


def _split(value: Any, like: Tensor) -> Any:
    """Return this process's part of a tensor that belongs to one in parts.

    Args:
        value: Part of a state.
        like: The parameter that it is of, or what it takes the place of.
    """
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or not value.ndim:
        return value
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    whole = value.to(like.device).contiguous()
    # Copied, as a part is else a view of the whole, which would stay.
    return distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None).clone()
