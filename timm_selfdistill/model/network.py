"""Self-distillation as a network: a timm backbone with classifiers on its intermediate features."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_selfdistill.backbones import use_small_stem  # which also registers our networks with timm
from timm_selfdistill.exits import Backbone, BackboneTaps, ExitPoint, Exits, explore, find_exit_points, pool_feature
from timm_selfdistill.heads import AUTO, PROPORTIONAL, ExitHead, HeadBudget, each_head_kwargs, fit_heads, resolve_budget
from timm_selfdistill.model.ensemble import Ensemble
from timm_selfdistill.model.gradients import GradientGate
from timm_selfdistill.model.hooks import Hooks, Visit, run_unread
from timm_selfdistill.model.interface import HubInterface, TimmInterface
from timm_selfdistill.model.timm_models import check_size, create_backbone, with_image_size


class ExitOutput(NamedTuple):
    """What a model returns with `return_exits=True`, shallow to deep; the last entry is the backbone's own.

    Attributes:
        logits: K + 1 tensors [B, num_classes].
        features: K + 1 tensors [B, D], D the width of what enters the backbone's classifier.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


@dataclass(frozen=True)
class WrapConfig:
    """How a backbone was wrapped: the arguments of `wrap`, resolved; `head_kwargs` has an entry for each exit."""

    head: str
    head_kwargs: tuple[Mapping[str, Any], ...]
    hint_adapter: bool
    small_stem: bool
    image_size: tuple[int, int] | None


