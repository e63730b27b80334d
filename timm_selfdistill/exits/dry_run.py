"""One forward of zeros through a backbone, which shows what runs when, at what cost, and returns what."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from timm_selfdistill.exits.candidates import Backbone, Classifier
from timm_selfdistill.failures import is_out_of_memory
from timm_selfdistill.flops import MacCounter


@dataclass
class Record:
    """What a hook saw at one module."""

    calls: int = 0
    overwritten: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    is_sequence: bool = False
    macs: int = 0
    order: int = 0


@dataclass(frozen=True)
class DryRun:
    """What one forward of zeros showed.

    Args:
        records: What was seen at each tapped module, by its path.
        image_size: Height and width of the image in pixels.
        total_macs: Multiply-accumulates of the whole forward.
        feature_dim: Width D of the teacher's feature.
        feature_axes: For each module of the classifier, which dimension of its input holds the feature's channels.
    """

    records: dict[str, Record]
    image_size: tuple[int, int]
    total_macs: int
    feature_dim: int
    feature_axes: dict[str, int]


@torch.inference_mode(False)  # where tensors tell whether they were overwritten
def dry_run(
    backbone: Backbone,
    taps: Sequence[str],
    classifier: Classifier,
    image_size: int | tuple[int, int] | None,
) -> DryRun:
    """Run the backbone once on zeros, counting calls, shapes and cost at every tap.

    Raises:
        ValueError: If the backbone fails, returns no logits, or does not run its classifier as modules.
    """
    channels, height, width = _input_size(backbone, image_size)
    parameter = next(backbone.parameters())
    shape = (1, channels, height, width)
    try:
        zeros = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
        records, inputs, output, macs = _forward(backbone, zeros, taps, classifier.modules)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{type(backbone).__name__} fails on an input of shape {shape}: {str(error).rstrip('.')}. "
            f"{_advice(backbone, image_size)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(backbone).__name__} must return logits [B, num_classes], but returned {got}.")
    idle = [name for name in classifier.modules if name not in inputs]
    if idle:
        raise ValueError(
            f"The classifier of {type(backbone).__name__} ({', '.join(idle)}) did not run as a module, "
            "so the teacher's feature cannot be read there."
        )
    promised = {backbone.num_features, getattr(backbone, "head_hidden_size", None)}
    axes = {name: _feature_axis(shape, promised) for name, shape in inputs.items()}
    widths = {name: shape[axes[name]] for name, shape in inputs.items()}
    feature_dims = {sum(widths[name] for name in group) for group in classifier.groups}
    if len(feature_dims) != 1:
        raise ValueError(
            f"The classifiers of {type(backbone).__name__} read features of different widths, of which no mean can be "
            f"taken: {widths}."
        )
    return DryRun(records, (height, width), macs, feature_dims.pop(), axes)


def random_images(backbone: Backbone, image_size: int | tuple[int, int] | None, count: int) -> Tensor:
    """Return images [count, C, H, W] of noise, the same every time, as the backbone can take them.

    Args:
        backbone: The backbone.
        image_size: Height and width in pixels; the backbone's own if None.
        count: How many.
    """
    parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *_input_size(backbone, image_size), generator=generator)
    return images.to(device=parameter.device, dtype=parameter.dtype)


def _input_size(backbone: Backbone, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    # Only the input size is read; with statistics given, timm does not warn about those of another channel count.
    channels, *size = resolve_input_data_config(backbone, {"mean": 0.5, "std": 0.5})["input_size"]
    if image_size is not None:
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    return channels, size[0], size[1]


def _advice(backbone: Backbone, image_size: int | tuple[int, int] | None) -> str:
    """Return what to do about a backbone that cannot take images of a size."""
    if image_size is None:
        return "Give image_size if it needs another one."
    height, width = _input_size(backbone, None)[1:]
    size = image_size if isinstance(image_size, int) or image_size[0] != image_size[1] else image_size[0]
    return (
        f"Its own image_size is {height} x {width}. A backbone of one size, as most transformers are, is built for "
        f"another by img_size={_without_spaces(size)} of timm.create_model (in a recipe: "
        f"model.kwargs.img_size={_without_spaces(size)}), or for any by dynamic_img_size=true where it knows that."
    )


def _without_spaces(size: int | tuple[int, int]) -> str:
    return str(size if isinstance(size, int) else list(size)).replace(" ", "")


def _forward(
    backbone: Backbone, zeros: Tensor, taps: Sequence[str], classifiers: Sequence[str]
) -> tuple[dict[str, Record], dict[str, tuple[int, ...]], Any, int]:
    """Return the record of each tap, the shape of each classifier's input, the output and the MACs."""
    counter = MacCounter()
    records = {name: Record() for name in taps}
    inputs: dict[str, tuple[int, ...]] = {}
    versions: list[tuple[Record, Tensor, int]] = []
    clock = iter(range(10**9))

    def record_tap(name: str, module: nn.Module, args: Any, output: Any) -> None:
        members = output if isinstance(output, tuple | list) else (output,)
        record = records[name]
        record.calls += 1
        record.is_sequence = isinstance(output, tuple | list)
        # A tensor that is returned twice (as SelecSLS does) is one tap.
        first = {id(m): index for index, m in reversed(list(enumerate(members)))}
        record.shapes = tuple(
            tuple(m.shape) if isinstance(m, Tensor) and first[id(m)] == index else () for index, m in enumerate(members)
        )
        versions.extend((record, m, m._version) for m in members if isinstance(m, Tensor))
        record.macs = counter.macs
        record.order = next(clock)

    def record_feature(name: str, module: nn.Module, args: Any) -> None:
        inputs[name] = tuple(args[0].shape)

    handles = [backbone.get_submodule(n).register_forward_hook(partial(record_tap, n)) for n in records]
    handles += [backbone.get_submodule(n).register_forward_pre_hook(partial(record_feature, n)) for n in classifiers]
    try:
        with untouched(backbone), torch.no_grad(), counter:
            output = backbone(zeros)
    finally:
        for handle in handles:
            handle.remove()
    # A head reads its tap after the forward: an in-place operation behind the tap would have changed it by then.
    for record, member, version in versions:
        record.overwritten |= member._version != version
    return records, inputs, output, counter.macs


def _feature_axis(shape: tuple[int, ...], promised: Container[int | None]) -> int:
    """Return which dimension of a classifier's input holds the channels: one of the promised width, or the usual one.

    The input is [B, D], [B, D, H, W], [B, H, W, D], [B, L, D] or [B, D, L].
    """
    usual = {2: (1,), 3: (2, 1), 4: (1, 3)}.get(len(shape), (1,))
    return next((axis for axis in usual if shape[axis] in promised), usual[0])


def pool_feature(value: Tensor, axis: int) -> Tensor:
    """Return the teacher's feature [B, D]: what enters the classifier, averaged over all positions.

    Args:
        value: What enters the classifier, batch first.
        axis: The dimension that holds the channels.
    """
    positions = [dim for dim in range(1, value.ndim) if dim != axis]
    return value.mean(positions) if positions else value


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode, then restore every module's mode and the random number generators."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


unchanged = untouched
