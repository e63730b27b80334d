"""How a network is spread over the processes: whole in each of them (DDP), or a part in each (FSDP2).

torch's `fully_shard` makes the parts, on CPUs and GPUs alike, without Accelerate: it would shard on GPUs only, and does
not know the layers of timm's networks.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import group_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from timm_selfdistill.compat import is_view, tree_map_only
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import EmaSection
from timm_selfdistill.task import SelfDistillationTask, unwrapped_model


class Replicated:
    """Each process has the whole network (DDP), or there is one process only.

    All processes call every method together; `Sharded` has the same methods.
    """

    in_parts = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(self, task: SelfDistillationTask, ema: EmaSection | None) -> nn.Module:
        """Spread a task's network, average its weights if asked, and return what takes the task's place in a step.

        The network is whole and on the device; the optimizer is built afterwards.
        """
        prepared: nn.Module = self.accelerator.prepare(task)
        # After DDP, which would count the average as part of the task.
        _average_weights(task, ema)
        return prepared

    @contextmanager
    def micro_step(self, prepared: nn.Module, *, first: bool, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro batch, the first or last of its optimizer step.

        Gradients are averaged over the processes after the last.
        """
        with nullcontext() if last else self.accelerator.no_sync(prepared):
            yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """Clip the gradients of parameters as timm does; the mode is "norm", "value" or "agc"."""
        dispatch_clip_grad(parameters, limit, mode)

    def state_dict(self, part: Any) -> dict[str, Any]:
        """Return the state of a network, optimizer or the like as one process would have it; for the main process."""
        state: dict[str, Any] = part.state_dict()
        return state

    def load_state_dict(self, part: Any, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or in the other class, with any number of processes."""
        part.load_state_dict(state)

    def whole(self, model: SelfDistillModel) -> SelfDistillModel:
        """Return a network with all its weights: itself if it is whole, otherwise a copy."""
        return model


class Sharded:
    """Each process has a part of the network; weights are gathered unit by unit, when they are computed with."""

    in_parts = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._blank: SelfDistillModel | None = None

    def prepare(self, task: SelfDistillationTask, ema: EmaSection | None) -> nn.Module:
        """As `Replicated`."""
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
        _average_weights(task, ema, foreach=False)
        self._shard(model)
        if ema is not None:
            self._shard(unwrapped_model(task.get_trainable_module(ema=True)))
        return prepared

    @contextmanager
    def micro_step(self, prepared: nn.Module, *, first: bool, last: bool) -> Iterator[None]:
        """As `Replicated`."""
        assert isinstance(prepared, SelfDistillationTask)
        model: Any = unwrapped_model(prepared.trainable_module)
        if first:
            # As DDP does with `broadcast_buffers`.
            share_buffers(model, self.accelerator)
        model.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """As `Replicated`."""
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
        """As `Replicated`."""
        return _gather(part.state_dict(), keep=self.accelerator.is_main_process)

    def load_state_dict(self, part: Any, state: dict[str, Any]) -> None:
        """As `Replicated`."""
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
        """As `Replicated`."""
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
            # Before all other hooks: those that record features must see the copy.
            unit.register_forward_hook(_copy_views, prepend=True)
            fully_shard(unit, mesh=self._mesh)


Parallelism = Replicated | Sharded


def share_buffers(model: SelfDistillModel, accelerator: Accelerator) -> None:
    """Give every process the main process's buffers: otherwise batch statistics differ after a step."""
    if accelerator.num_processes == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        # One exchange for all of them.
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, values in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


@dataclass(frozen=True)
class StepFlags:
    """What counts for all processes if it is so in one of them."""

    step: int
    stop: bool  # whether a process is to stop
    nonfinite: bool  # whether the loss of a process was not finite
    nonfinite_here: bool  # whether the loss of this process was not finite


class FlagExchange:
    """Exchanges the flags of each step between the processes.

    On a CPU the answer is about the step itself. On other devices it is about the step before, so that no process waits
    for the device, unless `at_once`.
    """

    def __init__(self, accelerator: Accelerator, at_once: bool = False) -> None:
        self._device = accelerator.device
        self._alone = accelerator.num_processes == 1
        self._at_once = at_once or accelerator.device.type == "cpu"
        self._pending: tuple[int, Tensor, Tensor, Any] | None = None

    def exchange(self, step: int, stop: bool, nonfinite: Tensor) -> StepFlags | None:
        """Send the flags of a step, and return what is known; `nonfinite` is a tensor of one bool."""
        before = None if self._at_once else self.receive()
        mine = torch.stack([torch.tensor(stop, device=self._device), nonfinite]).to(torch.int32)
        everybody = mine.clone()
        handle = None
        if not self._alone:
            handle = torch.distributed.all_reduce(everybody, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = step, mine, everybody, handle
        return self.receive() if self._at_once else before

    def receive(self) -> StepFlags | None:
        """Wait for the flags of the last step, and return them, unless they were returned before."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, mine, everybody, handle = pending
        if handle is not None:
            handle.wait()
        stop, nonfinite = everybody.tolist()
        return StepFlags(step, bool(stop), bool(nonfinite), bool(mine[1]))


def find_units(model: SelfDistillModel) -> list[nn.Module]:
    """Return the modules whose weights are gathered together: timm's layers of the backbone, and each exit's head.

    What belongs to none of them, such as the stem and the classifier, is gathered with the network as a whole.
    """
    backbone = model.backbone
    if not hasattr(backbone, "group_matcher"):
        return list(model.heads)
    layers = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    # The first and last layer, timm's places for all that is not a block, need not be modules that are called.
    ends = {min(layers.values()), max(layers.values())}
    layer_of = {
        parameter: None if layers[name] in ends else layers[name] for name, parameter in backbone.named_parameters()
    }
    uses = _uses(backbone)
    # A weight that is used elsewhere too must be there at both times.
    alone = [unit for unit in _in_one_layer(backbone, layer_of) if all(uses[p] == n for p, n in _uses(unit).items())]
    return [*alone, *model.heads]


def _in_one_layer(module: nn.Module, layer_of: Mapping[nn.Parameter, float | None]) -> list[nn.Module]:
    """Return the largest modules that have weights of one layer only, but no leaf modules, which are too small."""
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
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if is_view(tensor) else tensor, output)


def _average_weights(task: SelfDistillationTask, ema: EmaSection | None, foreach: bool = True) -> None:
    """Let a task average its weights, if asked; with `foreach`, all of them in a few operations."""
    if ema is not None:
        task.setup_ema(decay=ema.decay, use_warmup=ema.warmup, device=task.device, foreach=foreach)


def _gather(state: Any, *, keep: bool) -> dict[str, Any]:
    """Replace each tensor in parts by the whole one on the CPU, or by None unless `keep`; all processes take part."""

    def gather_one(tensor: DTensor) -> Tensor | None:
        whole: Tensor = tensor.full_tensor()
        return whole.detach().cpu() if keep else None

    gathered: dict[str, Any] = tree_map_only(DTensor, gather_one, state)
    return gathered


def _split(value: Any, like: Tensor) -> Any:
    """Return this process's part of a value that belongs to, or replaces, the tensor in parts `like`."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or not value.ndim:
        return value
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    whole = value.to(like.device).contiguous()
    # Copied, as a part may be a view of the whole, which would stay in memory.
    return distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None).clone()