def wrap(
    backbone: str | nn.Module,
    *,
    num_classes: int | None = None,
    exits: Exits | None = None,
    head: str = AUTO,
    head_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    head_budget: float | None = None,
    hint_adapter: bool = False,
    small_stem: bool = False,
    image_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> "SelfDistillModel":
    """Turn a timm model into its own teacher by attaching classifiers to its intermediate features.

    Args:
        backbone: Name of a timm model, or a timm model (itself, not a copy; hooks are added to it).
        num_classes: Number of classes of a backbone given by name; its default otherwise.
        exits: How many exits, spread evenly over the backbone's cost; or for each exit an index into `feature_info`
            (int), a share of the cost (float) or a module path (str). By default three, or fewer where the backbone
            has fewer stages, or heads fit the budget at fewer points.
        head: Name of a registered head; "published" for the published one that suits each tap; or "auto" for the head
            `proportional`, as wide as the budget allows.
        head_kwargs: Further arguments of the head, for all exits or a mapping for each.
        head_budget: Share of the backbone's multiply-accumulates that each of the default heads may cost; all of them
            together may have 2.5 times this share of its parameters. 0.1 by default.
        hint_adapter: Report each exit's feature through a trainable linear layer (the journal version).
        small_stem: Replace a ResNet's stem by a 3x3 convolution with stride 1, for images of about 32 px.
        image_size: Input height and width in pixels, of the dry run and of a backbone given by name that is built for
            one size; the backbone's own by default.
        pretrained: Load the pretrained weights of a backbone given by name.
        model_kwargs: Further arguments of `timm.create_model` for a backbone given by name.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If the backbone cannot be wrapped or is larger than the memory, or if an exit, head or option is
            unknown; the message lists what is allowed.
    """
    if isinstance(backbone, SelfDistillModel):
        raise ValueError("The model is wrapped already; wrap its .backbone to choose other exits.")
    if isinstance(backbone, str):
        kwargs = dict(model_kwargs or {}) | ({} if num_classes is None else {"num_classes": num_classes})
        kwargs = with_image_size(backbone, kwargs, image_size)
        check_size(backbone, kwargs)
        backbone = create_backbone(backbone, pretrained, kwargs)
    elif num_classes is not None or pretrained or model_kwargs:
        raise ValueError(
            "num_classes, pretrained and model_kwargs create a backbone from its name; for the "
            f"{type(backbone).__name__} given, call its reset_classifier(num_classes) first."
        )
    if small_stem:
        use_small_stem(backbone)
    head = PROPORTIONAL if head == AUTO else head
    share = resolve_budget(head, head_kwargs, head_budget)
    if share is None:
        taps, arguments = find_exit_points(backbone, exits, image_size), head_kwargs or {}
    else:
        fitted = fit_heads(HeadBudget(share, explore(backbone, image_size, exits), backbone), exits)
        taps, arguments = fitted.taps, fitted.head_kwargs
        if fitted.warning is not None:
            warnings.warn(fitted.warning, stacklevel=2)
    each = each_head_kwargs(arguments, len(taps.points))
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return SelfDistillModel(backbone, taps, WrapConfig(head, each, hint_adapter, small_stem, size))


class SelfDistillModel(nn.Module, TimmInterface, HubInterface):
    """A timm backbone and its exits; made by `wrap`.

    `model(x)` is the backbone's own forward, bit for bit. It has the methods and attributes that timm reads from a
    model; `backbone` is the timm model itself.

    Args:
        backbone: The timm model.
        taps: Where the exits and the teacher's feature are read.
        config: How the backbone was wrapped.

    Attributes:
        ensemble: How the logits of all exits become one answer; the mean until `fit_ensemble`; saved with the model.
        gate: Scales the gradients of the exits into the backbone; set by a `SelfDistillationTask`.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, taps: BackboneTaps, config: WrapConfig) -> None:
        super().__init__()
        self.training = backbone.training
        self.backbone = backbone
        self.taps = taps
        self.wrap_config = config
        self.backbone_frozen = False
        self.ensemble = Ensemble.mean(len(taps.points) + 1)
        self.heads = self._build_heads(self.num_classes)
        self.gate = GradientGate().train(self.training)
        self._hooks = Hooks(backbone, taps.points, taps.classifier.modules)

    def train(self, mode: bool = True) -> "SelfDistillModel":
        """Set the mode; with `backbone_frozen` the backbone stays in eval mode, and keeps its batch statistics."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor, return_exits: bool = False) -> Tensor | ExitOutput:
        """Classify a batch.

        Args:
            x: Images [B, C, H, W].
            return_exits: Also run the exits.

        Returns:
            The backbone's logits [B, num_classes]; with `return_exits` an `ExitOutput` instead.
        """
        if not return_exits:
            return _mean_logits(run_unread(self.backbone, x))
        call = self._hooks.run(self.backbone, x)
        logits = _mean_logits(call.output)
        feature = self._teacher_feature(call.features)
        outputs = self.gate(self.heads, call.taps)
        if any((out[0].shape[1], out[1].shape[1]) != (logits.shape[1], feature.shape[1]) for out in outputs):
            raise RuntimeError(
                "The backbone's classifier is not the one that was wrapped: replace it by model.reset_classifier, "
                "not by model.backbone's."
            )
        return ExitOutput((*(out[0] for out in outputs), logits), (*(out[1] for out in outputs), feature))

    def forward_exit(self, x: Tensor, exit: int) -> Tensor:
        """Return the logits [B, num_classes] of a batch at one exit, without running what comes after it.

        Args:
            x: Images [B, C, H, W].
            exit: Index of the exit, 0 the shallowest; `num_exits` is the backbone's own classifier.

        Raises:
            ValueError: If there is no such exit.
        """
        self.check_exit(exit)
        if exit == self.num_exits:
            return _mean_logits(run_unread(self.backbone, x))
        call = self._hooks.run(self.backbone, x, stop_at=exit)
        return self.head_of(exit).classify(*call.taps[exit])

    def forward_while(self, x: Tensor, visit: Visit) -> Tensor | None:
        """Run the backbone, letting images leave the batch at the exits, and return the logits of the rest.

        Those are the backbone's [B', num_classes]; None if all images left.

        Args:
            x: Images [B, C, H, W].
            visit: Called at each exit with its index and the tensors that its head reads; returns the rows [B'], int64,
                of the images that go on, or None for all of them. The forward ends where it returns no rows.
        """
        call = self._hooks.run(self.backbone, x, visit=visit)
        return None if call.output is None else _mean_logits(call.output)

    def check_exit(self, exit: int) -> None:
        """Raise ValueError unless this is the index of an exit, or `num_exits`, the backbone's own classifier."""
        if not 0 <= exit <= self.num_exits:
            raise ValueError(f"There is no exit {exit}; allowed are 0 to {self.num_exits} (the backbone's own).")

    def head_of(self, exit: int) -> ExitHead:
        """Return the head of an added exit."""
        head = self.heads[exit]
        assert isinstance(head, ExitHead)
        return head

    def copy_backbone(self, replaced: Mapping[int, nn.Module]) -> Backbone:
        """Return a copy of the backbone without the exits' hooks; `replaced` are modules in place of others, by id."""
        # What is in deepcopy's memo counts as copied already, so it is not copied.
        backbone = deepcopy(self.backbone, {**replaced})
        self._hooks.remove(backbone)
        return backbone

    @property
    def points(self) -> tuple[ExitPoint, ...]:
        """The exit points, shallow to deep."""
        return self.taps.points

    @property
    def num_exits(self) -> int:
        """Number K of added exits; the backbone's own classifier has index K."""
        return len(self.taps.points)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of the K exits and of the backbone's own classifier."""
        return (*(point.name for point in self.taps.points), self.taps.classifier.name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier of the backbone and of every exit.

        Args:
            num_classes: Number of logits, at least 1. Where it changes, names of the old classes are dropped.
            global_pool: The backbone's pooling; unchanged by default. Where it changes the width of the teacher's
                feature, new exits are built.

        Raises:
            ValueError: If `num_classes` is not positive.
        """
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; for a backbone without a classifier, "
                "call reset_classifier on model.backbone."
            )
        parameter = next(self.backbone.parameters())
        pool = {} if global_pool is None else {"global_pool": global_pool}
        if num_classes != self.num_classes:
            self._forget_class_names()
        self.backbone.reset_classifier(num_classes, **pool)
        self.backbone.to(device=parameter.device, dtype=parameter.dtype)
        found = find_exit_points(self.backbone, [point.name for point in self.points], self.wrap_config.image_size)
        width_changed = found.feature_dim != self.taps.feature_dim
        self.taps = replace(found, points=self.points)
        self._hooks.read_classifiers(self.backbone, found.classifier.modules)
        self.ensemble = Ensemble.mean(self.num_exits + 1)
        if width_changed:
            self.heads = self._build_heads(num_classes)
            return
        for index in range(self.num_exits):
            self.head_of(index).reset_classifier(num_classes)

    def _build_heads(self, num_classes: int) -> nn.ModuleList:
        config = self.wrap_config
        heads = nn.ModuleList(
            ExitHead(point, self.taps.feature_dim, num_classes, config.head, kwargs, config.hint_adapter)
            for point, kwargs in zip(self.points, config.head_kwargs, strict=True)
        )
        parameter = next(self.backbone.parameters())
        return heads.to(device=parameter.device, dtype=parameter.dtype).train(self.training)

    def _teacher_feature(self, recorded: Mapping[str, Tensor]) -> Tensor:
        """Return the teacher's feature [B, D] from what entered each module of the classifier."""
        axes = self.taps.feature_axes
        parts = [[pool_feature(recorded[name], axes[name]) for name in group] for group in self.taps.classifier.groups]
        features = [torch.cat(part, 1) if len(part) > 1 else part[0] for part in parts]
        return torch.stack(features).mean(0) if len(features) > 1 else features[0]


def _mean_logits(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the backbone's logits; of a pair, as timm's distilled models return it in training, the mean."""
    return (output[0] + output[1]) / 2 if isinstance(output, tuple) else output
