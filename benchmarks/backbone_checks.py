"""What "any timm backbone" means: checks that each prove one sentence of it on one model, and say which one broke.

On real tensors answers are compared bit for bit. On the meta device, which has shapes and no numbers, the operations
that run are compared instead, one by one: the same operations on the same shapes give the same answer.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_selfdistill as sd
from timm_selfdistill.exits import BackboneTaps, ExitPoint, Exits
from timm_selfdistill.exits.layout import resolve_feature_info
from timm_selfdistill.heads import PUBLISHED, as_map, choose_head
from timm_selfdistill.measure import MacCounter

NUM_CLASSES = 10
BATCH_SIZE = 2


class Broken(Exception):
    """A check that did not hold."""


@dataclass
class Subject:
    """One model under test.

    Args:
        name: Its name in timm.
        device: "cpu" or "meta".
        image_size: Height and width, where they are not to be the model's own.
        head: Name of the head of every exit.
        model_kwargs: Further arguments of `timm.create_model`.
    """

    name: str
    device: str = "cpu"
    image_size: int | None = None
    head: str = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self) -> Any:
        """Return the bare backbone, in train mode and the same every time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return timm.create_model(self.name, **{"num_classes": NUM_CLASSES, **self.model_kwargs})

    def wrap(self, backbone: nn.Module, exits: Exits | None = None) -> sd.SelfDistillModel:
        """Return a backbone with exits."""
        return sd.wrap(backbone, exits=exits, head=self.head, image_size=self.image_size)

    def images(self, backbone: nn.Module) -> Tensor:
        """Return a batch of images [B, C, H, W]."""
        channels, *size = resolve_input_data_config(backbone, {"mean": 0.5, "std": 0.5})["input_size"]
        size = [self.image_size] * 2 if self.image_size else size
        torch.manual_seed(1)
        return torch.randn(BATCH_SIZE, channels, *size, device=self.device)

    @property
    def is_real(self) -> bool:
        """Whether tensors have numbers."""
        return self.device != "meta"


def check_backbone(subject: Subject, bare: Any = None) -> dict[str, Any]:
    """Run every check on a model.

    Args:
        subject: The model.
        bare: What `subject.create()` returned, where it was called already.

    Returns:
        What was found: class, family, parameters, cost, exits, and the outcome of what a model may or may not offer.

    Raises:
        Broken: If a check does not hold.
        Exception: Whatever a part of the model raises.
    """
    bare = subject.create() if bare is None else bare
    row: dict[str, Any] = {
        "class": type(bare).__name__,
        "family": type(bare).__module__.removeprefix("timm.models."),
        "params": _count_parameters(bare),
    }
    if not hasattr(bare, "get_classifier"):
        check_that_an_encoder_is_refused(bare)
        return {**row, "status": "encoder"}
    model = subject.wrap(copy.deepcopy(bare))
    x = subject.images(bare)
    row |= describe(model)
    check_exits(model)
    check_same_answer(bare, model, x)
    row |= check_outputs(model, x)
    loss = check_training_step(bare, model, x)
    row["grad_checkpointing"] = check_gradient_checkpointing(model, x, loss)
    check_copy(model, x)
    check_saving(subject, model, x)
    row["early_exit"] = check_early_exit(model, x) if subject.is_real else None
    row["truncation"] = check_truncation(model, x, row["grad_checkpointing"]) if subject.is_real else None
    check_new_classifier(model, x)
    return {**row, "status": "supported"}


def describe(model: sd.SelfDistillModel) -> dict[str, Any]:
    """Return what a table of models shows of one."""
    return {
        "feature_dim": model.taps.feature_dim,
        "classifiers": [list(group) for group in model.taps.classifier.groups],
        "exits": [
            {
                "name": point.name,
                "module": point.module,
                "cost": round(point.cost, 4),
                "head": choose_head(point) if model.wrap_config.head == PUBLISHED else model.wrap_config.head,
                "taps": [[tap.layout, tap.channels, tap.grid, tap.num_prefix_tokens] for tap in point.taps],
            }
            for point in model.points
        ],
    }


def check_that_an_encoder_is_refused(backbone: nn.Module) -> None:
    """A model without a classifier is an error that says so."""
    try:
        sd.wrap(backbone)
    except ValueError as error:
        if "no get_classifier" in str(error):
            return
        raise Broken(f"the error about a missing classifier does not say so: {error}") from error
    raise Broken("a model without a classifier was wrapped")


def check_exits(model: sd.SelfDistillModel) -> None:
    """There are exits, from shallow to deep, none of them at the very start or end."""
    costs = [point.cost for point in model.points]
    _require(1 <= len(costs) <= 3, f"{len(costs)} exits by default")
    _require(all(0 < cost < 1 for cost in costs), f"the exits' shares of the cost are {costs}")
    _require(costs == sorted(costs), f"the exits are not in order: {costs}")


