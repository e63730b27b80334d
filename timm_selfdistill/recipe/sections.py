"""The sections of a recipe, with every default of a run; they validate themselves and are immutable.

Names of heads, losses, optimizers and the like are looked up by the parts that own them, so that reading a recipe needs
neither torch nor timm.
"""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from timm_selfdistill.recipe.plain_yaml import dump

REPO_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be two numbers above 0, the smaller one first")
    return pair


def _arguments(*reserved: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a check of arguments passed on to others: finite numbers, and none of those given by keys of their own."""

    def check(arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(arguments.keys() & set(reserved)):
            raise ValueError(f"must not set {', '.join(taken)}, which this library passes itself")
        if not _all_finite(arguments):
            raise ValueError("must hold finite numbers only")
        return arguments

    return check


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_all_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value < 1
    return (_is_integer(value) and value >= 0) or (isinstance(value, str) and value != "")


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
ExitWeights = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
Epochs = Annotated[tuple[Count, ...], Field(strict=False)]
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments())]
ModelArguments = Annotated[dict[str, Any], AfterValidator(_arguments("model_name", "pretrained", "num_classes"))]
OptimizerArguments = Annotated[
    dict[str, Any],
    AfterValidator(
        _arguments("model_or_params", "opt", "lr", "weight_decay", "momentum", "layer_decay", "filter_bias_and_bn")
    ),
]


class _Section(BaseModel):
    # Defaults are validated too because the checks that compare fields must see them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ModelSection(_Section):
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


class ExitsSection(_Section):
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
        if value is None or (_is_integer(value) and value >= 1):
            return value
        if isinstance(value, list | tuple) and value and all(map(_is_point, value)):
            return tuple(value)
        raise ValueError(
            "must be null, a number of exits (1 or more), or a list of feature_info indices (0 or more), shares of the "
            "cost (between 0 and 1) and module names"
        )


class LossSection(_Section):
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


class DataSection(_Section):
    """Where images and labels come from, and how images become tensors.

    Args:
        path: Dataset on the Hugging Face Hub, folder of images, parquet or arrow files, or "digits" (embedded).
        name: Configuration of a Hub dataset.
        image: Column of the images.
        target: Column of the class labels.
        train_split: Split to train on.
        eval_split: Split to report on; nothing is ever chosen by it.
        validation: Share of the training images held out (0..1, stratified; 0 for none), or the name of a split.
        eval_fraction: Share of the training images (0..1, stratified) held out as the split to report on, for
            datasets without one.
        on_error: Stop at an image that cannot be decoded (raise), or go on without it and list it (skip).
        workers: Loader processes per training process; with `cache`, to decode.
        image_size: Height and width in pixels; null takes the model's own.
        mean: Mean per channel on the scale 0..1; null takes the model's own.
        std: Standard deviation per channel on the scale 0..1; null takes the model's own.
        interpolation: How images are resized; null takes the model's own.
        crop_pct: Share of the resized image's side kept by the evaluation crop; null takes the model's own.
        streaming: Read the dataset while training instead of storing it first.
        shuffle_buffer: Images that a streamed dataset is shuffled within.
        train_size: Number of training images of a streamed dataset that does not know its length.
        cache: Decode all images once, keep them on the device that trains, and augment whole batches there (device);
            null to decode and augment image by image, in the loader processes.
        max_train: Train on so many images only, for trials.
        max_eval: Report on so many images only, for trials.
    """

    path: Text
    name: Text | None = None
    image: Text = "image"
    target: Text = "label"
    train_split: Text = "train"
    eval_split: Text = "test"
    validation: float | str = 0.1
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    workers: Annotated[int, Field(ge=0)] = 4
    image_size: Count | None = None
    mean: Channels | None = None
    std: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    crop_pct: Positive | None = None
    streaming: bool = False
    shuffle_buffer: Count = 10000
    train_size: Count | None = None
    cache: Literal["device"] | None = None
    max_train: Count | None = None
    max_eval: Count | None = None

    @field_validator("eval_split")
    @classmethod
    def _check_eval_split(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("train_split"):
            raise ValueError("must not be the split that is trained on")
        return value

    @field_validator("validation", mode="before")
    @classmethod
    def _check_validation(cls, value: Any, info: ValidationInfo) -> Any:
        if (_is_integer(value) or isinstance(value, float)) and 0 <= value < 1:
            return float(value)
        if not isinstance(value, str) or not value:
            raise ValueError("must be a share of the training images (at least 0, less than 1) or the name of a split")
        if value in (info.data.get("train_split"), info.data.get("eval_split")):
            raise ValueError("must not be the split that is trained on or reported on")
        return value

    @field_validator("eval_fraction")
    @classmethod
    def _check_eval_fraction(cls, value: float | None, info: ValidationInfo) -> float | None:
        validation = info.data.get("validation")
        if value is not None and isinstance(validation, float) and value + validation >= 1:
            raise ValueError(f"must leave images to train on: with data.validation {validation} less than 1 together")
        return value

    @field_validator("streaming")
    @classmethod
    def _check_streaming(cls, value: bool, info: ValidationInfo) -> bool:
        validation = info.data.get("validation")
        if value and ((isinstance(validation, float) and validation) or info.data.get("eval_fraction")):
            raise ValueError(
                "must be false where a share of the training images is held out: a stream cannot be split; name splits "
                "in data.validation (or set it to 0) and data.eval_split, and leave out data.eval_fraction"
            )
        return value

    @field_validator("train_size")
    @classmethod
    def _check_train_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("streaming") is False:
            raise ValueError("must be null unless data.streaming is true: other datasets know their length")
        return value

    @field_validator("cache")
    @classmethod
    def _check_cache(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("streaming"):
            raise ValueError("must be null where data.streaming is true: a stream is not held in memory")
        return value


class AugmentSection(_Section):
    """Training augmentation, by the names of `timm.data.create_transform` and `timm.data.Mixup`.

    Args:
        train_crop_mode: Random resized crop (rrc), resize keeping the ratio and centre (rkrc) or random (rkrr) crop, or
            random crop after padding (pad).
        crop_padding: Pixels added on each side by the crop mode pad.
        crop_fill: Their grey value (0..255).
        scale: Smallest and largest share of the image's area that is kept; null takes timm's range.
        ratio: Smallest and largest aspect ratio of the crop; null takes timm's range.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of random brightness, contrast and saturation; null for none.
        color_jitter_prob: Probability of it; null for always.
        grayscale_prob: Probability of dropping the colours.
        gaussian_blur_prob: Probability of a blur.
        auto_augment: timm's policy string, for example "rand-m9-mstd0.5-inc1"; or "cifar10", "imagenet" or "svhn" for
            torchvision's AutoAugment with the policy found on that data set.
        cutout: Side in pixels of a black square around a random point; null for none.
        re_prob: Probability of erasing random rectangles.
        re_mode: What they are filled with: zeros, one colour or noise.
        re_count: Largest number of them.
        mixup_alpha: Parameter of Mixup's beta distribution; 0 for no Mixup.
        cutmix_alpha: Parameter of CutMix's beta distribution; 0 for no CutMix.
        cutmix_minmax: Smallest and largest share of the side that CutMix pastes, instead of the beta distribution.
        mixup_prob: Probability that a batch is mixed.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_mode: Draw the mixture per batch, pair or element.
    """

    train_crop_mode: Literal["rrc", "rkrc", "rkrr", "pad"] = "rrc"
    crop_padding: Count = 4
    crop_fill: Annotated[int, Field(ge=0, le=255)] = 0
    scale: Range | None = None
    ratio: Range | None = None
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    color_jitter: Positive | None = None
    color_jitter_prob: Probability | None = None
    grayscale_prob: Probability = 0.0
    gaussian_blur_prob: Probability = 0.0
    auto_augment: Text | None = None
    cutout: Count | None = None
    re_prob: Probability = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "const"
    re_count: Count = 1
    mixup_alpha: NotNegative = 0.0
    cutmix_alpha: NotNegative = 0.0
    cutmix_minmax: Range | None = None
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, so that targets are soft."""
        return self.mixup_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0 or self.cutmix_minmax is not None)


