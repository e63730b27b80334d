"""Tables of paths: CSV, JSON lines and parquet files that name images and their classes."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import decode, read
from timm_selfdistill.data.table_files import read_table
from timm_selfdistill.recipe import DataSection

LABELS = ("cat", "dog", "cat", "dog")


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def open_table(path: Path | str, **fields: Any) -> ImageData:
    settings = {"validation": 0.0, "workers": 0, "image": "path", "eval_fraction": 0.5} | fields
    return open_dataset(DataSection(path=str(path), **settings), 0)


def values(split: Any) -> list[int]:
    """The grey value of every image, which tells its number."""
    return [decode(read(split[index]["image"]), "L").getpixel((0, 0)) for index in range(len(split))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.png to 7.png, of which image i is grey with the value i."""
    for index in range(8):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (4, 4), index).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def write(file: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a table in the format of its ending."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if file.suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        parquet.write_table(pa.table(columns), file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        lines = [columns, *(row.values() for row in rows)]
        file.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
    return file


def paths(count: int, start: int = 0, prefix: str = "photos/") -> list[str]:
    return [f"{prefix}{index}.png" for index in range(start, start + count)]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "json", "parquet"])
def test_a_table_of_paths_is_a_data_set(folder: Path, ending: str) -> None:
    columns = {"number": list(range(8)), "label": list(LABELS) * 2, "path": paths(8)}
    data = open_table(write(folder / f"labels.{ending}", columns))
    assert data.class_names == ("cat", "dog")
    assert data.name == folder.name
    found = dict(zip(values(data.train) + values(data.eval), [*data.train.targets, *data.eval.targets], strict=True))
    assert found == {index: index % 2 for index in range(8)}


def test_paths_are_relative_to_the_root_or_absolute(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (folder / "tables").mkdir()
    names = [str(folder / "photos" / "0.png"), *paths(3, 1, "")]
    file = write(folder / "tables" / "labels.csv", {"path": names, "label": LABELS})
    data = open_table(file, root=str(folder / "photos"))
    assert sorted(values(data.train) + values(data.eval)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"3 of the 4 images of .*labels.csv are missing; the first, .*tables/1\.png"):
        open_table(file)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    assert len(open_table("~/tables/labels.csv", root="~/photos").train) == 2
    with pytest.raises(ValueError, match=r"data\.root '.*nowhere' is not a folder"):
        open_table(file, root=str(folder / "nowhere"))
    with pytest.raises(ValueError, match=r"data\.root 'x' is where the images of a table are, but data\.path 'digits'"):
        open_table("digits", root="x", image="image")


def test_paths_that_leave_the_root_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "tables").mkdir()
    file = write(folder / "tables" / "labels.csv", {"path": paths(4, prefix="../photos/"), "label": LABELS})
    assert len(open_table(file).train) == 2
    assert f"4 of the 4 paths of {file} lead out of {folder / 'tables'}, the first is ../photos/0.png." in caplog.text


def test_labels_that_are_names_stay_text(folder: Path) -> None:
    names = ["01", "NA", "null", "None", "nan", "1", "1.0", "true"]
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        file = write(folder / f"labels.{ending}", {"path": paths(8), "label": names})
        data = (
            open_table(file, eval_fraction=None, eval_split="train", train_split="other", split_column=None)
            if 0
            else None
        )
        table = read_table(file, {"path": "path", "label": "label"})
        assert table.rows["label"].to_pylist() == names
        assert data is None


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_integers_are_class_indices(folder: Path, ending: str) -> None:
    data = open_table(write(folder / f"labels.{ending}", {"path": paths(8), "label": [0, 1, 2, 10 % 3] * 2}))
    assert data.class_names == ("0", "1", "2")
    data = open_table(folder / f"labels.{ending}", classes=["ape", "bat", "cat"])
    assert data.class_names == ("ape", "bat", "cat")
    assert open_table(folder / f"labels.{ending}", classes=3).class_names == ("0", "1", "2")


