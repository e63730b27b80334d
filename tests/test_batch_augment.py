"""Augmentation of whole batches: operations give what Pillow gives, and draws are distributed as for one image."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_policies
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, crop_or_pad
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, autoaugment
from torchvision.transforms import functional as pil

from timm_selfdistill.data import batch_augment
from timm_selfdistill.data.batch_augment import (
    COLOURS,
    GROUP,
    MOVES,
    flatten,
    in_groups,
    policy_of_tensors,
    split_transform,
)
from timm_selfdistill.data.batch_crops import FILTERS, Side, draw_boxes, draw_sizes, pad_crop, resize, resize_and_crop
from timm_selfdistill.data.batches import seeded_generators
from timm_selfdistill.data.transforms import Cutout, InputConfig, train_transform
from timm_selfdistill.recipe import AugmentSection

CPU = torch.device("cpu")
GREY = InputConfig(1, (16, 16), (0.5,), (0.25,), "bilinear", 1.0)
COLOUR = InputConfig(3, (16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "bicubic", 1.0)


def pictures(channels: int, height: int, width: int, count: int = 24) -> Tensor:
    """Noise, ramps, one colour, and images of few levels [count, channels, height, width]."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8))
    images[:4] = (torch.arange(height * width).reshape(height, width) % 200).byte()
    images[4] = 77
    images[5:8] = images[5:8] // 16 + 50
    return images