def check_same_answer(bare: nn.Module, model: sd.SelfDistillModel, x: Tensor) -> None:
    """`model(x)` is what the bare backbone gives, in train and eval mode, and so are its batch statistics."""
    for training in (True, False):
        bare.train(training)
        model.train(training)
        _require_same_run(lambda: bare(x), lambda: model(x), f"model(x), training={training}")
    state = model.backbone.state_dict()
    _require(list(state) == list(bare.state_dict()), "the backbone's state dict has other keys")
    if not x.is_meta:
        changed = [name for name, value in bare.state_dict().items() if not torch.equal(value, state[name])]
        _require(not changed, f"the backbone's state differs: {changed}")


def check_outputs(model: sd.SelfDistillModel, x: Tensor) -> dict[str, Any]:
    """`return_exits` gives a logit and a feature tensor for every exit; every exit can be asked for alone.

    Returns:
        The multiply-accumulates of the backbone for one image, and what `check_layouts` and `compare_feature` return.
    """
    model.eval()
    with torch.no_grad():
        with _recorded_taps(model) as taps:
            out = model(x, return_exits=True)
        with MacCounter() as counter:
            _require_same(out.logits[-1], model(x), "the last logits")
        _require_shapes(out.logits, (len(x), NUM_CLASSES), "logits")
        _require_shapes(out.features, (len(x), model.taps.feature_dim), "features")
        _require(len(out.logits) == len(out.features) == model.num_exits + 1, "not one output an exit")
        for index, logits in enumerate(out.logits[:1] if x.is_meta else out.logits):
            _require_same(logits, model.forward_exit(x, index), f"forward_exit(x, {index})")
        return {
            "macs": counter.macs // len(x),
            "teacher_feature": compare_feature(model, x, out.features[-1]),
            "taps_checked": check_layouts(model, x, taps),
        }


def compare_feature(model: sd.SelfDistillModel, x: Tensor, feature: Tensor) -> str:
    """Compare the teacher's feature with what timm's `forward_head(..., pre_logits=True)` returns.

    Returns:
        "as forward_head", or how it differs, which is no fault: timm may include a first layer or a norm of the
        classifier there.

    Raises:
        Broken: If the widths differ.
    """
    try:
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    except Exception as error:
        return f"forward_head fails: {type(error).__name__}"
    if isinstance(expected, Tensor) and expected.ndim == 2:
        _require(expected.shape == feature.shape, f"the feature is {list(feature.shape)}, not {list(expected.shape)}")
    if not isinstance(expected, Tensor) or expected.shape != feature.shape:
        return f"other shape: {list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__}"
    same = x.is_meta or torch.allclose(expected, feature, rtol=1e-3, atol=1e-5)
    return "as forward_head" if same else "other values"


def check_layouts(model: sd.SelfDistillModel, x: Tensor, taps: Sequence[tuple[Tensor, ...]]) -> dict[str, Any]:
    """The taps, read as feature maps, are those of timm's own `forward_intermediates`, which knows every family.

    Returns:
        The numbers of taps, of those of which timm has a feature map of the same shape, and of those of which it has
        one of the same values; and why none could be compared, where `forward_intermediates` fails.

    Raises:
        Broken: If a tap has the numbers of timm's feature map, or as many of them, in another order.
    """
    candidates = resolve_feature_info(model.backbone)[0].values()
    aligned = len(candidates) == len(model.feature_info)
    indices = {c.name: c.indices for c in candidates if c.entries or aligned}
    counts: dict[str, Any] = {"taps": sum(len(point.taps) for point in model.points), "same_shape": 0, "same_values": 0}
    try:
        features = model.backbone.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    except Exception as error:  # of whatever kind: it is timm's, and is reported
        return {**counts, "error": f"{type(error).__name__}: {error}"}
    for point, tapped in zip(model.points, taps, strict=True):
        for tap, tensor, index in zip(point.taps, tapped, indices.get(point.name, ()), strict=False):
            if tap.grid is None or index >= len(features):
                continue
            ours, theirs = as_map(tensor, tap), features[index]
            _require(ours.shape == theirs.shape, f"{tap.name} was read as {list(ours.shape)}: {list(theirs.shape)}")
            counts["same_shape"] += 1
            if not x.is_meta:
                same = torch.equal(ours, theirs)
                counts["same_values"] += same
                shuffled = not same and torch.equal(ours.flatten(1).sort()[0], theirs.flatten(1).sort()[0])
                _require(not shuffled, f"{tap.name} was read in the wrong order")
    return counts