def test_a_table_as_other_programs_write_it(folder: Path) -> None:
    text = '\ufeffpath,note,label\r\nphotos/0.png,"a, ""b""\r\nc",cat\r\nphotos/1.png,,"d,og"\r\n'
    (folder / "labels.csv").write_text(text * 1 + 'photos/2.png,x,cat\r\nphotos/3.png,x,"d,og"\r\n', newline="")
    assert open_table(folder / "labels.csv").class_names == ("cat", "d,og")
    (folder / "labels.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps({"path": p, "label": "2020-01-01"}) for p in paths(4)) + "\n"
    )
    table = read_table(folder / "labels.jsonl", {"path": "path", "label": "label"})
    assert table.rows["label"].to_pylist() == ["2020-01-01"] * 4


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_column_may_name_the_splits(folder: Path, ending: str) -> None:
    columns = {"path": paths(8), "label": list(LABELS) * 2, "split": ["Train"] * 4 + ["val"] * 2 + ["test"] * 2}
    file = write(folder / f"labels.{ending}", columns)
    data = open_table(file, eval_fraction=None, validation="validation")
    assert [values(split) for split in (data.train, data.validation, data.eval)] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert len(open_table(file, split_column=None).train) == 4
    if ending == "jsonl":  # the key may begin later
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0].replace("split", "other"), *lines[1:]]))
        with pytest.raises(ValueError, match="row 0: 'split' is empty"):
            open_table(file)
    write(file, {("fold" if name == "split" else name): column for name, column in columns.items()})
    assert len(open_table(file).train) == 4
    assert len(open_table(file, eval_fraction=None, split_column="fold").train) == 4
    with pytest.raises(
        ValueError, match=r"data\.split_column is 'part', but .* has no such column; it has path, label"
    ):
        open_table(file, split_column="part")
    columns["split"][3] = ""
    write(file, columns)
    with pytest.raises(ValueError, match=r"row 3: 'split' is empty"):
        open_table(file)


