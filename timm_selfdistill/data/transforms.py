"""What happens to an image between its pixels and the batch: channels, timm's transforms, Cutout, Mixup."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.model_config import resolve_input_data_config
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, RandomCrop

from timm_selfdistill.checks import Count, Number, Positive, check
from timm_selfdistill.recipe import AugmentSection, DataSection

Transform = Callable[[Image.Image], Tensor]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The image mode that has as many channels as the model takes."""

_TORCHVISION_POLICIES = ("imagenet", "cifar10", "svhn")
# Of the recipe's `augment`, by the names of timm's `create_transform`.
_TIMM_SETTINGS = (
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "auto_augment"),
    *("color_jitter", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "re_prob", "re_mode", "re_count"),
)


@dataclass(frozen=True)
class InputConfig:
    """The images a model expects.

    Args:
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        image_size: Height and width in pixels.
        mean: Per channel, subtracted from values in 0..1.
        std: Per channel, what is left is divided by it.
        interpolation: timm's name: bilinear, bicubic, nearest, ...
        crop_pct: Share of the resized image that the evaluation's centre crop keeps.
        crop_mode: How the evaluation crops: center, squash or border.

    Raises:
        ValueError: If there is no image mode with that many channels, mean or std do not fit them, or images cannot be
            prepared with another value, as in a configuration that was damaged or made to do harm.
    """

    channels: int
    image_size: Annotated[tuple[Count, Count], Field(description="a height and a width in pixels")]
    mean: Annotated[tuple[Number, ...], Field(description="finite numbers")]
    std: Annotated[tuple[Positive, ...], Field(description="finite numbers above 0")]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random"]
    # timm's models crop between 0.8 and 1; images resized to far more than is kept of them would fill the memory.
    crop_pct: Annotated[
        float, Field(ge=0.1, le=2.0, description="from 0.1 to 2.0, as images are resized to image_size divided by it")
    ]
    crop_mode: Literal["center", "squash", "border"] = "center"

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise ValueError(f"The model takes {self.channels} channels; images can have {', '.join(map(str, MODES))}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"data.{name} has {len(values)} values for {self.channels} channels: {values}.")
        for field in fields(self)[1:]:
            check(field.name, getattr(self, field.name), field.type)

    @classmethod
    def from_model(cls, backbone: nn.Module, section: DataSection | None = None) -> Self:
        """Take what the recipe's `data` says and, where it says nothing, a timm model's own values.

        The model's own `crop_pct` is often 0.875 or 0.95: evaluation then resizes an image to more than `image_size`
        and cuts its border. For small images that are stored at `image_size` say `crop_pct: 1.0`.
        """
        section = section or DataSection(path="none")
        channels = _input_channels(backbone)
        # Not `pretrained_cfg`'s size where the model was built for another one. With statistics given, timm does not
        # warn about those of another channel count.
        own_size = resolve_input_data_config(backbone, {"mean": 0.5, "std": 0.5})["input_size"][1:]
        size = own_size if section.image_size is None else (section.image_size, section.image_size)
        given = {"input_size": (channels, *size), "interpolation": section.interpolation, "crop_pct": section.crop_pct}
        config = resolve_data_config(given, model=backbone)
        mean = _per_channel(section.mean, config["mean"], channels)
        std = _per_channel(section.std, config["std"], channels)
        return cls.from_timm({**config, "mean": mean, "std": std})

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Self:
        """Return what `to_timm` gave; a mapping with other keys beside these, as a manifest is, will do."""
        channels, height, width = config["input_size"]
        others = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        return cls(channels, (height, width), tuple(config["mean"]), tuple(config["std"]), **others)

    def to_timm(self) -> dict[str, Any]:
        """Return the same as timm's data configuration."""
        config = asdict(self)
        return {"input_size": (config.pop("channels"), *config.pop("image_size")), **config}


def train_transform(augment: AugmentSection, config: InputConfig) -> Transform:
    """Build the random transform for training: PIL image -> float tensor [C, H, W].

    Raises:
        ValueError: If a setting would be ignored, or the augmentation does not know 4 channels.
    """
    pad = augment.train_crop_mode == "pad"
    if pad and (augment.scale is not None or augment.ratio is not None):
        raise ValueError(
            f"augment.scale {augment.scale} and augment.ratio {augment.ratio} mean nothing to train_crop_mode 'pad'; "
            "leave both out."
        )
    if augment.crop_fill and not pad:
        raise ValueError(
            f"augment.crop_fill {augment.crop_fill} means nothing to train_crop_mode {augment.train_crop_mode!r}: only "
            "'pad' adds pixels."
        )
    if config.channels == 4 and (augment.auto_augment or augment.grayscale_prob):
        raise ValueError(
            f"augment.auto_augment {augment.auto_augment!r} and augment.grayscale_prob {augment.grayscale_prob} need 1 "
            "or 3 channels; the model takes 4."
        )
    height, width = config.image_size
    settings = {name: getattr(augment, name) for name in _TIMM_SETTINGS}
    if pad:
        # After it timm's random resized crop has to take the whole image.
        settings |= {"train_crop_mode": "rrc", "scale": (1.0, 1.0), "ratio": (width / height, width / height)}
    policy = augment.auto_augment if augment.auto_augment in _TORCHVISION_POLICIES else None
    if policy is not None:
        settings["auto_augment"] = None
    elif augment.auto_augment is not None:
        _check_policy(augment.auto_augment)
    # Of the geometry, of the colours, and to a tensor.
    steps = list(create_transform(**config.to_timm(), is_training=True, separate=True, **settings))
    if pad:
        cover = ResizeKeepRatio(config.image_size, longest=0.0, interpolation=config.interpolation)
        crop = RandomCrop(config.image_size, padding=augment.crop_padding, fill=augment.crop_fill)
        steps = [cover, crop, *steps]
    if policy is not None:
        # Where timm applies its own policies; grey is what the published code fills with.
        steps.insert(-2, AutoAugment(AutoAugmentPolicy(policy), fill=128))
    if augment.cutout is not None:
        steps.append(Cutout(augment.cutout, [-mean / std for mean, std in zip(config.mean, config.std, strict=True)]))
    transform: Transform = Compose(steps)
    return transform


class Cutout:
    """Fill a square around a random pixel with one colour; what lies outside the image is cut off.

    Paper: "Improved Regularization of Convolutional Neural Networks with Cutout", https://arxiv.org/abs/1708.04552;
    code: https://github.com/uoguelph-mlrg/Cutout, where odd sides come out one pixel shorter.

    Args:
        side: Height and width of the square in pixels.
        fill: The colour, one value a channel.
    """

    def __init__(self, side: int, fill: Sequence[float]) -> None:
        self.side = side
        self.fill = torch.tensor(fill)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """Return an image [C, H, W] with the square in it."""
        height, width = image.shape[1:]
        top, left = (int(torch.randint(size, ())) - self.side // 2 for size in (height, width))
        image = image.clone()
        image[:, max(0, top) : top + self.side, max(0, left) : left + self.side] = self.fill
        return image


def eval_transform(config: InputConfig) -> Transform:
    """Build the fixed transform for evaluation: PIL image -> float tensor [C, H, W]."""
    transform: Transform = create_transform(**config.to_timm())
    return transform


def build_mixup(augment: AugmentSection, num_classes: int, label_smoothing: float) -> Mixup | None:
    """Build what mixes a batch and makes its targets soft, with label smoothing, or None if the recipe has no mixing.

    Returns:
        A callable (images [B, C, H, W], targets [B]) -> (images, soft targets [B, num_classes]) for even B; it changes
        the images in place.
    """
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup_alpha,
        cutmix_alpha=augment.cutmix_alpha,
        cutmix_minmax=augment.cutmix_minmax,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def _input_channels(backbone: nn.Module) -> int:
    """Read the channels off the first convolution: `pretrained_cfg` does not know of `in_chans`."""
    convolution = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    # Stems that first move pixels into channels (tresnet, csatv2) have wider ones, linear stems have none.
    if convolution is not None and convolution.in_channels < 16:
        return convolution.in_channels
    pretrained_cfg: Any = backbone.pretrained_cfg
    return int(pretrained_cfg["input_size"][0])


def _check_policy(policy: str) -> None:
    """Refuse a policy that timm does not know, or a setting of one."""
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except Exception as error:  # timm checks by assertions, conversions and look-ups
        raise ValueError(
            f"augment.auto_augment: {policy!r} is not a policy of timm's ({str(error) or repr(error)}); allowed are "
            "its rand-m9-mstd0.5-inc1, augmix-m3-w3, original, originalr, v0, v0r and 3a with their settings, and "
            f"{', '.join(_TORCHVISION_POLICIES)}."
        ) from error


def _per_channel(given: tuple[float, ...] | None, own: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel; the model's own are averaged when it was made for other channels."""
    if given is not None:
        return given * channels if len(given) == 1 else given
    return tuple(own) if len(own) == channels else (sum(own) / len(own),) * channels
