"""Augmentation of whole batches: each operation equals Pillow's, and what is drawn is distributed as for one image."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_policies
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, crop_or_pad
from timm_selfdistill.data.batch_policy import Layer, Policy, colour_jitter, timm_policy, torchvision_policy
from timm_selfdistill.data.colours import OPERATIONS
from timm_selfdistill.data.cutout import Cutout
from timm_selfdistill.data.geometry import FILTERS, INTERPOLATIONS, Span, blur, crop, resize, rotation, transform
from timm_selfdistill.data.order import generators_of_training, seed_generators
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, autoaugment
from torchvision.transforms import functional as pil

from timm_selfdistill.data import InputConfig, batch_augment, batch_policy, train_transform
from timm_selfdistill.data.batch_augment import split_transform
from timm_selfdistill.data.batch_crops import PadCrop, ResizeAndCrop, ResizedCrop
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


def picture(image: Tensor) -> Image.Image:
    return pil.to_pil_image(image)


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.stack([pil.pil_to_tensor(image) for image in images])


# Operations, given their parameters.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_colours_are_pillows_bit_for_bit(name: str, channels: int) -> None:
    images, rng = pictures(channels, 13, 17), np.random.default_rng(1)
    drawn: dict[str, list[Any]] = {
        "posterize": rng.integers(0, 9, len(images)).tolist(),
        "solarize": rng.uniform(0, 256, len(images)).tolist(),
        "solarize_add": rng.integers(0, 110, len(images)).tolist(),
    }
    values = drawn.get(name, rng.uniform(0, 2, len(images)).tolist())
    takes_none = name in ("auto_contrast", "equalize", "invert")
    operation = getattr(timm_policies, name)
    expected = [
        operation(picture(image), *(() if takes_none else (value,)))
        for image, value in zip(images, values, strict=True)
    ]
    assert torch.equal(OPERATIONS[name](images, torch.tensor(values, dtype=torch.float64)), pixels(expected))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_moves_are_pillows_bit_for_bit(interpolation: str, channels: int) -> None:
    height, width = 13, 17
    images, rng, fill = pictures(channels, height, width), np.random.default_rng(1), (10, 200, 30)[:channels]
    settings = {"resample": Image.Resampling[interpolation.upper()], "fillcolor": fill}
    matrices, expected = [], []
    for index, image in enumerate(images):
        value = rng.uniform(-0.4, 0.4)
        name, argument, matrix = [
            ("shear_x", value, [1, value, 0, 0, 1, 0]),
            ("shear_y", value, [1, 0, 0, value, 1, 0]),
            ("translate_x_rel", value, [1, 0, value * width, 0, 1, 0]),
            ("translate_y_abs", round(9 * value), [1, 0, 0, 0, 1, round(9 * value)]),
            ("rotate", 90 * value, rotation(np.array([90 * value]), height, width)[0]),
        ][index % 5]
        matrices.append(matrix)
        expected.append(getattr(timm_policies, name)(picture(image), argument, **settings))
    moved = transform(images, np.array(matrices, dtype=np.float64), interpolation, torch.tensor(fill).byte())
    assert torch.equal(moved, pixels(expected))


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
        sides.append(Span(start, extent, np.full(len(images), target), wanted))
    (tops, heights), (lefts, widths) = boxes
    expected = [
        pil.resized_crop(picture(image), *box, size, InterpolationMode(interpolation))
        for image, *box in zip(images, *(array.tolist() for array in (tops, lefts, heights, widths)), strict=True)
    ]
    assert torch.equal(resize(images, sides[0], sides[1], interpolation), pixels(expected))


def test_blur_is_torchvisions_but_for_the_order_of_sums() -> None:
    images = pictures(3, 16, 19)
    sigma = np.random.default_rng(1).uniform(0.1, 2.0, len(images))
    expected = [
        pil.gaussian_blur(picture(image), [23, 23], [value, value])
        for image, value in zip(images, sigma.tolist(), strict=True)
    ]
    difference = (blur(images, sigma, 23).int() - pixels(expected).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_windows_are_cut_and_filled() -> None:
    images, rng = pictures(3, 13, 17), np.random.default_rng(1)
    top, left = rng.integers(-6, 8, (2, len(images)))
    expected = [
        pil.crop(pil.pad(picture(image), [8], fill=128), y + 8, x + 8, 11, 12)
        for image, y, x in zip(images, top.tolist(), left.tolist(), strict=True)
    ]
    assert torch.equal(crop(images, top, left, (11, 12), 128), pixels(expected))


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_every_entry_of_torchvisions_policies_is_carried_out(policy: AutoAugmentPolicy) -> None:
    library = AutoAugment(policy, fill=128)
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 16, 20), dtype=np.uint8))
    space = library._augmentation_space(10, (16, 20))
    names, _, values = batch_policy._table(policy, (16, 20))
    expected = []
    for operation, _, index in (entry for pair in library.policies for entry in pair):
        magnitudes, signed = space[operation]
        magnitude = 0.0 if index is None else float(magnitudes[index])
        for sign in (-1 if signed else 1, 1):
            expected.append(
                autoaugment._apply_op(picture(image), operation, sign * magnitude, library.interpolation, library.fill)
            )
    layer = Layer(np.repeat(names.reshape(-1), 2), values.reshape(-1))
    carry_out = Policy(lambda *_: [layer], 128, "nearest", CPU)
    assert torch.equal(carry_out(image.expand(100, -1, -1, -1), np.random.default_rng(0)), pixels(expected))


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-m9-mstd0.5-inc1", "rand-m7-n3-p1", "rand-m15-mmax20-mstd101", "rand-m9-tweights-n2"),
        *("v0", "v0r-mstd1", "original", "originalr"),
    ],
)
@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey, bilinear", "colour, bicubic"])
def test_timms_policies_give_the_bits_that_timm_gives(policy: str, config: InputConfig) -> None:
    images = pictures(config.channels, 16, 16, 60)
    whole = train_transform(AugmentSection(auto_augment=policy, hflip=0.0), config)
    library = next(part for part in batch_augment._flatten(whole) if hasattr(part, "ops") or hasattr(part, "policy"))
    with generators_of_training():
        seed_generators(np.random.default_rng(5).integers(2**32, size=4).tolist())
        expected = [library(picture(image)) for image in images]
    assert torch.equal(timm_policy(library, CPU)(images, np.random.default_rng(5)), pixels(expected))


# What is drawn.


def test_pad_crops_are_uniform() -> None:
    places = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(8100, -1, -1, -1)
    crops = PadCrop((6, 6), 4, 255)(places, np.random.default_rng(0))
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
    with generators_of_training():
        seed_generators([0])
        library = np.array(
            [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)], dtype=float
        )
    places, extents = ResizedCrop((8, 8), scale, ratio, "bilinear").boxes(count, size, np.random.default_rng(0))
    ours = np.stack([*places, *extents], axis=1).astype(float)
    assert (ours[:, 2:].max(0) <= size).all()
    assert ((ours[:, :2] + ours[:, 2:]).max(0) <= size).all()
    assert largest_deviation(moments(ours[:, :2]), moments(library[:, :2])) < 4
    assert largest_deviation(moments(ours[:, 2:]), moments(library[:, 2:])) < 4


@pytest.mark.parametrize("policy", list(AutoAugmentPolicy))
def test_torchvisions_policies_are_drawn_as_often_as_they_say(policy: AutoAugmentPolicy) -> None:
    library, count = AutoAugment(policy, fill=128), 20000
    layers = torchvision_policy(library, CPU).draw(count, (16, 16), np.random.default_rng(0))
    names, _, values = batch_policy._table(policy, (16, 16))
    for place, layer in enumerate(layers):
        drawn = list(zip(layer.names.tolist(), layer.values.tolist(), strict=True))
        expected: dict[tuple[str, float], float] = {}
        for index, pair in enumerate(library.policies):
            for sign in range(2):
                key = (str(names[index, place]), float(values[index, place, sign]))
                expected[key] = expected.get(key, 0.0) + pair[place][1] / 50
        for key, share in expected.items():
            assert abs(drawn.count(key) / count - share) < 4.5 * (share * (1 - share) / count) ** 0.5 + 1e-9, key
        assert {key for key in drawn if key[0]} <= set(expected)


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_images_are_resized_and_cropped_as_by_timm(mode: Any) -> None:
    """Sizes are distributed as timm's; with a size and a place given, the pixels are the same."""
    augment = AugmentSection(train_crop_mode=mode, scale=(0.4, 1.9), ratio=(0.6, 1.7), hflip=0.0)
    parts = list(batch_augment._flatten(train_transform(augment, COLOUR)))
    resizing, cropping, lengths, count = parts[0], parts[1], (20, 24), 4000
    step, rng = ResizeAndCrop(resizing, cropping), np.random.default_rng(0)
    sizes = np.stack(step.sizes(count, lengths, rng), axis=1)
    with generators_of_training():
        seed_generators([0])
        settings = (resizing.size, 0.0, 0.5, resizing.random_scale_range, True, 0.5, resizing.random_aspect_range)
        library = np.array([resizing.get_params(Image.new("L", lengths[::-1]), *settings) for _ in range(count)])
    assert largest_deviation(moments(sizes), moments(library)) < 4
    assert set(map(tuple, sizes.tolist())) >= {(16, 19), (18, 17)}

    images, rng = pictures(3, *lengths, 200), np.random.default_rng(1)
    sizes = np.stack(step.sizes(200, lengths, rng), axis=1)
    if mode == "rkrr":
        starts = np.stack([np.sign(excess) * rng.integers(abs(excess) + 1) for excess in (sizes - 16).T], axis=1)
    expected = []
    for index, image in enumerate(images):
        resized = pil.resize(picture(image), sizes[index].tolist(), resizing.interpolation)
        if mode == "rkrr":
            expected.append(crop_or_pad(resized, *starts[index].tolist(), 16, 16, padding_mode="reflect"))
        else:
            expected.append(cropping(resized))
    assert torch.equal(step(images, np.random.default_rng(1)), pixels(expected))