def photos(channels: int, height: int, width: int, count: int = 24) -> Tensor:
    """Images whose levels change slowly from pixel to pixel, as in a photo [count, channels, height, width]."""
    coarse = torch.rand((count, channels, 4, 4), generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return (smooth * 180 + 40).clamp(0, 255).byte()


def share_off(a: Tensor, b: Tensor, levels: int) -> float:
    """Which share of values is more than some of 255 levels apart."""
    return float(((a.int() - b.int()).abs() > levels).float().mean())


def picture(image: Tensor) -> Image.Image:
    return pil.to_pil_image(image)


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.stack([pil.pil_to_tensor(image) for image in images])


# Operations, given their parameters.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLOURS)
def test_operations_on_colours_are_pillows_to_a_level(name: str, channels: int) -> None:
    images, rng = pictures(channels, 13, 17), np.random.default_rng(1)
    drawn: dict[str, list[Any]] = {
        "posterize": rng.integers(-4, 9, len(images)).tolist(),
        "solarize": [256, *rng.integers(0, 257, len(images) - 1).tolist()],
        "solarize_add": rng.integers(0, 129, len(images)).tolist(),
        "desaturate": rng.uniform(-0.1, 1.1, len(images)).tolist(),
    }
    values = drawn.get(name, rng.uniform(0, 2, len(images)).tolist())
    takes_none = name in ("auto_contrast", "equalize", "invert")
    arguments: list[tuple[Any, ...]] = [() if takes_none else (value,) for value in values]
    operation = getattr(timm_policies, name)
    expected = [operation(picture(image), *given) for image, given in zip(images, arguments, strict=True)]
    found = torch.cat([COLOURS[name](images[i : i + 1], *given) for i, given in enumerate(arguments)])
    exact = name in ("equalize", "invert", "posterize", "solarize", "solarize_add")
    assert share_off(found, pixels(expected), 0 if exact else 1) == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_pillows_but_at_borders(name: str, interpolation: str, channels: int) -> None:
    height, width = 26, 34
    images, rng, fill = photos(channels, height, width), np.random.default_rng(1), (10, 200, 30)[:channels]
    settings = {"resample": Image.Resampling[interpolation.upper()], "fillcolor": fill}
    values = rng.uniform(-0.4, 0.4, len(images)) * {"rotate": 90, "translate_x_abs": 20, "translate_y_abs": 20}.get(
        name, 1
    )
    expected = [
        getattr(timm_policies, name)(picture(image), value, **settings)
        for image, value in zip(images, values.tolist(), strict=True)
    ]
    mode = InterpolationMode(interpolation)
    found = [
        MOVES[name](images[i : i + 1], value, interpolation=mode, fill=list(fill))
        for i, value in enumerate(values.tolist())
    ]
    assert share_off(torch.cat(found), pixels(expected), 2) < 0.08


@pytest.mark.parametrize("interpolation", ["nearest", *FILTERS])
@pytest.mark.parametrize("size", [(16, 16), (7, 40), (19, 23)])
def test_resized_boxes_are_pillows_bit_for_bit(interpolation: str, size: tuple[int, int]) -> None:
    images, rng = pictures(3, 19, 23), np.random.default_rng(1)
    sides, boxes = [], []
    for length, target in zip((19, 23), size, strict=True):
        extent = rng.integers(1, length + 1, len(images))
        start = rng.integers(length - extent + 1)
        boxes.append((start, extent))
        wanted = np.tile(np.arange(target), (len(images), 1))
        sides.append(Side(start, extent, np.full(len(images), target), wanted))
    (tops, heights), (lefts, widths) = boxes
    expected = [
        pil.resized_crop(picture(image), *box, size, InterpolationMode(interpolation))
        for image, *box in zip(images, *(array.tolist() for array in (tops, lefts, heights, widths)), strict=True)
    ]
    assert torch.equal(resize(images, sides[0], sides[1], interpolation), pixels(expected))


def test_windows_are_cut_and_filled() -> None:
    images, rng = pictures(3, 13, 17), np.random.default_rng(1)
    top, left = (rng.integers(side + 16 - wanted + 1, size=len(images)) for side, wanted in ((13, 11), (17, 12)))
    expected = [
        pil.crop(pil.pad(picture(image), [8], fill=128), y, x, 11, 12)
        for image, y, x in zip(images, top.tolist(), left.tolist(), strict=True)
    ]
    assert torch.equal(pad_crop((11, 12), 8, 128, images, np.random.default_rng(1)), pixels(expected))


def step_of(transform: Any) -> Any:
    """The only step that a transform becomes for batches."""
    (step,) = split_transform(transform, CPU)[1].steps
    return step


def test_blur_is_torchvisions_with_one_width_for_a_group() -> None:
    images, library = pictures(3, 16, 19), transforms.GaussianBlur(23)
    with seeded_generators(np.random.default_rng(5).integers(2**32, size=4).tolist()):
        widths = [library.get_params(*library.sigma) for _ in range(0, len(images), GROUP)]
    expected = [pil.gaussian_blur(picture(image), [23, 23], [widths[i // GROUP]] * 2) for i, image in enumerate(images)]
    assert len(set(widths)) == 3
    assert share_off(step_of(library)(images, np.random.default_rng(5)), pixels(expected), 1) == 0


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_every_entry_of_torchvisions_policies_is_carried_out(policy: AutoAugmentPolicy) -> None:
    library = AutoAugment(policy, fill=128)
    ours = step_of(library).args[0]
    images = photos(3, 32, 40, 3)
    space = library._augmentation_space(10, (32, 40))
    for operation, _, index in (entry for pair in library.policies for entry in pair):
        magnitudes, signed = space[operation]
        magnitude = 0.0 if index is None else float(magnitudes[index])
        for sign in (-1 if signed else 1, 1):
            settings = (library.interpolation, library.fill)
            expected = [autoaugment._apply_op(picture(one), operation, sign * magnitude, *settings) for one in images]
            level = sign * magnitude / (255 if operation == "Solarize" else 1)
            found = ours._apply_image_or_video_transform(images, operation, level, ours.interpolation, ours._fill)
            assert share_off(found, pixels(expected), 2) < 0.08, (operation, magnitude)


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-m9-mstd0.5-inc1", "rand-m7-n3-p1", "rand-m15-mmax20-mstd101", "rand-m9-tweights-n2"),
        *("v0", "v0r-mstd1", "original", "originalr"),
    ],
)
@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey, bilinear", "colour, bicubic"])
def test_timms_policies_draw_for_a_group_what_timm_draws_for_an_image(
    policy: str, config: InputConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_augment, "GROUP", 2)
    images = photos(config.channels, 32, 32, 60).repeat_interleave(2, dim=0)
    whole = train_transform(AugmentSection(auto_augment=policy, hflip=0.0), config)
    library = next(part for part in flatten(whole) if hasattr(part, "ops") or hasattr(part, "policy"))
    with seeded_generators(np.random.default_rng(5).integers(2**32, size=4).tolist()):
        expected = pixels([library(picture(image)) for image in images[::2]])
    found = in_groups(policy_of_tensors(library), images, np.random.default_rng(5))
    assert torch.equal(found[::2], found[1::2])
    assert share_off(found[::2], expected, 4) < 0.1
    # Of the others, equalize makes the most of what a move did to the border.
    off = (found[::2].int() - expected.int()).abs().float().mean((1, 2, 3))
    assert off.quantile(0.8) < 4


# What is drawn.


def test_pad_crops_are_uniform() -> None:
    places = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(8100, -1, -1, -1)
    crops = pad_crop((6, 6), 4, 255, places, np.random.default_rng(0))
    # Where the image's pixel in the middle has come to, or its neighbour's, tells the offset.
    offsets = {tuple(one.flatten().tolist()) for one in crops}
    assert len(offsets) == 81
    counts = np.unique(crops.flatten(1).numpy(), axis=0, return_counts=True)[1]
    assert ((counts - 100) ** 2 / 100).sum() < 130  # chi-square with 80 degrees of freedom: 1 in 3000


@pytest.mark.parametrize(
    ("scale", "ratio", "size"),
    [((0.08, 1.0), (3 / 4, 4 / 3), (24, 32)), ((0.9, 1.0), (0.5, 0.6), (20, 30)), ((1.0, 1.0), (1.0, 1.0), (9, 9))],
)
def test_boxes_are_distributed_as_timms(scale: Any, ratio: Any, size: tuple[int, int]) -> None:
    count, image = 4000, Image.new("L", size[::-1])
    with seeded_generators([0]):
        library = np.array(
            [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)], dtype=float
        )
    part = RandomResizedCropAndInterpolation((8, 8), scale, ratio)
    places, extents = draw_boxes(part, count, size, np.random.default_rng(0))
    ours = np.stack([*places, *extents], axis=1).astype(float)
    assert (ours[:, 2:].max(0) <= size).all()
    assert ((ours[:, :2] + ours[:, 2:]).max(0) <= size).all()
    assert largest_deviation(moments(ours[:, :2]), moments(library[:, :2])) < 4
    assert largest_deviation(moments(ours[:, 2:]), moments(library[:, 2:])) < 4


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_torchvisions_policies_are_drawn_as_often_as_they_say(
    policy: AutoAugmentPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, count = AutoAugment(policy, fill=128), 10000
    step, drawn = step_of(library), Counter[tuple[str, float]]()

    def note(image: Tensor, operation: str, magnitude: float, **settings: Any) -> Tensor:
        drawn[operation, round(magnitude, 4)] += 1
        return image

    monkeypatch.setattr(step.args[0], "_apply_image_or_video_transform", note)
    step(torch.zeros((count * GROUP, 1, 16, 16), dtype=torch.uint8), np.random.default_rng(0))
    space = library._augmentation_space(10, (16, 16))
    expected = Counter[tuple[str, float]]()
    for operation, probability, index in (entry for pair in library.policies for entry in pair):
        magnitudes, signed = space[operation]
        magnitude = 0.0 if index is None else float(magnitudes[index])
        if operation == "Solarize":
            magnitude /= 255  # of uint8 tensors, a share
        for sign in (-1 if signed else 1, 1):
            expected[operation, round(sign * magnitude, 4)] += probability / 50 * count
    for key, number in expected.items():
        # Twice the variance of one draw: both places of an entry may draw the same.
        assert abs(drawn[key] - number) <= 4.5 * (2 * number) ** 0.5, key
    assert set(drawn) <= set(expected)


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_images_are_resized_and_cropped_as_by_timm(mode: Any) -> None:
    """Sizes are distributed as timm's; with a size and a place given, the pixels are the same."""
    augment = AugmentSection(train_crop_mode=mode, scale=(0.4, 1.9), ratio=(0.6, 1.7), hflip=0.0)
    parts = list(flatten(train_transform(augment, COLOUR)))
    resizing, cropping, lengths, count = parts[0], parts[1], (20, 24), 4000
    sizes = np.stack(draw_sizes(resizing, count, lengths, np.random.default_rng(0)), axis=1)
    with seeded_generators([0]):
        settings = (resizing.size, 0.0, 0.5, resizing.random_scale_range, True, 0.5, resizing.random_aspect_range)
        library = np.array([resizing.get_params(Image.new("L", lengths[::-1]), *settings) for _ in range(count)])
    assert largest_deviation(moments(sizes), moments(library)) < 4
    assert set(map(tuple, sizes.tolist())) >= {(16, 19), (18, 17)}

    images, rng = pictures(3, *lengths, 200), np.random.default_rng(1)
    sizes = np.stack(draw_sizes(resizing, 200, lengths, rng), axis=1)
    if mode == "rkrr":
        starts = np.stack([np.sign(excess) * rng.integers(abs(excess) + 1) for excess in (sizes - 16).T], axis=1)
    expected = []
    for index, image in enumerate(images):
        resized = pil.resize(picture(image), sizes[index].tolist(), resizing.interpolation)
        if mode == "rkrr":
            expected.append(crop_or_pad(resized, *starts[index].tolist(), 16, 16, padding_mode="reflect"))
        else:
            expected.append(cropping(resized))
    assert torch.equal(resize_and_crop(resizing, cropping, images, np.random.default_rng(1)), pixels(expected))


def test_rectangles_are_erased_as_by_timm() -> None:
    count = 4000
    erasing = RandomErasing(0.6, mode="const", max_count=3, device="cpu")
    with seeded_generators([0]):
        library = torch.stack([erasing(torch.ones(1, 12, 16)) for _ in range(count)])
    ours = step_of(erasing)(torch.ones(count, 1, 12, 16), np.random.default_rng(0))
    lost = [(1 - images.flatten(1)).numpy() for images in (ours, library)]
    area = [moments(np.stack([one.sum(1), one.max(1)], axis=1)) for one in lost]
    assert largest_deviation(*lost) < 5
    assert largest_deviation(*area) < 4


def test_cutout_hides_each_pixel_as_often_as_it_should() -> None:
    count, side = 20000, 5
    hidden = 1 - step_of(Cutout(side, [0.0]))(torch.ones(count, 1, 8, 12), np.random.default_rng(0)).mean((0, 1))
    rows, columns = (
        torch.tensor([sum(0 <= y - (c - side // 2) < side for c in range(n)) / n for y in range(n)]) for n in (8, 12)
    )
    expected = rows[:, None] * columns
    assert ((hidden - expected).abs() / (expected * (1 - expected) / count).sqrt()).max() < 4.5


def test_jitter_draws_every_order_and_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    library, drawn = transforms.ColorJitter(0.4, 0.4, 0.4), []
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation"):
        monkeypatch.setattr(pil, name, lambda image, factor, name=name: drawn.append((name, factor)) or image)
    step_of(library)(torch.zeros((6000 * GROUP, 1, 1, 1), dtype=torch.uint8), np.random.default_rng(0))
    names = [name for name, _ in drawn]
    orders = Counter(zip(names[::3], names[1::3], names[2::3], strict=True))
    assert len(orders) == 6
    assert sum((number - 1000) ** 2 / 1000 for number in orders.values()) < 20  # chi-square with 5 degrees of freedom
    factors = np.array([factor for _, factor in drawn])
    assert 0.6 <= factors.min() < 0.601
    assert 1.399 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.01


AUGMENTATIONS = {
    "pad, flips": {"train_crop_mode": "pad", "crop_padding": 3, "vflip": 0.25},
    "pad, fill, AutoAugment, Cutout": {
        **{"train_crop_mode": "pad", "crop_padding": 4, "crop_fill": 128},
        **{"auto_augment": "cifar10", "cutout": 6},
    },
    "boxes, RandAugment, one colour": {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        **{"re_prob": 0.5, "re_mode": "rand", "re_count": 3},
    },
    "boxes, jitter, noise": {"color_jitter": 0.4, "re_prob": 0.7, "re_mode": "pixel", "scale": (0.3, 0.9)},
    "boxes, sometimes jitter, grey, blur, zeros": {
        **{"color_jitter": 0.5, "color_jitter_prob": 0.6, "grayscale_prob": 0.3, "gaussian_blur_prob": 0.5},
        "re_prob": 0.4,
    },
    "resized, random crop": {"train_crop_mode": "rkrr", "scale": (0.5, 1.4), "ratio": (0.7, 1.4)},
    "resized, centre crop": {"train_crop_mode": "rkrc", "auto_augment": "svhn"},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_batches_are_distributed_as_single_images(
    augment: dict[str, Any], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_augment, "GROUP", 2)
    config = COLOUR if channels == 3 else GREY
    count = 1000
    whole = train_transform(AugmentSection(**augment), config)
    image = picture(pictures(config.channels, 20, 24, 24)[9].float().mul(0.3).add(torch.linspace(0, 170, 24)).byte())
    with seeded_generators([0]):
        one_by_one = torch.stack([whole(image) for _ in range(count)])
    fixed, batched = split_transform(whole, CPU)
    together = batched(fixed(image).expand(2 * count, -1, -1, -1), [0])[::2]  # one of each group
    assert together.shape == one_by_one.shape
    assert together.dtype == one_by_one.dtype
    assert largest_deviation(summaries(together), summaries(one_by_one)) < 5


def summaries(images: Tensor) -> np.ndarray:
    """Every pixel, its square, and its products with the pixels beside it and with the image's mean [B, N]."""
    near = images * images.roll(1, 3)
    level = images * images.mean((1, 2, 3), keepdim=True)
    return torch.cat([part.flatten(1) for part in (images, images.square(), near, level)], dim=1).double().numpy()


def moments(numbers: np.ndarray) -> np.ndarray:
    """Two columns, their squares and their product [B, 5]."""
    a, b = numbers.T.astype(float)
    return np.stack([a, b, a * a, b * b, a * b], axis=1)


def largest_deviation(a: np.ndarray, b: np.ndarray) -> float:
    """How many standard errors the means of columns [N, K] are apart, at most."""
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    difference = np.abs(a.mean(0) - b.mean(0))
    return float(np.max(difference / np.maximum(error, 1e-9)))


def test_every_image_draws_its_crop_and_every_group_its_policy_and_a_seed_decides() -> None:
    augment = AugmentSection(auto_augment="rand-m9-mstd0.5", re_prob=0.5, re_mode="pixel", color_jitter=0.3)
    fixed, batched = split_transform(train_transform(augment, COLOUR), CPU)
    images = fixed(picture(pictures(3, 20, 24)[9])).expand(16, -1, -1, -1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again, other = (batched(images, seed) for seed in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 16
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize(
    "augment", [{"auto_augment": "rand-m9-p1-mstd0.5"}, {"color_jitter": 0.3}, {"auto_augment": "svhn"}]
)
def test_a_group_shares_what_a_policy_draws(augment: dict[str, Any]) -> None:
    whole = train_transform(AugmentSection(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, **augment), COLOUR)
    images = pictures(3, 16, 16)[9].expand(5 * GROUP + 3, -1, -1, -1)
    groups = torch.split(split_transform(whole, CPU)[1](images, [1]), GROUP)
    assert len(groups) == 6
    assert all(torch.equal(group, group[:1].expand_as(group)) for group in groups)
    assert len(torch.stack([group[0] for group in groups]).flatten(1).unique(dim=0)) > 3


# What is refused.


@pytest.mark.parametrize(
    ("augment", "interpolation", "message"),
    [
        (
            {"auto_augment": "augmix-m5-w4-d2"},
            "bilinear",
            "auto_augment 'augmix-m5-w4-d2' .* because of AugMixAugment;",
        ),
        ({"auto_augment": "3a"}, "bilinear", "auto_augment '3a' is unknown to .* because of GaussianBlurRand;"),
        ({"auto_augment": "rand-m9-t3a"}, "bilinear", "auto_augment 'rand-m9-t3a' is .* because of GaussianBlur;"),
        (
            {"auto_augment": "rand-m9"},
            "lanczos",
            "data.interpolation 'lanczos' is none that augment.auto_augment moves",
        ),
        ({}, "random", "data.interpolation 'random' is unknown to data.cache=device"),
    ],
)
def test_what_batches_do_not_know_is_refused(augment: dict[str, Any], interpolation: str, message: str) -> None:
    config = InputConfig(3, (16, 16), (0.5,) * 3, (0.2,) * 3, interpolation, 1.0)
    with pytest.raises(ValueError, match=message) as raised:
        split_transform(train_transform(AugmentSection(**augment), config), CPU, augment.get("auto_augment"))
    assert "set data.cache: null" in str(raised.value)


def test_a_transform_without_counterpart_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.cache=device does not know the transform RandomInvert.* set data\.cache"
    ):
        split_transform(transforms.RandomInvert(), CPU)