def check_training_step(bare: nn.Module, model: sd.SelfDistillModel, x: Tensor) -> Tensor:
    """A training step gives every parameter of every head a gradient, and the backbone's whatever a plain step does.

    Returns:
        The loss of the step.
    """
    bare.train()
    plain = bare(x)
    # Distilled models may return a pair, and some a list; here any sum reaches all that training reaches.
    sum(part.square().sum() for part in (plain if isinstance(plain, tuple | list) else (plain,))).backward()
    loss = _step(model, x)
    missing = [name for name, p in model.heads.named_parameters() if p.grad is None]
    _require(not missing, f"parameters of heads without a gradient: {missing}")
    if not x.is_meta:
        idle = [
            index
            for index, head in enumerate(model.heads)
            if not any(p.grad is not None and p.grad.any() for p in head.get_submodule("body").parameters())
        ]
        _require(not idle, f"the gradients of these heads are zero: {idle}")
    for (name, one), other in zip(bare.named_parameters(), model.backbone.parameters(), strict=True):
        _require(other.grad is not None or one.grad is None, f"{name} has a gradient in plain training only")
    return loss


def check_gradient_checkpointing(model: sd.SelfDistillModel, x: Tensor, expected: Tensor) -> bool:
    """Under gradient checkpointing each head runs once a step, and the loss is the one expected.

    Returns:
        Whether timm offers gradient checkpointing for the model.
    """
    try:
        model.set_grad_checkpointing(True)
    except AssertionError:  # how timm says that it does not offer it
        return False
    runs = [0] * model.num_exits
    handles = [
        head.register_forward_hook(lambda module, args, output, index=index: runs.__setitem__(index, runs[index] + 1))
        for index, head in enumerate(model.heads)
    ]
    try:
        loss = _step(model, x)
    finally:
        for handle in handles:
            handle.remove()
        model.set_grad_checkpointing(False)
    _require(runs == [1] * model.num_exits, f"under gradient checkpointing the heads ran {runs} times")
    if not x.is_meta:
        _require(torch.allclose(loss, expected, rtol=1e-4), f"gradient checkpointing: loss {loss}, not {expected}")
    return True


def check_copy(model: sd.SelfDistillModel, x: Tensor) -> None:
    """A deep copy gives the same answers."""
    clone = copy.deepcopy(model)
    _require_same_outputs(clone, model, x, "a deep copy")


def check_saving(subject: Subject, model: sd.SelfDistillModel, x: Tensor) -> None:
    """A saved model loads to the same answers; on the meta device, where nothing can be saved, it is built anew."""
    if subject.is_real:
        with tempfile.TemporaryDirectory() as folder:
            sd.save_pretrained(model, folder)
            loaded = sd.from_pretrained(folder)
    else:
        loaded = subject.wrap(subject.create(), [point.name for point in model.points])
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    _require({n: v.shape for n, v in loaded.state_dict().items()} == shapes, "a loaded model has other weights")
    _require(_essence(loaded.taps) == _essence(model.taps), f"a loaded model has other exits: {loaded.points}")
    _require_same_outputs(loaded, model, x, "a loaded model")


def check_early_exit(model: sd.SelfDistillModel, x: Tensor) -> list[bool]:
    """Each image gets the logits of the first exit that is sure of it, as if all had run and one were chosen then.

    Returns:
        For each exit, whether the backbone runs on with a part of its batch behind it.
    """
    model.eval()
    torch.manual_seed(3)
    images = torch.cat([x, torch.randn_like(x), 3 * torch.rand_like(x)])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*part of its batch")
        every = model(images, return_exits=True).logits
        sure = torch.stack(every[:-1]).softmax(-1).amax(-1)
        thresholds = [_widest_gap(row) for row in sure]
        leaves = torch.cat([sure >= torch.tensor(thresholds).unsqueeze(1), sure.new_ones(1, len(images)) > 0])
        expected = leaves.int().argmax(0)
        fast = sd.EarlyExit(model, thresholds)
        out = fast(images)
    _require(torch.equal(out.exit_index, expected), f"images left at {out.exit_index.tolist()}: {expected.tolist()}")
    answers = torch.stack(every)[expected, torch.arange(len(images))]
    # Kernels differ between batch sizes.
    off = (out.logits - answers).abs().max() / answers.abs().max()
    _require(bool(off < 1e-3), f"early exit gives other logits, off by a share of {off}")
    return list(fast.shrinks)


def _widest_gap(confidence: Tensor) -> float:
    """Return a threshold between the images, farthest from any of them."""
    ordered = confidence.sort().values
    place = int(ordered.diff().argmax())
    return float(ordered[place : place + 2].mean())


