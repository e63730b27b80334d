"""The sections of a recipe about the network, its training, and what is saved and pushed."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from timm_selfdistill.checks import (
    Arguments,
    BelowOne,
    Count,
    Epochs,
    LocalPath,
    ModelArguments,
    NotNegative,
    OptimizerArguments,
    Positive,
    Section,
    Share,
    Text,
    expand_home,
    is_integer,
)

LOCAL_MODEL: Final = "local-dir:"  # timm's prefix of a model folder
REPO_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SECRET: Final = re.compile(r"api_?key|token|secret|password", re.IGNORECASE)


class ModelSection(Section):
    """The backbone.

    Args:
        name: Name of a timm model.
        num_classes: Number of classes; null takes it from the data.
        pretrained: Start from timm's pretrained weights.
        weights: Start from weights of your own: a file (.safetensors, or a checkpoint of torch), or the folder of a run
            or of a saved model, of which exits that fit are taken too.
        small_stem: Replace the stem by one 3x3 convolution with stride 1, for ResNet-like nets on small images.
        grad_checkpointing: Compute the backbone's forward again in backward: less memory, about a third more time.
        channels_last: Keep images and weights in the channels-last memory layout.
        kwargs: Further arguments of `timm.create_model`.
    """

    name: Text
    num_classes: Annotated[int, Field(ge=2)] | None = None
    pretrained: bool = False
    weights: LocalPath | None = None
    small_stem: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = True
    kwargs: ModelArguments = {}

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        if name == "weights" and value is not None and before.get("pretrained"):
            return "must be null where model.pretrained is true"
        return None

    @field_validator("name")
    @classmethod
    def _expand_name(cls, value: str) -> str:
        if not value.startswith(LOCAL_MODEL):
            return value
        return LOCAL_MODEL + expand_home(value.removeprefix(LOCAL_MODEL))


# The heads whose widths a budget chooses.
_BUDGETED: Final = ("auto", "proportional")


class ExitsSection(Section):
    """The classifiers hung on the backbone.

    Args:
        points: How many exits; or a list with, for each, an index into `feature_info`, a share of the backbone's cost
            (0..1) or a module path; null for three, or fewer where the backbone has fewer stages.
        head: Name of a registered head; "published" for the published one that suits each tap; or "auto" for the head
            `proportional`, as wide as the budget allows.
        head_kwargs: Further arguments of the head.
        head_budget: Share of the backbone's multiply-accumulates that each of the default heads may cost; all of them
            together may have 2.5 times this share of its parameters. Null for 0.1, and for any other head.
        hint_adapter: Report each exit's feature through a trainable linear layer.
    """

    points: int | tuple[int | float | str, ...] | None = None
    head: Text = "auto"
    head_kwargs: Arguments = {}
    head_budget: Share | None = None
    hint_adapter: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_before_budgets(cls, value: Any) -> Any:
        # Whole recipes of runs from before there were budgets, when "auto" stood for the published heads.
        whole = isinstance(value, Mapping) and {"head_kwargs", "hint_adapter"} <= value.keys()
        if whole and value.get("head") == "auto" and "head_budget" not in value:
            return {**value, "head": "published"}
        return value

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        if name != "head_budget" or value is None or "head" not in before:
            return None
        if before["head"] not in _BUDGETED or before.get("head_kwargs"):
            return f"must be null unless exits.head is {' or '.join(_BUDGETED)} and exits.head_kwargs is empty"
        return None

    @field_validator("points", mode="before")
    @classmethod
    def _check_points(cls, value: Any) -> Any:
        if value is None or (is_integer(value) and value >= 1):
            return value
        if isinstance(value, list | tuple) and value and all(map(_is_point, value)):
            return tuple(value)
        raise ValueError(
            "must be null, a number of exits (1 or more), or a list of feature_info indices (0 or more), shares of the "
            "cost (between 0 and 1) and module names"
        )


class OptimizerSection(Section):
    """The optimizer, as `timm.optim.create_optimizer_v2` makes it.

    Args:
        name: timm's name of the optimizer ("sgd" is SGD with Nesterov momentum, "momentum" the classical one).
        lr: Peak learning rate for the global batch.
        weight_decay: Weight decay.
        momentum: Momentum, for optimizers that have one.
        layer_decay: Factor of the learning rate from one layer to the one below it; null for none.
        heads_lr_scale: Factor of the learning rate of the heads, those of the exits and the backbone's own classifier;
            null takes 5 where a backbone that begins with trained weights learns together with them, else 1.
        weight_decay_on_bias_and_norm: Decay biases and normalisation weights too.
        clip_grad: Largest gradient norm, value or ratio, as clip_mode says; null for no clipping.
        clip_mode: Clip the global norm, each value, or each unit's norm relative to its weights (agc).
        accumulate: Micro batches per optimizer step.
        on_nonfinite: What to do where the loss is NaN or infinite: stop the run, or skip the step.
        kwargs: Further arguments of the optimizer.
    """

    name: Text = "sgd"
    lr: Positive = 0.1
    weight_decay: NotNegative = 5e-4
    momentum: BelowOne = 0.9
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    heads_lr_scale: Positive | None = None
    weight_decay_on_bias_and_norm: bool = False
    clip_grad: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    accumulate: Count = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    kwargs: OptimizerArguments = {}


class ScheduleSection(Section):
    """How learning rate and trained parts change over the epochs.

    Args:
        name: timm's name of the learning-rate schedule ("none" keeps the rate constant without warm-up).
        decay_milestones: Epochs after which the rate is multiplied by decay_rate (multistep).
        decay_epochs: Epochs between decays (step), or length of the decay in epochs (wsd, rsqrt); null takes timm's.
        decay_rate: Factor of a decay (step, multistep), or the power of poly.
        min_lr: Learning rate that decaying schedules end at.
        warmup_epochs: Epochs of linear warm-up, the first of `epochs`.
        warmup_lr: Learning rate that the warm-up starts from.
        cooldown_epochs: Epochs at min_lr, added after `epochs`.
        regime: Train backbone and exits together (joint), the exits alone (frozen), or the backbone and then both
            (mixed).
        backbone_epochs: Epochs of the backbone alone, the first of `epochs`; for the mixed regime only.
        select: Keep the weights of the last epoch, or those best by the backbone's top-1 on the validation images.
    """

    name: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"] = "cosine"
    decay_milestones: Epochs = ()
    decay_epochs: Positive | None = None
    decay_rate: Positive = 0.1
    min_lr: NotNegative = 0.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    warmup_lr: NotNegative = 1e-5
    cooldown_epochs: Annotated[int, Field(ge=0)] = 0
    regime: Literal["joint", "frozen", "mixed"] = "joint"
    backbone_epochs: Count | None = None
    select: Literal["last", "best"] = "last"

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        regime = before.get("regime")
        match name:
            case "decay_milestones" if list(value) != sorted(set(value)):
                return "must be epochs in rising order"
            case "decay_milestones" if not value and before.get("name") == "multistep":
                return "must have at least one epoch for the schedule multistep"
            case "backbone_epochs" if regime == "mixed" and value is None:
                return "must be a whole number of epochs for the regime mixed"
            case "backbone_epochs" if regime in ("joint", "frozen") and value is not None:
                return f"must be null for the regime {regime}; only mixed has epochs of the backbone alone"
        return None


class EmaSection(Section):
    """An exponential moving average of the weights, which is then what is evaluated and saved.

    Args:
        decay: Share of the average kept at each step.
        warmup: Start with a small decay and raise it over the first steps.
    """

    decay: BelowOne = 0.9999
    warmup: bool = False


class CheckpointSection(Section):
    """When checkpoints are written, apart from the end of every epoch, and how many are kept.

    Args:
        every_steps: Optimizer steps between further checkpoints; null for none.
        keep: How many of the newest are kept.
    """

    every_steps: Count | None = None
    keep: Count = 2


class TrackingSection(Section):
    """What the trackers are told at the start of a run.

    Args:
        project: The project, or experiment, that the run belongs to; null for the name of the run's folder.
        run: The run's name; null for the name of its folder.
        options: Further arguments of the trackers' own start, by the name of the tracker.
    """

    project: Text | None = None
    run: Text | None = None
    options: Mapping[str, Arguments] = {}

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        if name == "options" and (secrets := [key for each in value.values() for key in each if _SECRET.search(key)]):
            return f"must not hold {', '.join(secrets)}: recipes are shared; log in, or set the tracker's variables"
        return None


class PushSection(Section):
    """Where the trained model is pushed on the Hugging Face Hub.

    Args:
        repo: The repository, as "namespace/name"; made before training if it does not exist.
        private: Make it a private one.
        license: Licence of the weights, by its identifier on the Hub; null for that of the pretrained weights, if any.
        every: Epochs between further pushes in the background; null for the end only.
    """

    repo: Text
    private: bool = False
    license: Text | None = None
    every: Count | None = None

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        match name:
            case "repo" if not REPO_ID.fullmatch(value):
                return "must be the name of a repository, namespace/name"
            case "license" if value is not None and not LICENSE.fullmatch(value):
                return "must be a licence's identifier on the Hub, such as apache-2.0, mit, cc-by-4.0 or other"
        return None


def _is_point(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value < 1
    return (is_integer(value) and value >= 0) or (isinstance(value, str) and value != "")
