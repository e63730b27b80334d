"""Parquet and arrow files that number the same classes differently are refused."""

import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from timm_selfdistill.data import open_dataset
from timm_selfdistill.recipe import DataSection

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def rows(names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [Image.new("L", (4, 4), index) for index in range(2 * len(names))]
    labels = [index % len(names) for index in range(len(images))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def write(folder: Path, files: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True)
    for name, names in files.items():
        rows(names).to_parquet(folder / name)
    return folder


OTHER = [
    {"train.parquet": ["cat", "dog", "fox"], "test.parquet": ["fox", "dog", "cat"]},
    {"train.parquet": ["cat", "dog", "fox"], "test.parquet": ["dog", "fox"]},
    {"train-00000-of-00002.parquet": ["cat", "dog"], "train-00001-of-00002.parquet": ["dog", "cat"]},
]


@pytest.mark.parametrize("files", OTHER)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_other_names_are_named(tmp_path: Path, files: dict[str, list[str]], streaming: bool) -> None:
    folder = write(tmp_path / "pets", {"test.parquet": next(iter(files.values()))} | files)
    message = f"{'.* and .*'.join(files)} number the classes of 'label' differently"
    with pytest.raises(ValueError, match=message):
        open_dataset(DataSection(path=str(folder), validation=0.0, streaming=streaming), 0)


def test_a_glob_and_arrow_files_are_compared_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets", {"a.parquet": ["cat", "dog"], "b.parquet": ["dog", "cat"]})
    with pytest.raises(ValueError, match="number the classes"):
        open_dataset(DataSection(path=f"{folder}/*.parquet", validation=0.0, eval_fraction=0.5), 0)
    for name, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        rows(names).save_to_disk(tmp_path / "saved" / name)
    with pytest.raises(ValueError, match="number the classes"):
        open_dataset(DataSection(path=f"{tmp_path}/saved/*/*.arrow", validation=0.0, eval_fraction=0.5), 0)


def test_splits_that_are_not_used_may_differ(tmp_path: Path) -> None:
    files = {"train.parquet": ["cat", "dog"], "test.parquet": ["cat", "dog"], "validation.parquet": ["dog", "cat"]}
    folder = write(tmp_path / "pets", files)
    assert open_dataset(DataSection(path=str(folder), validation=0.0), 0).class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="number the classes"):
        open_dataset(DataSection(path=str(folder), validation="val"), 0)


@pytest.mark.parametrize("form", ["folder", "file", "glob"])
def test_paths_with_the_characters_of_patterns_are_read(tmp_path: Path, form: str) -> None:
    folder = write(tmp_path / "a [1]*", {"train.parquet": ["cat", "dog"], "test.parquet": ["cat", "dog"]})
    path = {"folder": folder, "file": folder / "train.parquet", "glob": f"{tmp_path}/a *1*/train.parquet"}[form]
    fields = {} if form == "folder" else {"eval_fraction": 0.5}
    assert len(open_dataset(DataSection(path=str(path), validation=0.0, **fields), 0).class_names) == 2


def test_a_class_that_no_row_of_the_training_split_has_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets", {"test.parquet": ["cat", "dog", "fox"]})
    rows(["cat", "dog", "fox"]).select([0, 1, 3, 4]).to_parquet(folder / "train.parquet")
    section = DataSection(path=str(folder), validation=0.0)
    with pytest.raises(ValueError, match=r"1 of the 3 classes .* no image in the training split 'train': 'fox'"):
        open_dataset(section, 0)
    allowed = open_dataset(section.model_copy(update={"allow_empty_classes": True}), 0)
    assert allowed.class_names == ("cat", "dog", "fox")


def test_files_that_are_in_no_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{name}.parquet": ["cat", "dog"] for name in ("train", "test", "more")}
    open_dataset(DataSection(path=str(write(tmp_path / "pets", files)), validation=0.0), 0)
    assert "1 files of " in caplog.text
    assert "are in no split, as nothing in their names tells which: 'more.parquet'." in caplog.text


def test_labels_are_equal_after_unicode_normalisation(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder = write(tmp_path / "names", {"train.parquet": [composed, "dog"], "test.parquet": [decomposed, "dog"]})
    assert open_dataset(DataSection(path=str(folder), validation=0.0), 0).class_names == (composed, "dog")
    folder = tmp_path / "strings"
    folder.mkdir()
    for split, labels in (("train", [composed, "dog"]), ("test", ["dog", decomposed])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        images = [Image.new("L", (4, 4), index) for index in range(2)]
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / f"{split}.parquet"
        )
    assert open_dataset(DataSection(path=str(folder), validation=0.0), 0).eval.targets.tolist() == [1, 0]
