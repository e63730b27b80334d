"""What is trained: the backbone, its exits and the loss."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from timm_selfdistill.recipe.fields import (
    Arguments,
    BelowOne,
    ExitWeights,
    ModelArguments,
    NotNegative,
    Positive,
    Section,
    Text,
    is_integer,
)
from timm_selfdistill.recipe.local_paths import LOCAL_MODEL, expand_home


class ModelSection(Section):
    """The backbone.

    Args:
        name: Name of a timm model.
        num_classes: Number of classes; null takes it from the data.
        pretrained: Start from timm's pretrained weights.
        small_stem: Replace the stem by one 3x3 convolution with stride 1, for ResNet-like nets on small images.
        channels_last: Keep images and weights in the channels-last memory layout.
        kwargs: Further arguments of `timm.create_model`.
    """

    name: Text
    num_classes: Annotated[int, Field(ge=2)] | None = None
    pretrained: bool = False
    small_stem: bool = False
    channels_last: bool = True
    kwargs: ModelArguments = {}

    @field_validator("name")
    @classmethod
    def _expand_name(cls, value: str) -> str:
        if not value.startswith(LOCAL_MODEL):
            return value
        return LOCAL_MODEL + expand_home(value.removeprefix(LOCAL_MODEL))


class ExitsSection(Section):
    """The classifiers hung on the backbone.

    Args:
        points: How many exits; or a list with, for each, an index into `feature_info`, a share of the backbone's cost
            (0..1) or a module path; null for three, or fewer where the backbone has fewer stages.
        head: Name of a registered head, or "auto" to choose by the layout of each tap.
        head_kwargs: Further arguments of the head.
        hint_adapter: Report each exit's feature through a trainable linear layer.
    """

    points: int | tuple[int | float | str, ...] | None = None
    head: Text = "auto"
    head_kwargs: Arguments = {}
    hint_adapter: bool = False

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


class LossSection(Section):
    """The training loss: a preset and what differs from it; null keeps the preset's value.

    Args:
        name: Name of a registered loss.
        preset: Name of published settings.
        temperature: What logits are divided by before a softmax.
        kd_weight: Weight of each exit's divergence from its teacher.
        hint_weight: Weight of each exit's feature distance.
        ce_weight: Weight of each exit's cross-entropy with the target.
        deepest_ce_weight: Weight of the backbone's own cross-entropy with the target.
        t_squared: Multiply the divergence by the squared temperature.
        divergence: Name of a registered divergence.
        teacher: Name of a registered teacher.
        hint_distance: Name of the feature distance.
        label_smoothing: Share of the target spread evenly over all classes.
        divergence_kwargs: Settings of the divergence itself, such as {alpha: 1.0, beta: 8.0} of dkd.
        standardize_logits: Give each sample's logits the mean 0 and the standard deviation 1 before the divergence.
        kd_warmup_epochs: Epochs over which kd_weight rises linearly from 0.
        exit_weights: One factor for all terms of each exit, shallow to deep.
        kwargs: Arguments of a loss without exits, or of one registered by another package.
    """

    name: Text = "self-distillation"
    preset: Text | None = "byot-iccv2019"
    temperature: Positive | None = None
    kd_weight: NotNegative | None = None
    hint_weight: NotNegative | None = None
    ce_weight: NotNegative | None = None
    deepest_ce_weight: NotNegative | None = None
    t_squared: bool | None = None
    divergence: Text | None = None
    teacher: Text | None = None
    hint_distance: Text | None = None
    label_smoothing: BelowOne | None = None
    divergence_kwargs: Arguments | None = None
    standardize_logits: bool | None = None
    kd_warmup_epochs: NotNegative | None = None
    exit_weights: ExitWeights | None = None
    kwargs: Arguments = {}

    @field_validator("kwargs")
    @classmethod
    def _check_kwargs(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("name") == cls.model_fields["name"].default:
            raise ValueError("must be empty for this library's own loss, whose settings are the other keys of `loss`")
        return value


def _is_point(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value < 1
    return (is_integer(value) and value >= 0) or (isinstance(value, str) and value != "")