class OptimizerSection(_Section):
    """The optimizer, as `timm.optim.create_optimizer_v2` makes it.

    Args:
        name: timm's name of the optimizer ("sgd" is SGD with Nesterov momentum, "momentum" the classical one).
        lr: Peak learning rate for the global batch.
        weight_decay: Weight decay.
        momentum: Momentum, for optimizers that have one.
        layer_decay: Factor of the learning rate from one layer to the one below it; null for none.
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
    weight_decay_on_bias_and_norm: bool = False
    clip_grad: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    accumulate: Count = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    kwargs: OptimizerArguments = {}


class ScheduleSection(_Section):
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

    @field_validator("decay_milestones")
    @classmethod
    def _check_milestones(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be epochs in rising order")
        if not value and info.data.get("name") == "multistep":
            raise ValueError("must have at least one epoch for the schedule multistep")
        return value

    @field_validator("backbone_epochs")
    @classmethod
    def _check_backbone_epochs(cls, value: int | None, info: ValidationInfo) -> int | None:
        regime = info.data.get("regime")
        if regime == "mixed" and value is None:
            raise ValueError("must be a whole number of epochs for the regime mixed")
        if regime in ("joint", "frozen") and value is not None:
            raise ValueError(f"must be null for the regime {regime}; only mixed has epochs of the backbone alone")
        return value


class EmaSection(_Section):
    """An exponential moving average of the weights, which is then what is evaluated and saved.

    Args:
        decay: Share of the average kept at each step.
        warmup: Start with a small decay and raise it over the first steps.
    """

    decay: BelowOne = 0.9999
    warmup: bool = False


class CheckpointSection(_Section):
    """When checkpoints are written, besides at the end of every epoch, and how many are kept.

    Args:
        every_steps: Also write one after every so many optimizer steps; null for epochs only.
        keep: How many of the newest are kept.
    """

    every_steps: Count | None = None
    keep: Count = 2


class PushSection(_Section):
    """Where the trained model is pushed on the Hugging Face Hub.

    Args:
        repo: The repository, as "namespace/name"; made before training if it does not exist.
        private: Make it a private one.
        license: Licence of the weights, by its identifier on the Hub; null for that of the pretrained weights, if any.
        every: Also push after every so many epochs, in the background; null for the end only.
    """

    repo: Text
    private: bool = False
    license: Text | None = None
    every: Count | None = None

    @field_validator("repo")
    @classmethod
    def _check_repo(cls, value: str) -> str:
        if not REPO_ID.fullmatch(value):
            raise ValueError("must be the name of a repository, namespace/name")
        return value

    @field_validator("license")
    @classmethod
    def _check_license(cls, value: str | None) -> str | None:
        if value is not None and not LICENSE.fullmatch(value):
            raise ValueError("must be a licence's identifier on the Hub, such as apache-2.0, mit, cc-by-4.0 or other")
        return value


class Recipe(_Section):
    """Everything a training run depends on.

    Args:
        model: The backbone.
        exits: The classifiers hung on it.
        loss: The training loss.
        data: Where images and labels come from.
        augment: Training augmentation.
        optimizer: The optimizer.
        schedule: How learning rate and trained parts change.
        epochs: Passes over the training images.
        batch_size: Images per optimizer step, over all processes and micro batches.
        precision: Autocast type; "no" computes in float32.
        compile: Run the model through `torch.compile`.
        sync_batchnorm: Normalise by the statistics of all processes' images; on several GPUs only.
        ema: Average the weights; null for no average.
        baseline: Also train the plain backbone on the same budget and report it beside.
        seed: Seed of weights, order and augmentation.
        output_dir: Folder of the run; `load_recipe` replaces null by runs/<recipe name>.
        resume: Continue from the newest checkpoint if there is one (auto), start afresh (never), or the path of a
            checkpoint.
        checkpoint: When checkpoints are written, and how many are kept.
        trackers: Names of Accelerate trackers to log to besides metrics.jsonl.
        push_to_hub: Push the run's model to the Hugging Face Hub; null for no push.
    """

    model: ModelSection
    exits: ExitsSection = ExitsSection()
    loss: LossSection = LossSection()
    data: DataSection
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    epochs: Count = 200
    batch_size: Count = 128
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    sync_batchnorm: bool = False
    ema: EmaSection | None = None
    baseline: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: Text | None = None
    resume: Text = "auto"
    checkpoint: CheckpointSection = CheckpointSection()
    trackers: Names = ()
    push_to_hub: PushSection | None = None

    def to_yaml(self) -> str:
        """Return the whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
        return dump(self.model_dump(mode="json"))

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: ScheduleSection, info: ValidationInfo) -> ScheduleSection:
        data = info.data.get("data")
        if value.select == "best" and data is not None and not data.validation:
            # The section is already built, so the message brings the rest of the path.
            raise PydanticCustomError(
                "conflict",
                "select: must be 'last' where data.validation is 0, as 'best' is chosen on validation images",
            )
        return value

    @field_validator("epochs")
    @classmethod
    def _check_epochs(cls, value: int, info: ValidationInfo) -> int:
        schedule = info.data.get("schedule")
        if schedule is not None and schedule.backbone_epochs is not None and schedule.backbone_epochs >= value:
            raise ValueError(f"must be greater than schedule.backbone_epochs ({schedule.backbone_epochs})")
        return value

    @field_validator("batch_size")
    @classmethod
    def _check_batch_size(cls, value: int, info: ValidationInfo) -> int:
        optimizer, augment = info.data.get("optimizer"), info.data.get("augment")
        if optimizer is None:
            return value
        if value % optimizer.accumulate:
            raise ValueError(f"must be a multiple of optimizer.accumulate ({optimizer.accumulate})")
        if augment is not None and augment.mixes and value // optimizer.accumulate % 2:
            raise ValueError("must give micro batches of an even size, because Mixup and CutMix mix images in pairs")
        return value
