"""The images: where they come from, and how they are augmented."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from timm_selfdistill.checks import (
    Channels,
    Count,
    ImageSide,
    LocalPath,
    Names,
    NotNegative,
    Positive,
    Probability,
    Range,
    Section,
    Text,
    is_integer,
)
from timm_selfdistill.cores import MAX_WORKERS


class DataSection(Section):
    """Where images and labels come from, and how images become tensors.

    Args:
        path: Dataset on the Hugging Face Hub, folder of images, parquet or arrow files, a table of paths, WebDataset
            shards, or "digits" (embedded).
        name: Configuration of a Hub dataset.
        image: Column of the images; where no column has the default's name, the only one that holds images.
        target: Column of the class labels; where no column has the default's name, the only one that may hold labels.
        root: Folder that the paths in a table are relative to; null takes the table's own.
        split_column: Column of a table that names the split of each row; "split" need not be there, null for none.
        classes: Names of the classes, or their number; null takes them from the data, which a stream of plain integers
            or strings cannot tell.
        train_split: Split to train on.
        eval_split: Split to report on; nothing is ever chosen by it.
        validation: Share of the training images held out (0..1, stratified; 0 for none), or the name of a split. The
            key may be written `val`.
        eval_fraction: Share of the training images (0..1, stratified) held out as the split to report on, for
            datasets without one.
        allow_empty_classes: Train although some classes have no training image.
        check_duplicates: In image folders, refuse images that are in two splits with the same bytes.
        on_error: Stop at an image that cannot be decoded (raise), or go on without it and list it (skip).
        sampling: Order of the training images: each once in an epoch (shuffled), or as many of every class, so that
            those of small classes come several times and not all of large ones (balanced).
        workers: Loader processes per training process, as far as there are cores; with `cache`, to decode.
            null: as many as the threads that compute leave cores for, up to 4; of a stream always 4, as its order
            depends on them.
        image_size: Height and width in pixels, at most 4096; null takes the model's own.
        mean: Mean per channel on the scale 0..1; null takes the model's own.
        std: Standard deviation per channel on the scale 0..1; null takes the model's own.
        interpolation: How images are resized; null takes the model's own.
        crop_pct: Share of the resized image's side kept by the evaluation crop; null takes the model's own.
        streaming: Read the dataset while training instead of storing it first.
        shuffle_buffer: Images that a streamed dataset is shuffled within.
        train_size: Number of training images of a streamed dataset that does not know its length.
        cache: Decode all images once, keep them on the device that trains, and augment whole batches there (device);
            null to decode and augment image by image, in the loader processes.
        max_train: Largest number of training images, for trials; null for all.
        max_eval: Largest number of images to report on, for trials; null for all.
    """

    path: LocalPath
    name: Text | None = None
    image: Text = "image"
    target: Text = "label"
    root: LocalPath | None = None
    split_column: Text | None = "split"
    classes: int | Names | None = None
    train_split: Text = "train"
    eval_split: Text = "test"
    validation: float | str = 0.1
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    allow_empty_classes: bool = False
    check_duplicates: bool = True
    on_error: Literal["raise", "skip"] = "raise"
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    workers: Annotated[int, Field(ge=0)] | None = None
    image_size: ImageSide | None = None
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

    @property
    def stream_workers(self) -> int:
        """Loader processes of a stream, on any machine."""
        return MAX_WORKERS if self.workers is None else self.workers

    @field_validator("classes", mode="before")
    @classmethod
    def _check_classes(cls, value: Any) -> Any:
        if value is None or (is_integer(value) and value > 1):
            return value
        names = value if isinstance(value, list | tuple) else ()
        if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
            raise ValueError("must be the number of the classes, at least 2, or the list of their names, each a text")
        if len(set(names)) < len(names):
            raise ValueError("must not name a class twice")
        return value

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, if the recipe gives them; their indices, if it gives their number."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes

    @model_validator(mode="before")
    @classmethod
    def _read_short_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "val" not in value:
            return value
        if "validation" in value:
            raise ValueError("must not have both val and validation, which are one")
        return {"validation" if key == "val" else key: item for key, item in value.items()}

    @field_validator("validation", mode="before")
    @classmethod
    def _check_validation(cls, value: Any) -> Any:
        if (is_integer(value) or isinstance(value, float)) and 0 <= value < 1:
            return float(value)
        if not isinstance(value, str) or not value:
            raise ValueError("must be a share of the training images (at least 0, less than 1) or the name of a split")
        return value

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        validation, streaming = before.get("validation"), before.get("streaming")
        share = validation if isinstance(validation, float) else 0.0
        match name:
            case "eval_split" if value == before.get("train_split"):
                return "must not be the split that is trained on"
            case "validation" if value in (before.get("train_split"), before.get("eval_split")):
                return "must not be the split that is trained on or reported on"
            case "eval_fraction" if value is not None and value + share >= 1:
                return f"must leave images to train on: with data.validation {share} less than 1 together"
            case "streaming" if value and (share or before.get("eval_fraction")):
                return (
                    "must be false where a share of the training images is held out: a stream cannot be split; name "
                    "splits in data.validation (or set it to 0) and data.eval_split, and leave out data.eval_fraction"
                )
            case "streaming" if value and before.get("sampling") == "balanced":
                return "must be false where data.sampling is balanced, which needs images by their index"
            case "train_size" if value is not None and streaming is False:
                return "must be null unless data.streaming is true: other datasets know their length"
            case "cache" if value is not None and streaming:
                return "must be null where data.streaming is true: a stream is not held in memory"
        return None


class AugmentSection(Section):
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
