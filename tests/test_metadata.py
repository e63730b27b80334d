"""Folders that metadata.csv, .jsonl or .parquet describe, as Hugging Face documents them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import decode, read
from timm_selfdistill.data.path_tables import load_metadata, metadata_files
from timm_selfdistill.recipe import DataSection

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def open_folder(path: Path, **fields: Any) -> ImageData:
    return open_dataset(DataSection(path=str(path), **({"validation": 0.0, "workers": 0} | fields)), 0)


def values(split: Any) -> list[int]:
    return [decode(read(split[index]["image"]), "L").getpixel((0, 0)) for index in range(len(split))]


def write(folder: Path, names: list[str], kind: str = "csv", start: int = 0, column: str = "file_name") -> Path:
    """Write images of one grey each, and the metadata in the folder; the labels are cat and dog by turns."""
    for index, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), index).save(folder / name)
    rows = [{column: name, "text": "a, b", "label": ("cat", "dog")[index % 2]} for index, name in enumerate(names)]
    file = folder / f"metadata.{kind}"
    if kind == "csv":
        file.write_text(f"{column},text,label\n" + "".join(f'{row[column]},"a, b",{row["label"]}\n' for row in rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_in_the_folders_of_splits(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "train", ["0.png", "1.png", "deep/2.png", "3.png"], kind)
    write(tmp_path / "test", ["4.png", "5.png"], kind, start=4)
    data = open_folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert [values(split) for split in (data.train, data.eval)] == [[0, 1, 2, 3], [4, 5]]
    assert data.train.targets.tolist() == [0, 1, 0, 1]
    assert len(metadata_files(tmp_path)) == 2


def test_metadata_at_the_top(tmp_path: Path) -> None:
    write(tmp_path / "plain", ["0.png", "1.png", "more/2.png", "3.png"])
    data = open_folder(tmp_path / "plain", eval_fraction=0.5)
    assert sorted(values(data.train) + values(data.eval)) == [0, 1, 2, 3]
    write(tmp_path / "split", ["train/0.png", "train/1.png", "test/2.png", "test/3.png"])
    data = open_folder(tmp_path / "split")
    assert [values(split) for split in (data.train, data.eval)] == [[0, 1], [2, 3]]


def test_a_folder_called_like_no_split_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train", ["0.png", "1.png", "2.png", "3.png"])
    write(tmp_path / "raw", ["4.png", "5.png"], start=4)
    assert len(open_folder(tmp_path, eval_fraction=0.5).train) == 2
    assert "raw/metadata.csv is not read: its folder is called like no split" in caplog.text
    assert len(open_folder(tmp_path, eval_split="raw").eval) == 2


def test_images_that_are_not_named_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, start in (("train", 0), ("test", 4)):
        write(tmp_path / split, ["0.png", "1.png", "deep/2.png", "./3.png"], start=start)
    (tmp_path / "train" / "notes.txt").touch()
    write(tmp_path / "valid", ["x/8.png"], start=8)
    shutil.rmtree(tmp_path / "valid" / "x")  # an unused split
    open_folder(tmp_path)
    assert "not read" not in caplog.text
    for name in ("b.jpg", "a.PNG", "deep/c.webp"):
        (tmp_path / "train" / name).touch()
    open_folder(tmp_path)
    assert "3 images are not read because " in caplog.text
    assert f"metadata.csv does not name them; the first is {tmp_path / 'train' / 'a.PNG'}." in caplog.text


def test_another_column_of_images(tmp_path: Path) -> None:
    write(tmp_path, ["0.png", "1.png", "2.png", "3.png"], column="input_file_name")
    assert len(open_folder(tmp_path, image="input", eval_fraction=0.5).train) == 2


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "file:///etc/x.png", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (write(tmp_path / "pets", ["0.png", "1.png"])).open("a").write(f"{name},a,cat\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, row 2: 'file_name' is '.*', but it has to be relative"):
        open_folder(tmp_path / "pets", eval_fraction=0.5)


def test_missing_images_and_several_files_are_told(tmp_path: Path) -> None:
    file = write(tmp_path, ["0.png", "1.png"])
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 images of .*metadata\.csv are missing; the first, .*1\.png"):
        open_folder(tmp_path, eval_fraction=0.5)
    write(tmp_path, ["0.png", "1.png"], "jsonl")
    with pytest.raises(ValueError, match=r"several metadata files where one is allowed: .*\.csv, .*\.jsonl"):
        open_folder(tmp_path, eval_fraction=0.5)
    file.unlink()
    write(tmp_path, paths := [f"{index}.png" for index in range(4)], "jsonl")
    assert len(open_folder(tmp_path, eval_fraction=0.5).train) == len(paths) // 2


def test_metadata_of_another_kind_leaves_class_folders_alone(
    tmp_path: Path, make_image_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_image_folder(tmp_path / "pets")
    (folder / "train" / "metadata.csv").write_text("file_name,caption\nclass0/0.png,x\n")
    (folder / "metadata.jsonl").write_text('{"author": "me"}\n')
    assert load_metadata(folder, DataSection(path=str(folder))) is None
    assert "metadata.csv is not read: it has no column 'label', which data.target names, but file_name" in caplog.text
