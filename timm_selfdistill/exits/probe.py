"""Probe a backbone: its contract and classifier, and one forward of zeros that shows what runs at what cost."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from timm_selfdistill.compat import version_of
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.program import is_out_of_memory

# A torch module that follows timm's contract, for which timm has no base class.
Backbone = Any
ImageSize = int | tuple[int, int]

_CONTRACT = ("feature_info", "get_classifier", "num_classes", "num_features")
_ENTRY_KEYS = ("module", "num_chs", "reduction")


@dataclass(frozen=True)
class Classifier:
    """A backbone's classifier: the path of its first module, and the paths of all of them in groups.

    Classifiers in one group read different features of which each gives a part of the teacher's (CrossViT: a feature a
    branch). Two groups are two whole classifiers, whose features are averaged (distilled transformers: those of the
    class token and of the distillation token).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all its modules."""
        return tuple(path for group in self.groups for path in group)


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
    """What one forward of zeros showed: a record of each tapped module, by its path, and the teacher's feature.

    `feature_dim` is its width D; `feature_axes` says, for each module of the classifier, which dimension of its input
    holds the feature's channels.
    """

    records: dict[str, Record]
    image_size: tuple[int, int]
    total_macs: int
    feature_dim: int
    feature_axes: dict[str, int]


@contextmanager
def unchanged(model: nn.Module, *, restore_tensors: bool = False) -> Iterator[None]:
    """Run the body in eval mode, then restore every module's mode and torch's random state.

    With `restore_tensors`, also the values of parameters and buffers, bit for bit; the body may change them in place,
    but not replace them.
    """
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors] if restore_tensors else []
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        model.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(tensors, before, strict=restore_tensors):
                    tensor.copy_(values)
            # The call lets modules drop what they cached in eval mode; the modes below the model may be mixed.
            model.train(modes[0][1])
            for module, training in modes:
                module.training = training


def check_contract(backbone: Backbone) -> None:
    """Raise ValueError, saying what is missing, if a module does not follow timm's contract."""
    kind = type(backbone).__name__
    missing = [name for name in _CONTRACT if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{kind} cannot be wrapped: it has no {', '.join(missing)}. A backbone is a timm model or a module with "
            f"{', '.join(_CONTRACT)}" + (" (a pure encoder has no classifier)." if "get_classifier" in missing else ".")
        )
    entries = backbone.feature_info
    if not isinstance(entries, list | tuple):
        raise ValueError(f"feature_info of {kind} must be a list of dicts, got {type(entries).__name__}.")
    for index, entry in enumerate(entries):
        absent = [key for key in _ENTRY_KEYS if not isinstance(entry, Mapping) or key not in entry]
        if absent:
            raise ValueError(
                f"feature_info of {kind} must be a list of dicts with the keys {', '.join(_ENTRY_KEYS)}; entry {index} "
                f"has no {', '.join(absent)}: {entry!r}."
            )


def find_classifier(backbone: Backbone) -> Classifier:
    """Return the modules that turn the teacher's feature into logits; raise ValueError if there are none."""
    kind = type(backbone).__name__
    found = backbone.get_classifier()
    heads = list(found) if isinstance(found, tuple | list) else [found]
    groups = [list(head) if isinstance(head, nn.ModuleList) else [head] for head in heads]
    parts = [part for group in groups for part in group]
    if not parts or any(not isinstance(part, nn.Module) or isinstance(part, nn.Identity) for part in parts):
        raise ValueError(
            f"{kind} has no classifier (num_classes={getattr(backbone, 'num_classes', None)}), so "
            "there is nothing to teach: create it with num_classes=N or call its reset_classifier(N) first."
        )
    paths = {id(module): name for name, module in backbone.named_modules()}
    unknown = [type(part).__name__ for part in parts if id(part) not in paths]
    if unknown:
        raise ValueError(f"get_classifier() of {kind} returned {unknown}, not one of its modules.")
    name = paths.get(id(heads[0]), paths[id(parts[0])])
    return Classifier(name, tuple(tuple(paths[id(part)] for part in group) for group in groups))


