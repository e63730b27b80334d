"""Data sets of every form, split, transformed and loaded."""

import io
import random
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from timm_selfdistill.data import StreamSplit, open_dataset
from timm_selfdistill.data.batches import TrainingOrder
from timm_selfdistill.data.decode import decode, read
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.transforms import InputConfig, build_mixup, eval_transform, train_transform
from timm_selfdistill.recipe import AugmentSection, DataSection, RecipeError, load_recipe

PLAIN = AugmentSection(train_crop_mode="pad", hflip=0.0)
GREY = InputConfig(1, (8, 8), (0.0,), (1.0,), "bilinear", 1.0)
COLOUR = InputConfig(3, (8, 8), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def section(path: Path | str, **fields: Any) -> DataSection:
    return DataSection(path=str(path), **({"workers": 0, "validation": 0.0} | fields))


def load(data_section: DataSection, **changes: Any) -> Loaders:
    arguments: dict[str, Any] = {"batch_size": 4, "accelerator_shards": (0, 1), "seed": 0} | changes
    augment = arguments.pop("augment", PLAIN)
    config = arguments.pop("input", GREY)
    return build_loaders(open_dataset(data_section, 0), data_section, augment, config, **arguments)


def grey(value: int) -> Image.Image:
    """An 8 x 8 image that its mean identifies."""
    return Image.new("L", (8, 8), value)


def values(loader: DataLoader[Any]) -> list[int]:
    """The grey values of a loader's images, in its order; padding is black."""
    return [round(255 * image.max().item()) for images, _ in loader for image in images]


def rows(labels: list[Any], start: int = 0, label: Any = None) -> datasets.Dataset:
    """Image i is grey with the value start + i."""
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog"])}
    images = [grey(start + index) for index in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=datasets.Features(features))


def write_parquet(folder: Path, **splits: datasets.Dataset) -> Path:
    folder.mkdir(exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def write_shards(folder: Path, shards: int, size: int) -> Path:
    """A training split of several files and a test split, all grey values different."""
    folder.mkdir()
    for shard in range(shards):
        split = rows([0, 1] * (size // 2), start=shard * size)
        split.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    rows([0, 1, 0, 1, 1], start=200).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "pets", train=rows([0, 1] * 10), test=rows([1, 0, 1, 0, 1, 1], start=100))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Class folders below train and val, every mode that PNG and JPEG have."""
    rgb = Image.new("RGB", (12, 10), (200, 100, 50))
    palette = rgb.convert("P")
    transparent = rgb.convert("P")
    transparent.info["transparency"] = bytes(range(256))
    kinds = {
        "bit.png": Image.new("1", (12, 10), 1),
        "grey.png": Image.new("L", (12, 10), 90),
        "grey16.png": Image.fromarray(np.full((10, 12), 90 << 8, np.uint16)),
        "grey_alpha.png": Image.new("LA", (12, 10), (90, 5)),
        "palette.png": palette,
        "rgb.png": rgb,
        "rgba.png": Image.new("RGBA", (12, 10), (200, 100, 50, 7)),
        "transparent.png": transparent,
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.jpg": Image.new("L", (12, 10), 90),
        "rgb.jpg": rgb,
    }
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for file, image in kinds.items():
                image.save(folder / file, **({"transparency": bytes(range(256))} if image is transparent else {}))
    return tmp_path / "insects"


def test_digits_are_embedded_and_stratified() -> None:
    data = open_dataset(section("digits", validation=0.1), seed=0)
    assert (len(data.train), len(data.validation), len(data.eval)) == (1293, 144, 360)
    assert data.class_names == tuple("0123456789")
    assert data.name == "digits"
    assert not data.streaming
    for split in (data.train, data.validation, data.eval):
        shares = np.bincount(split.targets) / len(split)
        assert abs(shares - 0.1).max() < 0.01
    images, targets = next(iter(load(section("digits"), batch_size=1437).train))
    assert images.shape == (1437, 1, 8, 8)
    assert images.max() == 1
    assert targets.dtype == torch.int64


def test_digits_are_those_of_scikit_learn() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    expected = Counter(np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in bunch.images)
    data = open_dataset(section("digits"), seed=0)
    stored = [
        decode(read(split[i]["image"]), "L").tobytes() for split in (data.train, data.eval) for i in range(len(split))
    ]
    assert Counter(stored) == expected


def test_parquet_folder_keeps_class_names_labels_and_images(parquet: Path) -> None:
    data_section = section(parquet)
    data = open_dataset(data_section, 0)
    assert data.class_names == ("cat", "dog")
    assert data.name == "pets"
    assert data.validation is None
    loader = load(data_section).eval
    assert values(loader) == [100, 101, 102, 103, 104, 105]
    assert torch.cat([targets for _, targets in loader]).tolist() == [1, 0, 1, 0, 1, 1]


def test_last_batch_of_evaluation_is_kept_and_of_training_dropped(parquet: Path) -> None:
    loaders = load(section(parquet), batch_size=8)
    assert [len(targets) for _, targets in loaders.train] == [8, 8]
    assert [len(targets) for _, targets in load(section(parquet), batch_size=4).eval] == [4, 2]
    assert loaders.steps_per_epoch == 2
    assert load(section(parquet), batch_size=4, accelerator_shards=(1, 2)).steps_per_epoch == 2


@pytest.mark.parametrize("form", ["file", "glob", "save_to_disk", "save_to_disk_dict", "arrow"])
def test_every_local_form_gives_the_same_rows(form: str, parquet: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    train = rows([0, 1] * 10)
    fields: dict[str, Any] = {"eval_fraction": 0.2}
    if form == "file":
        path = parquet / "train-00000-of-00001.parquet"
    elif form == "glob":
        path = parquet / "train-*.parquet"
    elif form == "save_to_disk":
        train.with_format("arrow").save_to_disk(saved)
        path = saved
    elif form == "save_to_disk_dict":
        datasets.DatasetDict(train=train, test=rows([0, 1])).save_to_disk(saved)
        path, fields = saved, {}
    else:
        train.save_to_disk(saved)
        path = saved / "*.arrow"
    data_section = section(path, **fields)
    data = open_dataset(data_section, 0)
    assert data.class_names == ("cat", "dog")
    assert len(data.train) == (16 if fields else 20)
    everything = values(load(data_section, batch_size=1).train)
    assert sorted(everything) == data.train.indices.tolist()
    assert str(tmp_path) not in data.name


def test_image_folder_of_all_modes_becomes_rgb_without_a_warning(image_folder: Path) -> None:
    data_section = section(image_folder, eval_split="validation")
    assert open_dataset(data_section, 0).class_names == ("ant", "bee")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batches = list(load(data_section, input=COLOUR).eval)
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (22, 3, 8, 8)
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 11 + [1] * 11


def test_flat_image_folder_has_only_train(image_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'test'; it has train\..*eval_fraction"):
        open_dataset(section(image_folder / "train"), 0)
    data = open_dataset(section(image_folder / "train", eval_fraction=0.3), 0)
    assert (len(data.train), len(data.eval)) == (15, 7)


@pytest.mark.parametrize(
    ("image", "mode", "expected"),
    [
        (Image.new("1", (2, 2), 1), "RGB", (255, 255, 255)),
        (Image.new("L", (2, 2), 90), "RGB", (90, 90, 90)),
        (Image.fromarray(np.full((2, 2), 90 << 8, np.uint16)), "L", 90),
        (Image.fromarray(np.full((2, 2), 90 << 8, np.uint16)), "RGB", (90, 90, 90)),
        (Image.new("LA", (2, 2), (90, 5)), "L", 90),
        (Image.new("RGB", (2, 2), (200, 100, 50)).quantize(4), "RGB", (200, 100, 50)),
        (Image.new("RGBA", (2, 2), (200, 100, 50, 7)), "RGB", (200, 100, 50)),
        (Image.new("RGBA", (2, 2), (200, 100, 50, 7)), "RGBA", (200, 100, 50, 7)),
        (Image.new("RGB", (2, 2), (200, 100, 50)), "RGBA", (200, 100, 50, 255)),
        (Image.new("L", (2, 2), 90), "L", 90),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_decoding_converts_pixels(image: Image.Image, mode: str, expected: Any) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    for value in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}):
        decoded = decode(read(value), mode)
        assert decoded.mode == mode
        assert decoded.getpixel((0, 0)) == expected


def test_decoding_turns_photos_upright() -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[Image.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), "RGB").size == (4, 6)


def test_images_may_be_plain_bytes(tmp_path: Path) -> None:
    buffers = [io.BytesIO() for _ in range(4)]
    for index, buffer in enumerate(buffers):
        grey(index).save(buffer, "PNG")
    plain = datasets.Dataset.from_dict({"image": [buffer.getvalue() for buffer in buffers], "label": [0, 1, 0, 1]})
    folder = write_parquet(tmp_path / "plain", train=plain, test=plain)
    assert values(load(section(folder)).eval) == [0, 1, 2, 3]


def test_undecodable_image_names_split_and_row(tmp_path: Path) -> None:
    whole = rows([0, 1, 0, 1])
    images = whole.cast_column("image", datasets.Image(decode=False))["image"][:]
    images[2] = {"bytes": images[2]["bytes"][:40], "path": None}
    broken = datasets.Dataset.from_dict({"image": images, "label": whole["label"][:]}, features=whole.features)
    folder = write_parquet(tmp_path / "broken", train=whole, test=broken)
    with pytest.raises(ValueError, match="Split 'test', row 2: the image cannot be decoded"):
        list(load(section(folder)).eval)


def test_string_labels_become_sorted_classes(tmp_path: Path) -> None:
    text = datasets.Value("string")
    folder = write_parquet(
        tmp_path / "text", train=rows(["dog", "ape", "cat", "dog"], label=text), test=rows(["cat", "ape"], label=text)
    )
    data = open_dataset(section(folder), 0)
    assert data.class_names == ("ape", "cat", "dog")
    assert data.train.targets.tolist() == [2, 0, 1, 2]
    assert data.eval.targets.tolist() == [1, 0]


def test_integer_labels_are_their_own_names(tmp_path: Path) -> None:
    number = datasets.Value("int32")
    folder = write_parquet(tmp_path / "n", train=rows([2, 0, 1, 2], label=number), test=rows([1, 0], label=number))
    data = open_dataset(section(folder), 0)
    assert data.class_names == ("0", "1", "2")
    assert data.train.targets.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("train", "test", "kind", "message"),
    [
        ([0, 1, -1], [0], "int64", r"Split 'train', row 2: 'label' is -1, which is none of the 2 classes 0, 1"),
        ([0, 1, 1], [0, 2], "int64", "Split 'test', row 1: 'label' is 2, which is none of the 2 classes"),
        ([0, 1, None], [0], "int64", "Split 'train', row 2: 'label' has no label"),
        ([0, 7, 1], [0], "int64", "goes up to 7 in 3 rows: these are not class indices"),
        ([0, 2, 2], [0], "int64", "1 of the 3 classes .* no image in the training split 'train': '1'"),
        ([0.0, 1.0], [0.0], "float32", "holds float; labels are class indices or strings"),
        (["a", "b"], ["c"], "string", "Split 'test', row 0: 'label' is 'c', which is none of the 2 classes a, b"),
        ([0, 0], [0], "int64", "samples of 1 class; 2 are needed"),
        (["a", "a"], ["a"], "string", "samples of 1 class; 2 are needed"),
    ],
)
def test_bad_labels_are_explained(tmp_path: Path, train: Any, test: Any, kind: str, message: str) -> None:
    value = datasets.Value(kind)
    folder = write_parquet(tmp_path / "bad", train=rows(train, label=value), test=rows(test, label=value))
    with pytest.raises(ValueError, match=message):
        open_dataset(section(folder), 0)


def test_splits_must_name_the_same_classes(tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["dog", "cat"])
    datasets.DatasetDict(train=rows([0, 1]), test=rows([0, 1], label=other)).save_to_disk(tmp_path / "swapped")
    with pytest.raises(ValueError, match=r"Split 'test' names other classes .*\['dog', 'cat'\], not \['cat', 'dog'\]"):
        open_dataset(section(tmp_path / "swapped"), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "img"}, "data.image is 'img', but split 'train' has the columns image, label"),
        ({"target": "fine"}, "data.target is 'fine', but split 'train' has the columns image, label"),
        ({"image": "label"}, "data.image is 'label', but that column holds no images"),
        ({"image": "imag", "target": "labels"}, "data.image is 'imag' and .*target is 'labels', .* mean 'image' and"),
        ({"train_split": "training"}, r"no split 'training' \(is it 'train'\?\); it has train, test"),
        ({"train_split": "a", "eval_split": "b"}, "no split 'a' and no split 'b'; .* data.train_split and data.eval"),
        ({"eval_split": "dev"}, "no split 'dev'; it has train, test"),
        ({"validation": "dev"}, "no split 'dev'; it has train, test"),
    ],
)
def test_wrong_names_list_what_there_is(parquet: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(section(parquet, **fields), 0)


def test_columns_of_other_names_are_found_where_there_is_one_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "timm_selfdistill.data")
    named = rows([0, 1] * 6).rename_columns({"image": "img", "label": "species"})
    for more in ({}, {"note": [f"note {number}" for number in range(12)]}):
        both = named
        for name, values in more.items():
            both = both.add_column(name, values)
        folder = write_parquet(tmp_path / f"more-{len(more)}", train=both, test=both)
        data = open_dataset(section(folder), 0)
        assert data.class_names == ("cat", "dog")
        assert "images in the column 'img', labels in 'species'" in caplog.text
    two = named.add_column("color", [0, 1] * 6).cast_column("color", datasets.ClassLabel(names=["red", "blue"]))
    with pytest.raises(ValueError, match=r"data.target is 'label', but .* has the columns img, species, color\."):
        open_dataset(section(write_parquet(tmp_path / "two", train=two, test=two)), 0)


def test_val_is_validation() -> None:
    assert DataSection(path="digits", val=0.2) == DataSection(path="digits", validation=0.2)
    assert load_recipe({"model": {"name": "resnet18"}, "data": {"path": "a", "val": "dev"}}).data.validation == "dev"
    with pytest.raises(RecipeError, match="data: must not have both val and validation"):
        load_recipe({"model": {"name": "resnet18"}, "data": {"path": "a", "val": 0.1, "validation": 0.1}})


@pytest.mark.parametrize("path", ["./missing", "~/missing-folder", "missing.parquet", "a/b/c", "missing-*", "/missing"])
def test_missing_local_path_never_reaches_the_network(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="there is no such folder or file"):
        open_dataset(section(path), 0)


def test_local_folder_wins_over_a_hub_name(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parquet.parent)
    assert len(open_dataset(section("pets"), 0).train) == 20


def test_unreachable_hub_name_and_unknown_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be opened; it can be 'digits', a folder or file"):
        open_dataset(section("nobody/nothing"), 0)
    (tmp_path / "table.xlsx").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"files ending in \.xlsx; all must end in one of \.parquet, \.arrow"):
        open_dataset(section(tmp_path / "table.xlsx"), 0)


def test_validation_share_is_stratified_disjoint_and_seeded(tmp_path: Path) -> None:
    labels = [0] * 150 + [1] * 50
    folder = write_parquet(tmp_path / "uneven", train=rows(labels), test=rows([0, 1]))
    data_section = section(folder, validation=0.1)
    data = open_dataset(data_section, 0)
    assert np.bincount(data.validation.targets).tolist() == [15, 5]
    assert np.bincount(data.train.targets).tolist() == [135, 45]
    assert sorted([*data.train.indices, *data.validation.indices]) == list(range(200))
    assert np.array(labels)[data.validation.indices].tolist() == data.validation.targets.tolist()
    assert open_dataset(data_section, 0).validation.indices.tolist() == data.validation.indices.tolist()
    assert open_dataset(data_section, 1).validation.indices.tolist() != data.validation.indices.tolist()
    loaders = load(data_section, batch_size=20)
    assert values(loaders.validation) == data.validation.indices.tolist()
    assert sorted(values(loaders.train)) == data.train.indices.tolist()


def test_rows_held_out_for_evaluation_are_the_same_for_every_seed(parquet: Path) -> None:
    data_section = section(parquet, eval_fraction=0.3, validation=0.3)
    first, second = open_dataset(data_section, 0), open_dataset(data_section, 1)
    assert first.eval.indices.tolist() == second.eval.indices.tolist()
    assert first.validation.indices.tolist() != second.validation.indices.tolist()
    for data in (first, second):
        parts = [data.train.indices, data.validation.indices, data.eval.indices]
        assert [len(part) for part in parts] == [10, 4, 6]
        assert sorted(np.concatenate(parts)) == list(range(20))


def test_validation_can_be_a_split_of_its_own(tmp_path: Path) -> None:
    folder = write_parquet(
        tmp_path / "three", train=rows([0, 1] * 3), validation=rows([0, 1], 50), test=rows([1, 0, 1], 90)
    )
    loaders = load(section(folder, validation="validation"), batch_size=2)
    assert values(loaders.validation) == [50, 51]
    assert values(loaders.eval) == [90, 91, 92]
    assert sorted(values(loaders.train)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("labels", "share"), [([0, 0, 0, 1], 0.25), ([0] * 8 + [1] * 2, 0.9)])
def test_a_class_too_small_to_share_is_named(tmp_path: Path, labels: list[int], share: float) -> None:
    folder = write_parquet(tmp_path / "small", train=rows(labels), test=rows([0, 1]))
    with pytest.raises(ValueError, match=r"Class 'dog' has \d sample\(s\) in split 'train', too few"):
        open_dataset(section(folder, validation=share), 0)


def test_limits_draw_a_stratified_sample(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "big", train=rows([0] * 60 + [1] * 30), test=rows([0, 1] * 20))
    data = open_dataset(section(folder, max_train=15, max_eval=7), 0)
    assert np.bincount(data.train.targets).tolist() == [10, 5]
    assert sorted(np.bincount(data.eval.targets)) == [3, 4]
    other = open_dataset(section(folder, max_train=15, max_eval=7), 1)
    assert other.train.indices.tolist() != data.train.indices.tolist()
    assert other.eval.indices.tolist() == data.eval.indices.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_follow_the_seed(workers: int) -> None:
    augment = AugmentSection(scale=(0.3, 1.0), color_jitter=0.4, re_prob=0.5, re_mode="pixel")
    data_section = section("digits", workers=workers, max_train=32)

    def batches(seed: int) -> torch.Tensor:
        return torch.cat([images for images, _ in load(data_section, augment=augment, batch_size=8, seed=seed).train])

    first = batches(0)
    assert torch.equal(first, batches(0))
    assert not torch.equal(first, batches(1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_is_augmented_by_seed_epoch_and_rows_alone(workers: int) -> None:
    """Whoever loads it, whenever, and however often the generators were used before."""
    augment = AugmentSection(scale=(0.3, 1.0), color_jitter=0.4, re_prob=0.5, re_mode="pixel")

    def epoch(index: int, first: int, *, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
        loaders = load(section("digits", workers=workers, max_train=32), augment=augment, batch_size=8)
        assert loaders.order is not None
        loaders.order.begin(index, first)
        images, targets = zip(*loaders.train, strict=True)
        return torch.cat(images), torch.cat(targets)

    images, targets = epoch(3, 0, workers=workers)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for first in (0, 8, 24):
        rest = epoch(3, first, workers=0)
        assert torch.equal(rest[0], images[first:])
        assert torch.equal(rest[1], targets[first:])
    other = epoch(4, 0, workers=workers)
    assert not torch.equal(other[1], targets)
    one = images.flatten(1)
    assert all(not torch.isclose(one, row).all(1).any() for row in other[0].flatten(1))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_repeat_begin_with_what_the_process_drew_in_the_batch_before(
    processes: int, accumulate: int
) -> None:
    targets = np.arange(31) % 3
    order = TrainingOrder(targets, 4, processes, accumulate, seed=0)
    plain = {epoch: list(order.batches(epoch)) for epoch in (0, 1, 2)}
    assert [position for batch in plain[1] for position in batch] == order.positions(1)[:28]
    order.arrange("repeated")
    used = 7 // processes // accumulate * accumulate
    for process in range(processes):
        before = None
        for epoch in (0, 1, 2):
            mine = list(order.batches(epoch))[process::processes][:used]
            drawn = plain[epoch][process::processes][:used]
            for batch, own in zip(mine, drawn, strict=True):
                assert batch == (own if before is None else before) + own
                before = own
            for first in (4 * processes, 8 * processes):
                assert next(order.batches(epoch, first)) == list(order.batches(epoch))[first // 4]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 2)])
def test_a_balanced_epoch_draws_as_many_of_every_class(processes: int, accumulate: int) -> None:
    targets = np.repeat([0, 1, 3], [40, 7, 2])  # the class 2 has no image
    order = TrainingOrder(targets, 4, processes, accumulate, seed=0, balanced=True)
    for epoch in (0, 1):
        drawn = np.array(order.positions(epoch))
        counts = np.bincount(targets[drawn], minlength=4)
        assert len(drawn) == 49
        assert counts.sum() == 49
        assert set(counts[[0, 1, 3]]) == {16, 17}
        assert counts[2] == 0
        for index, own in ((0, 40), (1, 7), (3, 2)):
            times = np.bincount(drawn[targets[drawn] == index], minlength=49)[targets == index]
            assert len(times) == own
            assert times.max() - times.min() <= 1, "no image comes again before all others of its class came"
    assert order.positions(0) == TrainingOrder(targets, 4, 1, 1, seed=0, balanced=True).positions(0)
    assert order.positions(0) != order.positions(1)
    assert list(order.batches(1, first=8)) == list(order.batches(1))[2:], "an epoch can be entered in its middle"
    order.begin(1, 8)
    assert [position for position, _ in next(iter(order))] == list(order.batches(1))[2]


def test_pairs_are_of_one_class_and_drawn_by_seed_and_epoch_alone() -> None:
    targets = np.array([0, 1, 1, 0, 2, 1, 0, 0, 1, 1, 0, 0])

    def epoch(index: int, seed: int = 0, first: int = 0) -> list[list[int]]:
        order = TrainingOrder(targets, 4, 1, 1, seed)
        order.arrange("paired")
        return list(order.batches(index, first))

    batches = epoch(3)
    assert [batch[:4] for batch in batches] == list(TrainingOrder(targets, 4, 1, 1, 0).batches(3))
    pairs = [pair for batch in batches for pair in zip(batch[:4], batch[4:], strict=True)]
    assert all(targets[one] == targets[other] for one, other in pairs)
    assert [(one, other) for one, other in pairs if one == other] == [(4, 4)], "only where it is alone in its class"
    assert epoch(3, first=8) == batches[2:]
    assert epoch(3, seed=1) != batches
    partners = {one: set() for one in range(12)}
    for index in range(60):
        for batch in epoch(index):
            for one, other in zip(batch[:4], batch[4:], strict=True):
                partners[one].add(other)
    assert all(partners[one] == set(np.flatnonzero(targets == targets[one])) - {one} for one in (0, 1, 11))


@pytest.mark.parametrize("arrangement", ["paired", "repeated"])
def test_loaders_follow_the_arrangement_of_the_order(arrangement: str) -> None:
    loaders = load(section("digits", max_train=32), batch_size=8)
    plain = [targets for _, targets in loaders.train]
    loaders.order.arrange(arrangement)
    batches = [targets for _, targets in loaders.train]
    assert [len(targets) for targets in batches] == [16] * len(plain)
    for index, (whole, drawn) in enumerate(zip(batches, plain, strict=True)):
        first, second = whole.chunk(2)
        assert torch.equal(first if arrangement == "paired" else second, drawn)
        other = second if arrangement == "paired" else first
        assert torch.equal(other, drawn if arrangement == "paired" or index == 0 else plain[index - 1])
    loaders.order.arrange("plain")
    assert [len(targets) for _, targets in loaders.train] == [8] * len(plain)


def test_augmentation_leaves_the_generators_of_training_alone() -> None:
    loaders = load(section("digits", max_train=32), augment=AugmentSection(scale=(0.3, 1.0), re_prob=1.0))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    next(iter(loaders.train))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_workers_of_a_stream_augment_apart(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "stream", 2, 16)
    data_section = section(folder, streaming=True, train_size=32, workers=1, shuffle_buffer=1)
    noise = AugmentSection(re_prob=1.0, re_mode="pixel")

    def first(process: int, epoch: int) -> torch.Tensor:
        loader = load(data_section, augment=noise, accelerator_shards=(process, 2)).train
        loader.begin(epoch)
        batch: torch.Tensor = next(iter(loader))[0]
        return batch

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(1, 0))
    assert not torch.equal(first(0, 0), first(0, 1))


def test_epochs_are_shuffled_anew_and_evaluation_leaves_the_global_generator_alone(parquet: Path) -> None:
    loaders = load(section(parquet))
    first = values(loaders.train)
    loaders.order.begin(1)
    second = values(loaders.train)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loaders.eval)
    assert torch.equal(torch.get_rng_state(), before)


def test_prepared_loaders_share_the_rows_among_processes(parquet: Path) -> None:
    halves = []
    for process in range(2):
        loaders = load(section(parquet), accelerator_shards=(process, 2))
        prepared = prepare_data_loader(loaders.train, num_processes=2, process_index=process, put_on_device=False)
        assert len(prepared) == loaders.steps_per_epoch
        halves.append(values(prepared))
    assert [len(half) for half in halves] == [8, 8]
    assert len({*halves[0], *halves[1]}) == 16


@pytest.mark.parametrize("policy", ["nonsense", "rand-m9-foo1", "rand-m1e3", "v0-m9", "randx-m9", "-"])
def test_an_unknown_policy_lists_the_known_ones(policy: str) -> None:
    with pytest.raises(ValueError, match=r"augment\.auto_augment: '.*' is not a policy of timm's.*rand-m9-.*svhn"):
        train_transform(AugmentSection(auto_augment=policy), COLOUR)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original-mstd0.5", "3a", "cifar10"])
def test_known_policies_are_taken(policy: str) -> None:
    assert train_transform(AugmentSection(auto_augment=policy), COLOUR)(grey(3).convert("RGB")).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_pct": 1e-9}, r"crop_pct is 1e-09; allowed is from 0\.1 to 2\.0, as images"),
        ({"crop_pct": float("nan")}, r"crop_pct is nan; allowed is from"),
        ({"crop_pct": "all"}, r"crop_pct is 'all'; allowed is from"),
        ({"interpolation": "evil"}, r"interpolation is 'evil'; allowed is 'nearest', .* or 'random'"),
        ({"interpolation": ["bilinear"]}, r"interpolation is \['bilinear'\]; allowed is 'nearest', "),
        ({"crop_mode": "none"}, r"crop_mode is 'none'; allowed is 'center', 'squash' or 'border'"),
        ({"image_size": ("b", "c")}, r"image_size is \('b', 'c'\); allowed is a height and a width in pixels"),
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\); allowed is"),
        ({"image_size": (8.5, 8)}, r"image_size is \(8.5, 8\); allowed is"),
        ({"std": (0.0,) * 3}, r"std is \(0\.0, 0\.0, 0\.0\); allowed is finite numbers above 0"),
        ({"mean": ("a", "b", "c")}, r"mean is \('a', 'b', 'c'\); allowed is finite numbers"),
    ],
)
def test_what_images_cannot_be_prepared_with_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(COLOUR, **change)


@pytest.mark.parametrize("mode", ["rrc", "rkrc", "rkrr", "pad"])
@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey", "colour"])
def test_training_transforms_give_the_input_shape(mode: Any, config: InputConfig) -> None:
    augment = AugmentSection(
        train_crop_mode=mode, color_jitter=0.3, grayscale_prob=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0
    )
    transform = train_transform(augment, config)
    image = Image.new("L" if config.channels == 1 else "RGB", (20, 14), 128)
    for _ in range(20):
        tensor = transform(image)
        assert tensor.shape == (config.channels, 8, 8)
        assert tensor.dtype == torch.float32


def test_pad_crop_shifts_by_up_to_the_padding() -> None:
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    transform = train_transform(AugmentSection(train_crop_mode="pad", crop_padding=2, hflip=0.0), GREY)
    padded = np.pad(pixels, 2)
    allowed = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    torch.manual_seed(0)
    seen = {(transform(Image.fromarray(pixels))[0] * 255).round().byte().numpy().tobytes() for _ in range(400)}
    assert seen == allowed


def test_pad_crop_covers_an_image_of_another_size_without_distortion() -> None:
    config = InputConfig(1, (6, 12), (0.0,), (1.0,), "nearest", 1.0)
    transform = train_transform(AugmentSection(train_crop_mode="pad", crop_padding=1, hflip=0.0), config)
    assert transform(Image.new("L", (40, 40), 255)).shape == (1, 6, 12)
    exact = Image.fromarray(np.arange(1, 73, dtype=np.uint8).reshape(6, 12))
    torch.manual_seed(0)
    tensors = [(transform(exact)[0] * 255).round() for _ in range(60)]
    assert any(torch.equal(tensor, torch.arange(1.0, 73.0).reshape(6, 12)) for tensor in tensors)


def test_pad_crop_fills_with_the_grey_that_is_asked_for() -> None:
    augment = AugmentSection(train_crop_mode="pad", crop_padding=8, crop_fill=128, hflip=0.0)
    torch.manual_seed(0)
    seen = {
        value for _ in range(20) for value in (train_transform(augment, GREY)(Image.new("L", (8, 8), 255))).unique()
    }
    assert {round(float(value) * 255) for value in seen} == {128, 255}


def test_cutout_blots_out_a_black_square_anywhere_and_cuts_it_off_at_the_edge() -> None:
    config = InputConfig(3, (8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "nearest", 1.0)
    transform = train_transform(AugmentSection(train_crop_mode="pad", crop_padding=1, hflip=0.0, cutout=4), config)
    black = train_transform(PLAIN, config)(Image.new("RGB", (8, 8)))[:, 0, 0]
    torch.manual_seed(0)
    shapes, centre = set(), []
    for _ in range(200):
        # With the padding, black too, kept out of sight.
        image = transform(Image.new("RGB", (8, 8), (255, 255, 255)))[:, 1:-1, 1:-1]
        hidden = (image - black[:, None, None]).abs().amax(0) < 1e-6
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns[None, :])
        shapes.add((int(rows.sum()), int(columns.sum())))
        centre.append(bool(hidden[3, 3]))
    assert max(shapes) == (4, 4)
    assert min(height for height, _ in shapes) < 4
    assert 0 < sum(centre) < 200


@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("policy", ["cifar10", "imagenet", "svhn"])
def test_policies_of_torchvision_stand_before_the_tensor(policy: str, config: InputConfig) -> None:
    transform = train_transform(AugmentSection(train_crop_mode="pad", auto_augment=policy), config)
    mode = "L" if config.channels == 1 else "RGB"
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).convert(mode)
    torch.manual_seed(0)
    tensors = [transform(image) for _ in range(30)]
    assert all(tensor.shape == (config.channels, 8, 8) for tensor in tensors)
    assert "AutoAugment(policy=AutoAugmentPolicy." + policy.upper() in repr(transform)


def test_meaningless_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="mean nothing to train_crop_mode 'pad'"):
        train_transform(AugmentSection(train_crop_mode="pad", scale=(0.5, 1.0)), GREY)
    with pytest.raises(ValueError, match="crop_fill 9 means nothing to train_crop_mode 'rrc'"):
        train_transform(AugmentSection(crop_fill=9), GREY)
    four = InputConfig(4, (8, 8), (0.0,) * 4, (1.0,) * 4, "bilinear", 1.0)
    with pytest.raises(ValueError, match="need 1 or 3 channels; the model takes 4"):
        train_transform(AugmentSection(auto_augment="rand-m9"), four)
    transform = train_transform(AugmentSection(color_jitter=0.4, re_prob=0.5, vflip=0.5), four)
    assert transform(Image.new("RGBA", (9, 9))).shape == (4, 8, 8)


def test_evaluation_normalises_and_crops_as_configured() -> None:
    pixels = np.full((8, 8), 255, np.uint8)
    pixels[2:6, 2:6] = 0
    whole = eval_transform(InputConfig(1, (8, 8), (0.5,), (0.25,), "nearest", 1.0))(Image.fromarray(pixels))
    assert whole.unique().tolist() == [-2.0, 2.0]
    assert torch.equal(whole[0] > 0, torch.from_numpy(pixels > 0))
    cut = eval_transform(InputConfig(1, (8, 8), (0.5,), (0.25,), "nearest", 0.5))(Image.fromarray(pixels))
    assert cut.unique().tolist() == [-2.0]


def test_input_config_is_the_models_unless_the_recipe_says_otherwise() -> None:
    model = timm.create_model("test_resnet")
    own = InputConfig.from_model(model, section("digits"))
    assert own.image_size == (160, 160)
    assert own.channels == len(own.mean) == 3
    assert own.crop_pct == 0.95
    fields = {"image_size": 32, "mean": (0.1,), "std": (0.2, 0.3, 0.4), "interpolation": "nearest", "crop_pct": 1.0}
    given = InputConfig.from_model(model, section("digits", **fields))
    assert given == InputConfig(3, (32, 32), (0.1,) * 3, (0.2, 0.3, 0.4), "nearest", 1.0)


def test_input_config_counts_the_channels_of_the_model() -> None:
    grey_model = timm.create_model("test_resnet", in_chans=1)
    config = InputConfig.from_model(grey_model, section("digits"))
    assert config.channels == 1
    assert config.mean == (pytest.approx(sum(timm.create_model("test_resnet").pretrained_cfg["mean"]) / 3),)
    with pytest.raises(ValueError, match="takes 2 channels; images can have 1, 3, 4"):
        InputConfig.from_model(timm.create_model("test_resnet", in_chans=2), section("digits"))
    with pytest.raises(ValueError, match=r"data\.mean has 3 values for 1 channels"):
        InputConfig.from_model(grey_model, section("digits", mean=(0.1, 0.2, 0.3)))


def test_mixup_is_built_only_when_asked_for() -> None:
    assert build_mixup(AugmentSection(), 10, 0.1) is None
    mixup = build_mixup(AugmentSection(mixup_alpha=0.2, mixup_mode="elem"), 10, 0.1)
    images, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert images.shape == (4, 3, 8, 8)
    assert targets.shape == (4, 10)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert targets.min().item() == pytest.approx(0.01)
    cutmix = build_mixup(AugmentSection(cutmix_minmax=(0.2, 0.8)), 10, 0.0)
    assert (cutmix.cutmix_alpha, cutmix.mixup_alpha, cutmix.mode) == (1.0, 0.0, "batch")


def test_loaders_that_cannot_work_are_refused(parquet: Path) -> None:
    with pytest.raises(ValueError, match="20 samples, less than one batch of 16 for each of 2"):
        load(section(parquet), batch_size=16, accelerator_shards=(0, 2))
    with pytest.raises(ValueError, match=r"even batch size .* received 5"):
        load(section(parquet), batch_size=5, augment=AugmentSection(mixup_alpha=1.0))


@pytest.mark.parametrize(("shards", "workers"), [(2, 0), (3, 0), (4, 2), (1, 2)])
def test_streamed_shares_are_disjoint_and_equally_long(tmp_path: Path, shards: int, workers: int) -> None:
    folder = write_shards(tmp_path / "stream", shards, 16)
    size = 16 * shards
    data_section = section(folder, streaming=True, train_size=size, workers=workers, shuffle_buffer=8)
    shares = []
    for process in range(2):
        loaders = load(data_section, batch_size=2, accelerator_shards=(process, 2))
        assert loaders.steps_per_epoch == len(loaders.train) == size // 4
        shares.append(values(loaders.train))
    assert len(shares[0]) == len(shares[1]) == size // 2
    assert not {*shares[0]} & {*shares[1]}
    assert {*shares[0], *shares[1]} == set(range(size))


def test_stream_gives_the_same_number_of_batches_whatever_its_length(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "stream", 2, 6)
    for size in (24, 8):  # it has 12 samples
        loaders = load(section(folder, streaming=True, train_size=size))
        assert [len(targets) for _, targets in loaders.train] == [4] * (size // 4)
    with pytest.raises(ValueError, match="gave no full batch of 16"):
        list(load(section(folder, streaming=True, train_size=64), batch_size=16).train)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_shuffled_by_seed_and_epoch(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "stream", 2, 20)
    data_section = section(folder, streaming=True, train_size=40, workers=workers)

    def epochs(seed: int) -> list[list[int]]:
        loader = load(data_section, seed=seed).train
        orders = []
        for epoch in range(2):
            loader.begin(epoch)
            orders.append(values(loader))
        return orders

    first = epochs(0)
    assert first == epochs(0)
    assert first[0] != first[1]
    assert first[0] != epochs(1)[0]
    assert sorted(first[0]) == sorted(first[1]) == list(range(40))


def test_stream_evaluates_every_sample_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "stream", 2, 6)
    data_section = section(folder, streaming=True, train_size=12)
    data = open_dataset(data_section, 0)
    assert data.streaming
    assert isinstance(data.train, StreamSplit)
    assert data.class_names == ("cat", "dog")
    for process in range(2):
        loader = load(data_section, accelerator_shards=(process, 2)).eval
        assert values(loader) == [200, 201, 202, 203, 204]
        assert torch.cat([targets for _, targets in loader]).tolist() == [0, 1, 0, 1, 1]


def test_stream_reads_other_column_names_and_limits(tmp_path: Path) -> None:
    named = rows([0, 1] * 6).rename_columns({"image": "img", "label": "fine"})
    folder = write_parquet(tmp_path / "named", train=named, test=named)
    data_section = section(folder, streaming=True, image="img", target="fine", max_train=8, max_eval=3)
    loaders = load(data_section)
    assert loaders.steps_per_epoch == 2
    assert sorted(values(loaders.train)) == list(range(8))
    assert values(loaders.eval) == [0, 1, 2]


def test_stream_of_an_image_folder(image_folder: Path) -> None:
    data_section = section(image_folder, streaming=True, train_size=22, eval_split="validation")
    batches = list(load(data_section, input=COLOUR).eval)
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 11 + [1] * 11


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "names"),
    [
        ("int64", [1, 0, 2, 1], 3, ("0", "1", "2")),
        ("int32", [1, 0, 2, 1], ["ape", "bat", "cat"], ("ape", "bat", "cat")),
        ("string", ["bat", "ape", "cat", "bat"], ["ape", "bat", "cat"], ("ape", "bat", "cat")),
        ("large_string", ["bat", "ape", "cat", "bat"], ["ape", "bat", "cat"], ("ape", "bat", "cat")),
    ],
)
def test_the_recipe_names_the_classes_of_a_stream_that_does_not(
    tmp_path: Path, kind: str, labels: list[Any], classes: Any, names: tuple[str, ...]
) -> None:
    split = rows(labels, label=datasets.Value(kind))
    folder = write_parquet(tmp_path / "plain", train=split, test=split)
    given = section(folder, streaming=True, train_size=4, classes=classes)
    assert open_dataset(given, 0).class_names == names
    assert torch.cat([targets for _, targets in load(given).eval]).tolist() == [1, 0, 2, 1]
    stored = open_dataset(section(folder, classes=classes), 0)
    assert (stored.class_names, stored.eval.targets.tolist()) == (names, [1, 0, 2, 1])


@pytest.mark.parametrize(
    ("kind", "label", "classes"), [("int64", 7, 3), ("int64", -2, 3), ("string", "dog", ["a", "b"]), ("int64", None, 3)]
)
def test_a_label_that_is_none_of_the_recipes_classes_is_an_error_at_its_row(
    tmp_path: Path, kind: str, label: Any, classes: Any
) -> None:
    good = 0 if kind == "int64" else "a"
    split = rows([good, label, good], label=datasets.Value(kind))
    folder = write_parquet(tmp_path / "plain", train=split, test=split)
    message = "the label is missing" if label is None else f"the label is {label!r}, which is none of the"
    with pytest.raises(ValueError, match=f"Split 'test'.*: {message}"):
        list(load(section(folder, streaming=True, train_size=4, classes=classes)).eval)


def test_classes_of_the_recipe_must_be_those_of_the_data(parquet: Path) -> None:
    for streaming in (False, True):
        for classes in (2, ["cat", "dog"]):
            data = open_dataset(section(parquet, streaming=streaming, classes=classes), 0)
            assert data.class_names == ("cat", "dog")
        for classes in (3, ["dog", "cat"]):
            with pytest.raises(ValueError, match=r"data\.classes is .*, but .* names its 2 classes itself: cat, dog"):
                open_dataset(section(parquet, streaming=streaming, classes=classes), 0)


def test_stream_that_cannot_work_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "stream", 1, 4)
    with pytest.raises(ValueError, match=r"does not know the length of its training split: set data\.train_size"):
        load(section(folder, streaming=True))
    text = datasets.Value("string")
    folder = write_parquet(tmp_path / "text", train=rows(["a", "b"], label=text), test=rows(["a"], label=text))
    with pytest.raises(ValueError, match="a stream cannot tell its classes"):
        open_dataset(section(folder, streaming=True), 0)
    with pytest.raises(ValueError, match=r"data\.classes is 2, but a stream cannot tell its classes"):
        open_dataset(section(folder, streaming=True, classes=2), 0)
    rows([0, 1]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"set data\.streaming to false"):
        open_dataset(section(tmp_path / "saved", streaming=True), 0)
    folder = write_parquet(tmp_path / "unlabelled", train=rows([0, 1, -1, 1]), test=rows([0, 1]))
    with pytest.raises(ValueError, match=r"Split 'train'.*: the label is missing"):
        list(load(section(folder, streaming=True, train_size=4)).train)