def check_truncation(model: sd.SelfDistillModel, x: Tensor, grad_checkpointing: bool) -> list[float]:
    """Cut off behind an exit, a model has the exit's logits in both modes and trains with the exit's gradients.

    Args:
        model: The model.
        x: Images [B, C, H, W].
        grad_checkpointing: Whether timm offers gradient checkpointing for it.

    Returns:
        For each exit, the share of the wrapped model's parameters that is left.
    """
    shares = []
    for index, name in enumerate(model.exit_names[:-1]):
        small = sd.truncate(model, index)
        to_exit = partial(model.forward_exit, exit=index)
        for training in (True, False):
            model.train(training)
            small.train(training)
            _require_same_run(partial(to_exit, x), partial(small, x), f"cut at {name}, training={training}: the answer")
        expected = {
            key.replace(f"heads.{index}.", "head."): gradient for key, gradient in _gradients(model, to_exit, x).items()
        }
        _require_same_gradients(_gradients(small, small, x), expected, 0, f"cut at {name}")
        if grad_checkpointing:
            small.set_grad_checkpointing()
            _require_same_gradients(_gradients(small, small, x), expected, 1e-3, f"cut at {name}, under checkpointing")
        shares.append(round(_count_parameters(small) / _count_parameters(model), 4))
    return shares


def _gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor | None]:
    """Return the gradients of a mean of squared logits."""
    model.train().zero_grad()
    torch.manual_seed(2)
    run(x).square().mean().backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _require_same_gradients(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float, what: str
) -> None:
    for name, one in found.items():
        other = expected[name]
        if one is None or other is None:
            _require(one is other, f"{what}: only one of two runs has a gradient of {name}")
        else:
            near = torch.allclose(one, other, rtol=0, atol=tolerance * float(other.abs().max()))
            _require(near, f"{what}: the gradient of {name} differs")


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_new_classifier(model: sd.SelfDistillModel, x: Tensor) -> None:
    """`reset_classifier` resizes the logits of every exit, and the model still trains."""
    model.reset_classifier(NUM_CLASSES + 1)
    with torch.no_grad():
        out = model.train()(x, return_exits=True)
    _require_shapes(out.logits, (len(x), NUM_CLASSES + 1), "logits after reset_classifier")


def _step(model: sd.SelfDistillModel, x: Tensor) -> Tensor:
    """Run forward, self-distillation loss and backward, and return the loss."""
    model.train()
    model.zero_grad()
    torch.manual_seed(2)
    out = model(x, return_exits=True)
    if x.is_meta:
        # The loss switches autocast off, which the meta device does not have; its terms reach the same tensors.
        loss = torch.stack([tensor.square().mean() for tensor in (*out.logits, *out.features[:-1])]).sum()
    else:
        loss = sd.SelfDistillationLoss("byot-iccv2019")(out, torch.arange(len(x)) % NUM_CLASSES)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@contextmanager
def _recorded_taps(model: sd.SelfDistillModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collect what each head is given while the body runs."""
    seen: list[tuple[Tensor, ...]] = []
    handles = [head.register_forward_pre_hook(lambda module, args: seen.append(args)) for head in model.heads]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _essence(taps: BackboneTaps) -> tuple[tuple[ExitPoint, ...], Any, int]:
    return taps.points, taps.classifier, taps.feature_dim


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


def _require_shapes(tensors: tuple[Tensor, ...], shape: tuple[int, ...], what: str) -> None:
    _require(all(tensor.shape == shape for tensor in tensors), f"{what} of shapes {[list(t.shape) for t in tensors]}")


def _require_same(one: Tensor, other: Tensor, what: str) -> None:
    same = one.shape == other.shape if one.is_meta else torch.equal(one, other)
    _require(same, f"{what} differs")


def _require_same_outputs(one: sd.SelfDistillModel, other: sd.SelfDistillModel, x: Tensor, what: str) -> None:
    if x.is_meta:
        # Their shapes follow from those of the weights.
        return
    with torch.no_grad():
        first, second = (model.eval()(x, return_exits=True) for model in (one, other))
    for a, b in zip((*first.logits, *first.features), (*second.logits, *second.features), strict=True):
        _require_same(a, b, what)


def _require_same_run(one: Callable[[], Any], other: Callable[[], Any], what: str) -> None:
    """Compare the answers of two runs, and on the meta device the operations that gave them."""
    runs = []
    for run in (one, other):
        torch.manual_seed(2)
        with torch.no_grad(), _OperationLog() as log:
            runs.append((run(), log.operations))
    (first, operations), (second, other_operations) = runs
    _require_same(first, second, what)
    if first.is_meta:
        _require(operations == other_operations, f"{what} runs other operations")


class _OperationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation, and the shapes and numbers that it was given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs)))
        self.operations.append((func, *given))
        return func(*args, **(kwargs or {}))
