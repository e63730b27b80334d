"""Images that are kept decoded on a device: the same batches as without, but for what is drawn to augment them."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList, merge_skipped
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.recipe import AugmentSection, DataSection, load_recipe
from timm_selfdistill.train import evaluate_folder, train

STILL = AugmentSection(train_crop_mode="pad", crop_padding=1, hflip=0.0)
GREY = InputConfig(1, (8, 8), (0.3,), (0.7,), "bilinear", 1.0)
COLOUR = InputConfig(3, (8, 8), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "bicubic", 0.875)
TRAIN, TEST = 20, 7


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def noise(row: int, height: int = 10, width: int = 10) -> bytes:
    return encoded(np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8))


def shade(row: int) -> bytes:
    """An image that its colour identifies."""
    return encoded(np.full((8, 8), 10 * row + 5, np.uint8))


def write(folder: Path, train: list[bytes], test: list[bytes]) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    folder.mkdir()
    for name, contents in (("train", train), ("test", test)):
        images = [{"bytes": data, "path": None} for data in contents]
        labels = [index % 2 for index in range(len(images))]
        split = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pets", [noise(row) for row in range(TRAIN)], [noise(row) for row in range(50, 50 + TEST)])


def load(path: Path, cache: str | None = "device", **changes: Any) -> Loaders:
    arguments: dict[str, Any] = {"batch_size": 4, "accelerator_shards": (0, 1), "seed": 0}
    fields: dict[str, Any] = {"workers": 0, "validation": 0.2}
    for name, value in changes.items():
        (fields if name in DataSection.model_fields else arguments)[name] = value
    section = DataSection(path=str(path), cache=cache, **fields)
    augment, input = arguments.pop("augment", STILL), arguments.pop("input", COLOUR)
    return build_loaders(open_dataset(section, 0), section, augment, input, **arguments)


def batches(loader: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), targets.clone()) for images, targets in loader]


@pytest.mark.parametrize(
    "input",
    [GREY, COLOUR, InputConfig(3, (8, 6), (0.1, 0.2, 0.3), (0.3, 0.6, 0.7), "lanczos", 0.9, "border")],
    ids=["grey", "colour", "border, not square"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_is_the_same_bit_for_bit(folder: Path, input: InputConfig, workers: int) -> None:
    plain, cached = (load(folder, cache, input=input, workers=workers) for cache in (None, "device"))
    for name, size in (("eval", TEST), ("validation", 4)):
        expected, found = batches(getattr(plain, name)), batches(getattr(cached, name))
        assert sum(len(targets) for _, targets in found) == size
        for (images, targets), (other_images, other_targets) in zip(expected, found, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(targets, other_targets)


def test_any_size_of_one_aspect_ratio_is_covered_as_without_a_cache(tmp_path: Path) -> None:
    sizes = [(10, 10), (8, 8), (31, 31), (10, 10)] * 5
    path = write(tmp_path / "pets", [noise(row, *size) for row, size in enumerate(sizes)], [noise(99, 9, 14)])
    # Without anything random, but that a border of one pixel comes and goes.
    plain, cached = (load(path, cache, validation=0.0) for cache in (None, "device"))
    for (images, targets), (others, other_targets) in zip(plain.train, cached.train, strict=True):
        assert torch.equal(targets, other_targets)
        for image, other in zip(images, others, strict=True):
            assert any(torch.equal(image[:, 2:-2, 2:-2], part) for part in windows(other))


def windows(image: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every part of an image of 4 x 4 pixels."""
    return (image[:, y : y + 4, x : x + 4] for y in range(5) for x in range(5))


@pytest.mark.parametrize("arrangement", ["plain", "paired", "repeated"])
def test_training_draws_the_same_samples(folder: Path, arrangement: Any) -> None:
    plain, cached = (load(folder, cache) for cache in (None, "device"))
    for loaders in (plain, cached):
        assert loaders.order is not None
        loaders.order.arrange(arrangement)
        loaders.order.begin(3, first=4)
    expected, found = batches(plain.train), batches(cached.train)
    assert len(expected) == 3
    assert [targets.tolist() for _, targets in expected] == [targets.tolist() for _, targets in found]
    assert [images.shape for images, _ in expected] == [images.shape for images, _ in found]


def test_a_batch_depends_on_seed_epoch_and_place_alone(folder: Path) -> None:
    augment = AugmentSection(auto_augment="rand-m9-mstd0.5", re_prob=0.5, re_mode="pixel", color_jitter=0.3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loaders = load(folder, augment=augment)
    assert loaders.order is not None
    loaders.order.begin(1)
    whole = batches(loaders.train)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])

    again = load(folder, augment=augment, workers=1)
    assert again.order is not None
    again.order.begin(1, first=8)
    for (images, targets), (others, other_targets) in zip(whole[2:], again.train, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)
    again.order.begin(2)
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(whole, again.train, strict=True))