@torch.inference_mode(False)  # where tensors tell whether they were overwritten
def dry_run(backbone: Backbone, taps: Sequence[str], classifier: Classifier, image_size: ImageSize | None) -> DryRun:
    """Run the backbone once on zeros; ValueError if it fails, returns no logits, or does not run its classifier."""
    kind = type(backbone).__name__
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
            f"{kind} fails on an input of shape {shape}: {str(error).rstrip('.')}. {_advice(backbone, image_size)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{kind} must return logits [B, num_classes], but returned {got}.")
    idle = [name for name in classifier.modules if name not in inputs]
    if idle:
        raise ValueError(
            f"The classifier of {kind} ({', '.join(idle)}) did not run as a module, so the teacher's feature cannot be "
            "read there."
        )
    expected = {backbone.num_features, getattr(backbone, "head_hidden_size", None)}
    axes = {name: _feature_axis(shape, expected) for name, shape in inputs.items()}
    widths = {name: shape[axes[name]] for name, shape in inputs.items()}
    feature_dims = {sum(widths[name] for name in group) for group in classifier.groups}
    if len(feature_dims) != 1:
        raise ValueError(f"The classifiers of {kind} read features of different widths, which have no mean: {widths}.")
    return DryRun(records, (height, width), macs, feature_dims.pop(), axes)


def random_images(backbone: Backbone, image_size: ImageSize | None, count: int) -> Tensor:
    """Return images [count, C, H, W] of noise, the same every time; `image_size` None means the backbone's own."""
    parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *_input_size(backbone, image_size), generator=generator)
    return images.to(device=parameter.device, dtype=parameter.dtype)


def pool_feature(value: Tensor, axis: int) -> Tensor:
    """Return the teacher's feature [B, D]: the mean of what enters the classifier, its channels at `axis`."""
    positions = [dim for dim in range(1, value.ndim) if dim != axis]
    return value.mean(positions) if positions else value


def _input_size(backbone: Backbone, image_size: ImageSize | None) -> tuple[int, int, int]:
    # Only the input size is read; with statistics given, timm does not warn about those of another channel count.
    channels, *size = resolve_input_data_config(backbone, {"mean": 0.5, "std": 0.5})["input_size"]
    if image_size is not None:
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    return channels, size[0], size[1]


def _advice(backbone: Backbone, image_size: ImageSize | None) -> str:
    """Return what to do about a backbone that cannot take images of a size."""
    if image_size is None:
        return "Give image_size if it needs another one."
    height, width = _input_size(backbone, None)[1:]
    size = image_size if isinstance(image_size, int) or image_size[0] != image_size[1] else image_size[0]
    value = str(size if isinstance(size, int) else list(size)).replace(" ", "")
    return (
        f"Its own image_size is {height} x {width}. A backbone of one size, as most transformers are, is built for "
        f"another by img_size={value} of timm.create_model (in a recipe: model.kwargs.img_size={value}), or for any by "
        "dynamic_img_size=true where it knows that."
    )


def _forward(
    backbone: Backbone, zeros: Tensor, taps: Sequence[str], classifiers: Sequence[str]
) -> tuple[dict[str, Record], dict[str, tuple[int, ...]], Any, int]:
    """Return the record of each tap, the shape of each classifier's input, the output and the MACs."""
    counter = MacCounter()
    records = {name: Record() for name in taps}
    inputs: dict[str, tuple[int, ...]] = {}
    versions: list[tuple[Record, Tensor, int]] = []
    order = count()

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
        versions.extend((record, m, version_of(m)) for m in members if isinstance(m, Tensor))
        record.macs = counter.macs
        record.order = next(order)

    def record_feature(name: str, module: nn.Module, args: Any) -> None:
        inputs[name] = tuple(args[0].shape)

    handles = [backbone.get_submodule(n).register_forward_hook(partial(record_tap, n)) for n in records]
    handles += [backbone.get_submodule(n).register_forward_pre_hook(partial(record_feature, n)) for n in classifiers]
    try:
        with unchanged(backbone), torch.no_grad(), counter:
            output = backbone(zeros)
    finally:
        for handle in handles:
            handle.remove()
    # A head reads its tap after the forward: a later in-place operation would have changed it by then.
    for record, member, version in versions:
        record.overwritten |= version_of(member) != version
    return records, inputs, output, counter.macs


def _feature_axis(shape: tuple[int, ...], expected: Container[int | None]) -> int:
    """Return which dimension of a classifier's input holds the channels: one of an expected width, or the usual one."""
    # The input is [B, D], [B, D, H, W], [B, H, W, D], [B, L, D] or [B, D, L].
    usual = {2: (1,), 3: (2, 1), 4: (1, 3)}.get(len(shape), (1,))
    return next((axis for axis in usual if shape[axis] in expected), usual[0])