def test_rectangles_are_erased_as_by_timm() -> None:
    count = 4000
    erasing = RandomErasing(0.6, mode="const", max_count=3, device="cpu")
    with generators_of_training():
        seed_generators([0])
        library = torch.stack([erasing(torch.ones(1, 12, 16)) for _ in range(count)])
    (step,) = split_transform(erasing, CPU)[1].steps
    ours = step(torch.ones(count, 1, 12, 16), np.random.default_rng(0))
    lost = [(1 - images.flatten(1)).numpy() for images in (ours, library)]
    area = [moments(np.stack([one.sum(1), one.max(1)], axis=1)) for one in lost]
    assert largest_deviation(*lost) < 5
    assert largest_deviation(*area) < 4


def test_cutout_hides_each_pixel_as_often_as_it_should() -> None:
    count, side = 20000, 5
    (step,) = split_transform(Cutout(side, [0.0]), CPU)[1].steps
    hidden = 1 - step(torch.ones(count, 1, 8, 12), np.random.default_rng(0)).mean((0, 1))
    rows, columns = (
        torch.tensor([sum(0 <= y - (c - side // 2) < side for c in range(n)) / n for y in range(n)]) for n in (8, 12)
    )
    expected = rows[:, None] * columns
    assert ((hidden - expected).abs() / (expected * (1 - expected) / count).sqrt()).max() < 4.5


def test_jitter_draws_every_order_and_factor() -> None:
    library = transforms.ColorJitter(0.4, 0.4, 0.4)
    layers = colour_jitter(library, CPU).draw(6000, (8, 8), np.random.default_rng(0))
    orders = Counter(zip(*(layer.names.tolist() for layer in layers), strict=True))
    assert len(orders) == 6
    assert sum((number - 1000) ** 2 / 1000 for number in orders.values()) < 20  # chi-square with 5 degrees of freedom
    factors = np.stack([layer.values for layer in layers])
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
def test_batches_are_distributed_as_single_images(augment: dict[str, Any], channels: int) -> None:
    config = COLOUR if channels == 3 else GREY
    count = 1000
    whole = train_transform(AugmentSection(**augment), config)
    image = picture(pictures(config.channels, 20, 24, 24)[9].float().mul(0.3).add(torch.linspace(0, 170, 24)).byte())
    with generators_of_training():
        seed_generators([0])
        one_by_one = torch.stack([whole(image) for _ in range(count)])
    fixed, batched = split_transform(whole, CPU)
    together = batched(fixed(image).expand(count, -1, -1, -1), [0])
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


def test_every_image_draws_for_itself_and_a_seed_decides() -> None:
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


# What is refused.


@pytest.mark.parametrize(
    ("augment", "interpolation", "message"),
    [
        (
            {"auto_augment": "augmix-m5-w4-d2"},
            "bilinear",
            "augment.auto_augment augmix is unknown to data.cache=device",
        ),
        ({"auto_augment": "3a"}, "bilinear", "augment.auto_augment has the operation GaussianBlurRand, unknown to"),
        ({"auto_augment": "rand-m9-t3a"}, "bilinear", "augment.auto_augment has the operation GaussianBlur, unknown"),
        (
            {"auto_augment": "rand-m9"},
            "lanczos",
            "data.interpolation 'lanczos' is none that augment.auto_augment moves",
        ),
    ],
)
def test_what_batches_do_not_know_is_refused(augment: dict[str, Any], interpolation: str, message: str) -> None:
    config = InputConfig(3, (16, 16), (0.5,) * 3, (0.2,) * 3, interpolation, 1.0)
    with pytest.raises(ValueError, match=message):
        split_transform(train_transform(AugmentSection(**augment), config), CPU)


def test_a_transform_without_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.cache=device knows no counterpart of the transform RandomInvert"):
        split_transform(transforms.RandomInvert(), CPU)