def test_processes_share_the_batches(folder: Path) -> None:
    whole = batches(load(folder).train)
    for process in range(2):
        loaders = load(folder, accelerator_shards=(process, 2))
        prepared = prepare_data_loader(loaders.train, num_processes=2, process_index=process, put_on_device=False)
        for (images, targets), (others, other_targets) in zip(whole[process::2], prepared, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(targets, other_targets)


def test_broken_images_are_skipped_as_without_a_cache(tmp_path: Path) -> None:
    train = [shade(row) for row in range(TRAIN)]
    for row in (0, 1, 7, 19):
        train[row] = b"" if row % 2 else b"text"
    path = write(tmp_path / "pets", train, [b"", shade(3), b"text", shade(4), shade(5)])
    found = {}
    for cache, workers in ((None, 0), ("device", 0), ("device", 1)):
        output = tmp_path / f"{cache} {workers}"
        fields = {"on_error": "skip", "validation": 0.0, "workers": workers, "skipped": SkipList(output)}
        loaders = load(path, cache, input=GREY, batch_size=10, **fields)
        content = [
            [(float(image.max()), int(target)) for image, target in zip(images, targets, strict=True)]
            for loader in (loaders.train, loaders.eval)
            for images, targets in loader
        ]
        assert merge_skipped(output) == {"training": 4, "evaluation": 2}
        found[cache, workers] = content, sorted((output / "skipped.jsonl").read_text().splitlines())
    # Among them the substitutes of training batches, and the blank images that no metric counts.
    assert found["device", 0] == found["device", 1] == found[None, 0]
    assert [target for _, target in found["device", 0][0][-1]] == [IGNORED, 1, IGNORED, 1, 0]


def test_a_broken_image_is_an_error_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "pets", [shade(0), shade(1), shade(2), b"", shade(4)], [shade(5)])
    with pytest.raises(ValueError, match=r"^Split 'train', row 3: the image cannot be decoded: it is empty"):
        load(path, input=GREY, validation=0.0)


def test_without_a_good_image_there_is_nothing_to_keep_or_to_substitute(tmp_path: Path) -> None:
    fields = {"input": GREY, "validation": 0.0, "on_error": "skip", "batch_size": 1}
    path = write(tmp_path / "none", [b"", b"text"], [shade(5)])
    with pytest.raises(ValueError, match=r"^Split 'train': none of its 2 images can be decoded"):
        load(path, **fields)
    path = write(tmp_path / "some", [b"", shade(1)], [shade(5)])
    with pytest.raises(ValueError, match=r"^Split 'train', row 0: none of the 1 images of a training batch can be"):
        list(load(path, **fields).train)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_sizes_are_refused(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "pets", [noise(0), b"", noise(2), noise(3, 12, 9), noise(4)], [noise(9)])
    fields = {"validation": 0.0, "on_error": "skip", "workers": workers}
    with pytest.raises(ValueError, match="images of rows 0 and 3 have 10 x 10 and 12 x 9 pixels") as raised:
        load(path, augment=AugmentSection(), **fields)
    assert "store them at one size" in str(raised.value)
    with pytest.raises(ValueError, match="images of rows 0 and 3 have 8 x 8 and 11 x 8 pixels"):
        load(path, **fields)


def test_what_does_not_fit_into_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 16 * 3 * 8 * 8 + 4 * 3 * 8 * 8 + 7 * 3 * 8 * 8
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    load(folder)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(
        ValueError, match=r"needs 0\.00 GiB in every process for the decoded images \(training 16 x 3 x"
    ):
        load(folder)


def test_what_a_cache_cannot_do_is_refused(folder: Path) -> None:
    four = InputConfig(4, (8, 8), (0.5,) * 4, (0.5,) * 4, "bilinear", 1.0)
    with pytest.raises(ValueError, match=r"data\.cache=device knows images of 1 or 3 channels, and the model takes 4"):
        load(folder, input=four)
    message = "auto_augment 'augmix-m5-w4-d2' is unknown to data.cache=device.*; allowed are .* set data.cache: null"
    with pytest.raises(ValueError, match=message):
        load(folder, augment=AugmentSection(auto_augment="augmix-m5-w4-d2"))
    with pytest.raises(ValueError, match="computes in float64, which an mps device cannot"):
        load(folder, device="mps")
    with pytest.raises(ValueError, match=r"data\.cache: must be null where data\.streaming is true"):
        load_recipe("digits", ["data.cache=device", "data.streaming=true", "data.validation=0"])


def test_a_run_mixes_its_batches_and_is_evaluated_again_without_a_cache(tmp_path: Path) -> None:
    overrides = [
        *("data.cache=device", "data.max_train=64", "data.max_eval=20", "data.image_size=16", "batch_size=16"),
        *("epochs=1", "precision='no'", "baseline=false", "exits.head=linear", "augment.mixup_alpha=0.5"),
    ]
    report = train(load_recipe("digits", [*overrides, f"output_dir={tmp_path / 'run'}"]))
    again = evaluate_folder(tmp_path / "run")
    assert report["num_samples"] == again["num_samples"] == 20
    # In other batches.
    assert [row["ece"] for row in report["exits"]] == pytest.approx([row["ece"] for row in again["exits"]], rel=1e-5)
    with pytest.raises(ValueError, match=r"holds a run of another recipe: data\.cache \(device, now None\)"):
        train(load_recipe("digits", [*overrides, f"output_dir={tmp_path / 'run'}", "data.cache=null"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "policy", [{}, {"auto_augment": "rand-m9-mstd0.5", "color_jitter": 0.3, "grayscale_prob": 0.2}]
)
def test_a_gpu_gives_the_batches_of_a_cpu(folder: Path, policy: dict[str, Any]) -> None:
    """Bit for bit, but for policies and colours, whose interpolated values a GPU rounds in another way."""
    augment = AugmentSection(re_prob=0.5, vflip=0.3, cutout=3, **policy)
    here, there = (load(folder, augment=augment, device=device) for device in ("cpu", "cuda"))
    for name in ("train", "validation", "eval"):
        for (images, targets), (others, other_targets) in zip(getattr(here, name), getattr(there, name), strict=True):
            assert others.is_cuda
            if policy and name == "train":
                # Two of 255 levels; what equalize and solarize make of one level is more.
                assert ((images - others.cpu()).abs() > 2 / 255 / 0.25).float().mean() < 0.02
            else:
                assert torch.equal(images, others.cpu())
            assert torch.equal(targets, other_targets.cpu())
