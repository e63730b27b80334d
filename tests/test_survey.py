"""What a run remembers of its data."""

import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from timm_selfdistill.data import ImageData, ImageSplit, open_dataset
from timm_selfdistill.data.survey import Fingerprint, fingerprint
from timm_selfdistill.recipe import DataSection


@pytest.fixture
def folder(tmp_path: Path, make_image_folder: Any) -> Path:
    """Splits train (8 images of each of 4 classes) and validation (5)."""
    return make_image_folder(tmp_path / "images")


def look(path: Path | str, **settings: Any) -> Fingerprint:
    section = DataSection(**{"path": str(path), "eval_split": "validation", "validation": 0.25, **settings})
    return fingerprint(open_dataset(section, 0), section)


def test_it_is_the_same_for_the_same_data_elsewhere(tmp_path: Path, folder: Path) -> None:
    before = look(folder)
    assert before.changes(look(folder)) == []
    shutil.copytree(folder, tmp_path / "moved" / "elsewhere")
    assert before.changes(look(tmp_path / "moved" / "elsewhere")) == []
    assert Fingerprint.from_json(before.to_json()) == before
    assert list(before.uses) == ["training", "validation", "evaluation"]
    assert str(folder) not in str(before)


def test_what_changed_is_named(folder: Path) -> None:
    before = look(folder)
    (folder / "train" / "class1" / "3.png").unlink()
    assert before.changes(look(folder)) == [
        "train has 31 images, had 32",
        "class 'class1' of train has 7 images, had 8",
    ]
    shutil.copy(folder / "train" / "class1" / "4.png", folder / "train" / "class1" / "3.png")
    assert before.changes(look(folder)) == []
    (folder / "train" / "class1" / "3.png").rename(folder / "train" / "class1" / "33.png")
    changes = before.changes(look(folder))
    assert "are others, or in another order, by their names, labels or sizes" in changes[0]
    (folder / "train" / "class1" / "33.png").rename(folder / "train" / "class2" / "3b.png")
    assert before.changes(look(folder)) == [
        "class 'class1' of train has 7 images, had 8",
        "class 'class2' of train has 9 images, had 8",
    ]


def test_a_class_of_another_name_is_named(folder: Path) -> None:
    before = look(folder)
    for split in ("train", "validation"):
        (folder / split / "class2").rename(folder / split / "0class2")
    assert before.changes(look(folder))[0] == "class 'class2' is now '0class2'"
    for split in ("train", "validation"):
        shutil.rmtree(folder / split / "0class2")
    assert before.changes(look(folder))[0] == "'class2' is no longer among the classes"
    assert look(folder).changes(before)[0] == "'class2' is new among the classes"


def rows_with_bytes(labels: list[int], sizes: list[int]) -> datasets.Dataset:
    images = [{"bytes": bytes(size), "path": None} for size in sizes]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_stored_images_are_told_apart_by_label_and_size(tmp_path: Path) -> None:
    labels, sizes = [0, 1] * 6, list(range(10, 22))

    def of(labels: list[int], sizes: list[int]) -> Fingerprint:
        rows = datasets.DatasetDict({"train": rows_with_bytes(labels, sizes), "test": rows_with_bytes(labels, sizes)})
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        for split in rows:
            (tmp_path / "saved").mkdir(exist_ok=True)
            rows[split].to_parquet(tmp_path / "saved" / f"{split}-0.parquet")
        return look(tmp_path / "saved", validation=0.0, eval_split="test")

    before = of(labels, sizes)
    assert before.changes(of(labels, sizes)) == []
    assert before.changes(of([1, 1, *labels[2:]], sizes))
    # One becomes the other: the counts stay.
    assert "are others" in before.changes(of([1, 0, *labels[2:]], sizes))[0]
    assert "the images for training are others" in before.changes(of(labels, [9, *sizes[1:]]))[0]


def test_saved_rows_in_another_order_are_followed(tmp_path: Path) -> None:
    rows = rows_with_bytes([0, 1] * 6, list(range(10, 22)))
    rows.to_parquet(tmp_path / "train-0.parquet")
    plain = look(tmp_path, validation=0.0, eval_fraction=0.5)
    data = open_dataset(DataSection(path=str(tmp_path), validation=0.0, eval_fraction=0.5), 0)

    def turned(order: np.ndarray[Any, Any]) -> Fingerprint:
        train = data.train
        assert isinstance(train, ImageSplit)
        split = ImageSplit("train", train.rows.select(order), np.arange(len(order)), np.zeros(len(order), np.int64))
        section = DataSection(path=str(tmp_path))
        return fingerprint(ImageData(split, None, split, ("a", "b"), "", False), section)

    assert plain.uses["training"].rows == 12
    assert turned(np.array([3, 1, 2])) != turned(np.array([1, 2, 3]))
    assert turned(np.array([3, 1, 2])) == turned(np.array([3, 1, 2]))


def test_a_stream_is_told_by_its_classes_and_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows_with_bytes([0, 1] * 6, list(range(10, 22))).to_parquet(tmp_path / f"{split}-0.parquet")
    settings: dict[str, Any] = {"streaming": True, "validation": 0.0, "eval_split": "test"}
    before = look(tmp_path, **settings)
    assert before.changes(look(tmp_path, **settings)) == []
    rows_with_bytes([0, 1] * 7, list(range(10, 24))).to_parquet(tmp_path / "train-1.parquet")
    assert before.changes(look(tmp_path, **settings))


def test_a_million_rows_cost_little() -> None:
    count = 1_000_000
    paths = [f"/data/images/train/class{i % 1000}/{i}.jpg" for i in range(count)]
    images = pa.StructArray.from_arrays([pa.nulls(count, pa.binary()), pa.array(paths)], ["bytes", "path"])
    rows = datasets.Dataset(pa.table({"image": images}))
    split = ImageSplit("train", rows, np.arange(count), np.arange(count) % 1000)
    data = ImageData(split, None, split.select(np.arange(1000)), tuple(map(str, range(1000))), "", False)
    began = time.process_time()
    fingerprint(data, DataSection(path="/data/images"))
    assert time.process_time() - began < 10