@pytest.mark.parametrize("by", ["folder", "glob"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_are_splits_by_their_names(folder: Path, by: str, ending: str) -> None:
    write(folder / f"train-0.{ending}", {"path": paths(2), "label": ["cat", "dog"]})
    write(folder / f"train-1.{ending}", {"path": paths(2, 2), "label": ["cat", "dog"]})
    write(folder / f"test.{ending}", {"path": paths(4, 4), "label": LABELS})
    path = folder if by == "folder" else folder / f"*.{ending}"
    data = open_table(path, eval_fraction=None)
    assert [values(split) for split in (data.train, data.eval)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        open_table(path, eval_fraction=None, validation="validation")
    # One file or a pattern of one split is the training split.
    assert len(open_table(folder / f"train-*.{ending}").train) == 2
    assert len(open_table(folder / f"test.{ending}").train) == 2


def test_a_column_of_splits_must_agree_with_the_names_of_tables(folder: Path) -> None:
    write(folder / "train.csv", {"path": paths(4), "label": LABELS, "split": ["train"] * 4})
    write(folder / "test.csv", {"path": paths(4, 4), "label": LABELS, "split": ["Test"] * 4})
    assert len(open_table(folder, eval_fraction=None).eval) == 4
    write(folder / "train.csv", {"path": paths(4), "label": LABELS, "split": ["train", "test"] * 2})
    with pytest.raises(ValueError, match=r"train\.csv is the split 'train' by its name, but its column 'split' names"):
        open_table(folder, eval_fraction=None)
    assert len(open_table(folder, eval_fraction=None, split_column=None).train) == 4


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_one_name_written_in_two_ways_is_one_class(folder: Path, ending: str) -> None:
    names = ["caf\u00e9", "cafe\u0301", "bar", "bar"]
    data = open_table(write(folder / f"labels.{ending}", {"path": paths(4), "label": names}))
    assert data.class_names == ("bar", "caf\u00e9")


def test_names_that_do_not_begin_with_a_split_are_not_guessed_at(folder: Path) -> None:
    for name in ("my-train", "my-test"):
        write(folder / f"{name}.csv", {"path": paths(4), "label": LABELS})
    with pytest.raises(
        ValueError, match=r"my-test\.csv, \.\.\., my-train\.csv name several splits, but not at the beg"
    ):
        open_table(folder / "*.csv")
    write(folder / "train.csv", {"path": paths(4), "label": LABELS})
    with pytest.raises(ValueError, match=r"some are named by a split and others are not: my-test\.csv, train\.csv"):
        open_table(folder / "*.csv")
    assert len(open_table(folder / "my-train.csv").train) == 2


def test_labels_are_of_one_kind_in_all_tables(folder: Path) -> None:
    write(folder / "train.csv", {"path": paths(4), "label": ["01", "1", "01", "1"]})
    write(folder / "test.csv", {"path": paths(2, 4), "label": ["1", "1"]})
    data = open_table(folder, eval_fraction=None)
    assert data.class_names == ("01", "1")
    assert data.eval.targets.tolist() == [1, 1]
    write(folder / "train.jsonl", {"path": paths(4), "label": list("0101")})
    write(folder / "test.jsonl", {"path": paths(2, 4), "label": [1, 1]})
    with pytest.raises(ValueError, match=r"train\.jsonl hold labels of two kinds"):
        open_table(folder / "*.jsonl", eval_fraction=None)


def test_what_is_missing_is_told_before_training(folder: Path) -> None:
    os.mkfifo(folder / "photos" / "pipe.png")
    for name, what in (("gone.png", "is not there"), ("pipe.png", "is not a file")):
        file = write(folder / "labels.csv", {"path": [*paths(3), f"photos/{name}"], "label": LABELS})
        with pytest.raises(
            ValueError, match=rf"1 of the 4 images of .*labels\.csv are missing; the first, .*{name}, {what}"
        ):
            open_table(file)
    file = write(folder / "labels.csv", {"path": [*paths(3), ""], "label": LABELS})
    with pytest.raises(ValueError, match=r"labels\.csv, row 3: 'path' is empty"):
        open_table(file)
    for ending, nothing in (("csv", ""), ("jsonl", None), ("parquet", None)):
        file = write(folder / f"labels.{ending}", {"path": paths(4), "label": ["cat", "dog", nothing, "dog"]})
        with pytest.raises(ValueError, match="Split 'train', row 2: 'label' has no label"):
            open_table(file)


def test_an_image_is_in_one_split(folder: Path) -> None:
    write(folder / "train.csv", {"path": paths(4), "label": LABELS})
    write(folder / "test.csv", {"path": [*paths(3, 4), "photos/3.png"], "label": LABELS})
    with pytest.raises(ValueError, match=r"1 image.s. are in two splits, the same file: .*photos/3\.png"):
        open_table(folder, eval_fraction=None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file;label\n1.png;cat\n", "data.image is 'path', but .* it has file;label, as read with commas"),
        ("a.csv", "path,path,label\na,b,c\n", "has several of that name"),
        ("a.csv", "path,label\na\n", "Expected 2 columns, got 1"),
        ("a.csv", "", "cannot be read: Empty CSV file"),
        ("a.csv", "path,label\n", "Split 'train' of .* is empty"),
        ("a.tsv", "path,label\na,b\n", "it has path,label, as read with tabs"),
        (
            "a.jsonl",
            '{"path": "a", "class": 1, "size": 2}\n',
            "data.target is 'label', but .* has no such column; it has path, class, size",
        ),
        ("a.jsonl", '{"path": "a", "label": 1}\n{"path"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"path": "a", "label": 1}\n[1]\n', "row 1 is not a JSON object"),
        ("a.jsonl", '{"path": "photos/0.png", "label": 1}\n{"path": "photos/1.png", "label": "x"}\n', "cannot be read"),
        ("a.jsonl", '{"path": 3, "label": 1}\n', "Column 'path' of .* holds int64, not strings"),
        ("a.jsonl", "", "it is empty"),
        ("a.csv", b"path,label\nphotos/0.png,caf\xe9\n", "invalid UTF8 data. Tables of text have to be UTF-8"),
        ("a.jsonl", b'{"path": "caf\xe9"}\n', "Tables of text have to be UTF-8"),
    ],
)
def test_tables_that_cannot_be_read_are_explained(folder: Path, name: str, text: str | bytes, message: str) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        open_table(folder / name)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_are_found_where_there_is_one_of_each(folder: Path, ending: str) -> None:
    columns = {"species": list(LABELS) * 2, "picture": paths(8), "split": ["train"] * 6 + ["test"] * 2}
    for table in (columns, {"": list("01234567"), **columns}):
        data = open_dataset(DataSection(path=str(write(folder / f"a.{ending}", table)), validation=0), 0)
        assert (data.class_names, len(data.train), len(data.eval)) == (("cat", "dog"), 6, 2)
        image = data.train[0]["image"]["path"]
        assert (Path(image).name, data.class_names[data.train[0]["target"]]) == (Path(paths(1)[0]).name, LABELS[0])
    write(folder / f"a.{ending}", {**columns, "place": ["north", "south"] * 4})
    with pytest.raises(ValueError, match=r"data.target is 'label', but .* it has species, picture, split, place"):
        open_dataset(DataSection(path=str(folder / f"a.{ending}"), validation=0), 0)


def test_a_stream_of_a_table(folder: Path) -> None:
    write(folder / "train.csv", {"path": paths(4), "label": LABELS})
    write(folder / "test.csv", {"path": paths(4, 4), "label": LABELS})
    data = open_table(folder, eval_fraction=None, streaming=True, classes=["cat", "dog"])
    assert data.train.size == 4
    assert [sample["target"] for sample in data.eval.rows] == list(LABELS)


def test_a_table_beside_images_is_left_alone_unless_it_names_them(folder: Path, make_image_folder: Any) -> None:
    images = make_image_folder(folder / "pets")
    (images / "train.csv").write_text("a,b\n0,1\n")
    (images / "labels.csv").write_text("image,label\n")
    data = open_table(images, image="image", eval_fraction=None, eval_split="validation")
    assert len(data.train) == 32


def test_equal_bytes_in_two_splits(folder: Path) -> None:
    write(folder / "train.csv", {"path": paths(4), "label": LABELS})
    write(folder / "test.csv", {"path": paths(4, 4), "label": LABELS})
    (folder / "photos" / "5.png").write_bytes((folder / "photos" / "1.png").read_bytes())
    with pytest.raises(ValueError, match="the same bytes"):
        open_table(folder, eval_fraction=None)
    open_table(folder, eval_fraction=None, check_duplicates=False)
