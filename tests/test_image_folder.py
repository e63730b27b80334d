"""Folders of images: what is a split, what a class, which files are read, and what is left out."""

import logging
import os
import socket
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from timm_selfdistill.data import ImageData, ImageSplit, StreamSplit, open_dataset
from timm_selfdistill.data.decode import image_endings
from timm_selfdistill.data.image_folder import FolderScan, find_images
from timm_selfdistill.recipe import DataSection, load_recipe

_DRAWN = np.random.default_rng(0)
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
PETS = {"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2}


def image() -> Image.Image:
    """An image that is like no other one."""
    return Image.fromarray(_DRAWN.integers(0, 256, (6, 6, 3), dtype=np.uint8))


def make(root: Path, folders: Mapping[str, int]) -> Path:
    """Write so many images into each folder: FOLDER/p0.png, FOLDER/p1.png, ..."""
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image().save(root / folder / f"p{index}.png")
    return root


def section(path: Path | str, **fields: Any) -> DataSection:
    return DataSection(path=str(path), **({"workers": 0, "validation": 0.0} | fields))


def read(path: Path | str, **fields: Any) -> ImageData:
    return open_dataset(section(path, **fields), 0)


def files(split: ImageSplit | StreamSplit | None) -> list[str]:
    """The last three parts of the paths of a split's images."""
    assert split is not None
    rows = split.rows if isinstance(split, StreamSplit) else split.rows.select(split.indices)
    return ["/".join(Path(row["image"]["path"]).parts[-3:]) for row in rows]


@pytest.mark.parametrize(
    ("train", "held_out", "fields"),
    [
        ("train", "test", {}),
        ("Train", "TEST", {}),
        ("train", "val", {"eval_split": "validation"}),
        ("train", "Valid", {"eval_split": "val"}),
        ("TRAIN", "Validation", {"eval_split": "valid"}),
        ("train", "holdout", {"eval_split": "holdout"}),
        ("train", "Hold-out 2", {"eval_split": "hold-out 2"}),
        ("a", "b", {"train_split": "a", "eval_split": "b"}),
    ],
)
@pytest.mark.parametrize(
    "word", ["railway train station", "bullet_train", "train", "test_tube", "dev board", "eval", "val"]
)
def test_only_the_first_folders_name_splits(
    tmp_path: Path, train: str, held_out: str, fields: dict[str, Any], word: str
) -> None:
    make(tmp_path, {f"{train}/{word}": 5, f"{train}/zebra": 4, f"{held_out}/{word}": 3, f"{held_out}/zebra": 2})
    data = read(tmp_path, **fields)
    assert data.class_names == (word, "zebra")
    assert (len(data.train), len(data.eval)) == (9, 5)
    assert all(file.startswith(f"{train}/") for file in files(data.train))
    assert all(file.startswith(f"{held_out}/") for file in files(data.eval))
    assert np.bincount(data.eval.targets).tolist() == [3, 2]


@pytest.mark.parametrize(
    "names", [("bus", "bullet_train", "train_station"), ("bus", "train"), ("bus", "test", "train")]
)
def test_where_only_some_names_are_those_of_splits_they_are_classes(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, dict.fromkeys(names, 6))
    os.rename(tmp_path / "bus" / "p0.png", tmp_path / "bus" / "ILSVRC2012_val_00000001.png")
    with caplog.at_level(logging.INFO, "timm_selfdistill.data"):
        data = read(tmp_path, eval_fraction=0.5)
    assert data.class_names == tuple(sorted(names))
    assert len(data.train) + len(data.eval) == 6 * len(names)
    words = [name for name in sorted(names) if name in ("train", "test")]
    too = f", {', '.join(map(repr, words))} too" if words else ""
    assert f"read as class folders{too}" in caplog.text


@pytest.mark.parametrize(
    ("folders", "fields", "message"),
    [
        ({**PETS, "old/train/cat": 2}, {}, r"'test', which looks like a split .* beside it 'old', named like no split"),
        ({**PETS, "extra": 2}, {}, "beside it 'extra'"),
        ({"train/cat": 2, "train/dog": 2, "holdout/cat": 2}, {}, "beside it 'holdout'.*name them in"),
        ({"train/cat": 2, "train/dog": 2, "old/cat": 2}, {"eval_fraction": 0.5}, "beside it 'old'"),
        ({**PETS, "val/cat": 1, "Valid/cat": 1}, {}, "'Valid' and 'val' in .* are both the split 'validation'"),
        (
            {**PETS, "train": 3},
            {},
            r"train' holds 3 image\(s\) \('p0.png', 'p1.png', 'p2.png'\) beside the class folders",
        ),
        ({"train": 4, "test": 2}, {}, "but no class folders.*CLASS/p0.png"),
        ({"cat": 2, "dog": 2, ".": 1}, {"eval_fraction": 0.5}, r"holds 1 image\(s\).*beside the class folders 'cat'"),
        ({".": 5}, {"eval_fraction": 0.5}, "but no class folders"),
        ({"train/cat": 4, "test/cat": 2}, {}, "one class folder only .'cat'.; 2 classes are needed"),
        (
            {"flowers/train/cat": 4, "flowers/test/cat": 2},
            {"eval_fraction": 0.5},
            "one class folder only .'flowers'..*If 'test', 'train' in it",
        ),
        ({"cat": 3, "dog": 3}, {}, r"no split 'test'; it has train\..*eval_fraction.*read as classes \('cat', 'dog'\)"),
        ({**PETS, "test/cat": 0, "test/dog": 0}, {}, "Split 'test' of .* is empty"),
        ({**PETS, "val/cat": 1}, {"eval_split": "val", "validation": "validation"}, "are one split of .*'validation'"),
        ({"train": 0, "test/cat": 1, "test/dog": 1}, {}, "Split 'train' of .* is empty"),
        ({}, {}, "There is no image in"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, folders: dict[str, int], fields: dict[str, Any], message: str
) -> None:
    make(tmp_path, folders)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **fields)


def test_folders_without_images_beside_splits_are_named_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, {**PETS, "val/fox": 2, "annotations": 0, "__MACOSX/train": 1, ".git": 0})
    (tmp_path / "annotations" / "a.xml").write_text("<a/>")
    (tmp_path / "README.md").write_text("pets")
    image().save(tmp_path / "logo.png")
    with caplog.at_level(logging.INFO, "timm_selfdistill.data"):
        data = read(tmp_path)
    assert data.class_names == ("cat", "dog")
    told, line = [record.getMessage() for record in caplog.records]
    assert told == f"Left out of {tmp_path}: 1 beside the splits ('logo.png')."
    assert line == (
        f"{tmp_path.name}: 8 images of 'train', 4 of 'test'; 2 classes ('cat', 'dog'); no split and not read: "
        "'annotations'; not used: 'validation'; left out: 2 hidden ('.git', '__MACOSX'), 1 not an image ('README.md')."
    )


def test_the_class_is_the_first_folder_and_deeper_ones_belong_to_it(tmp_path: Path) -> None:
    make(
        tmp_path,
        {"train/cat/cam1/day": 2, "train/cat/cam2": 2, "train/cat": 1, "train/dog/train": 3, "test/dog/val": 2},
    )
    data = read(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert np.bincount(data.train.targets).tolist() == [5, 3]
    assert data.eval.targets.tolist() == [1, 1]


def test_rows_are_in_the_order_of_classes_and_names(tmp_path: Path) -> None:
    make(tmp_path, {"train/dog": 3, "train/cat": 3, "test/cat": 1})
    data = read(tmp_path)
    assert files(data.train) == [f"train/{name}/p{index}.png" for name in ("cat", "dog") for index in range(3)]


@pytest.mark.parametrize("name", ["a [b] * c?", "ünï cödé", "images", "train"])
def test_any_path_can_be_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / name, {"train/c[1]": 2, "train/d*": 2, "test/c[1]": 1})
    monkeypatch.chdir(tmp_path)
    for path in (root, f"./{name}", f"{name}/", f"./{name}/../{name}"):
        data = read(path)
        assert data.class_names == ("c[1]", "d*")
        assert data.name == name
        assert Path(data.train.rows[0]["image"]["path"]).is_absolute()


def test_links_to_folders_and_files_are_read_and_circles_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = make(tmp_path / "elsewhere", {"fox/old": 3, "test/cat": 1, "test/fox": 2, "one": 1})
    root = make(tmp_path / "pets", {"train/cat": 2})
    (root / "train" / "fox").symlink_to(elsewhere / "fox")
    (root / "test").symlink_to(elsewhere / "test")
    (root / "train" / "cat" / "linked.png").symlink_to(elsewhere / "one" / "p0.png")
    (root / "train" / "cat" / "gone.png").symlink_to(elsewhere / "nothing.png")
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "all").symlink_to(root)
    (elsewhere / "fox" / "old" / "up").symlink_to(elsewhere / "fox")
    data = read(root)
    assert np.bincount(data.train.targets).tolist() == [3, 3]
    assert len(data.eval) == 3
    assert "1 not a file ('train/cat/gone.png')" in caplog.text
    assert "3 read already ('train/cat/again', 'train/cat/all', 'train/fox/old/up')" in caplog.text


def test_every_image_that_can_be_decoded_is_read(tmp_path: Path) -> None:
    root = make(tmp_path, {"train/cat": 1, "test/cat": 1, "test/fox": 1, "train/__background__": 1})
    fox = root / "train" / "fox"
    fox.mkdir()
    names = [
        "a.avif",
        "b.JPG",
        "c.Jpeg",
        "d.WebP",
        "e.tif",
        "f.gif",
        "g.jp2",
        "h.bmp",
        "i.ppm",
        "j.jfif",
        "k.qoi",
        "l.tga",
    ]
    for name in names:
        image().save(fox / name)
    for name in ("m.heic", "n", "o.bin", "p.jpg~", "q.001", "r.png.bak", "s.JXL"):
        image().save(fox / "t.png")
        (fox / "t.png").rename(fox / name)
        names.append(name)
    (fox / "u.jpg").write_bytes(b"")  # what becomes of it, data.on_error says
    data = read(root)
    assert data.class_names == ("__background__", "cat", "fox")
    assert files(data.train)[2:] == [f"train/fox/{name}" for name in sorted([*names, "u.jpg"])]


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, PETS)
    folder = tmp_path / "train" / "cat"
    for name in (
        "p0.xml",
        "p0.txt",
        "p0.json",
        "p0.csv",
        "p0.npy",
        "notes.parquet",
        ".DS_Store",
        "Thumbs.db",
        "._p0.png",
    ):
        (folder / name).write_text("a,b\n0,1\n")
    for name in ("drawing.svg", "page.PDF", "figure.eps"):
        (folder / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / "movie.mp4").write_bytes(b"\0\0\0 ftypisom")
    (folder / "figure").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    (folder / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "socket.png"))
        with caplog.at_level(logging.INFO, "timm_selfdistill.data"):
            data = read(tmp_path)
    assert len(data.train) == 8
    warning, line = caplog.records
    assert warning.levelno == logging.WARNING
    assert "4 not a file ('train/cat/pipe', 'train/cat/pipe.png', 'train/cat/socket.png', ...)" in warning.getMessage()
    assert "2 unknown ('train/cat/figure', 'train/cat/movie.mp4')" in warning.getMessage()
    assert "3 vector format ('train/cat/drawing.svg'" in warning.getMessage()
    assert line.levelno == logging.INFO
    assert "3 hidden ('train/cat/.DS_Store', 'train/cat/._p0.png', 'train/cat/Thumbs.db')" in line.getMessage()
    assert "6 not an image ('train/cat/notes.parquet', 'train/cat/p0.csv'" in line.getMessage()


def test_annotations_beside_every_image_do_not_matter(tmp_path: Path) -> None:
    make(tmp_path, PETS)
    for path in list(tmp_path.rglob("*.png")):
        for ending in (".xml", ".txt", ".json", ".csv", ".npy"):
            path.with_suffix(ending).write_text("{}" if ending == ".json" else "a,b\n0,1\n")
    data = read(tmp_path)
    assert (len(data.train), len(data.eval)) == (8, 4)


def test_a_name_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    make(tmp_path, PETS)
    os.rename(tmp_path / "train" / "cat", os.fsencode(tmp_path / "train") + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"The name b'.*/train/caf\\xe9' is not UTF-8: rename it"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("cat", "dog"), ("cat", "Dog"), r"Split 'test' has 1 class folder.*'Dog' \(is it 'dog'\?\)"),
        (("cat", "dog"), ("cat", "dgo"), r"'dgo' \(is it 'dog'\?\)"),
        (("cat", "dog"), ("cat", "dog "), r"'dog ' \(is it 'dog'\?\)"),
        (
            ("n01", "n02"),
            ("cat", "dog"),
            r"2 class folder.*has not: 'cat', 'dog'\. The training split has 'n01', 'n02'",
        ),
        (("cat", "dog"), ("cat", "fox"), "has not: 'fox'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_classes_that_training_does_not_know_are_named(
    tmp_path: Path, train: tuple[str, ...], test: tuple[str, ...], message: str, streaming: bool
) -> None:
    make(tmp_path, {f"train/{name}": 2 for name in train} | {f"test/{name}": 1 for name in test})
    with pytest.raises(ValueError, match=message):
        read(tmp_path, streaming=streaming)


def test_names_are_equal_after_unicode_normalisation(tmp_path: Path) -> None:
    make(tmp_path, {"train/cat": 2, f"train/{NFC}": 2, f"train/{NFD}": 3, "test/cat": 1, f"test/{NFD}": 2})
    data = read(tmp_path)
    assert data.class_names == (NFC, "cat")
    assert np.bincount(data.train.targets).tolist() == [5, 2]
    assert np.bincount(data.eval.targets).tolist() == [2, 1]


def test_a_class_without_a_test_image_is_nothing_to_complain_of(tmp_path: Path) -> None:
    make(tmp_path, {**PETS, "train/fox": 2})
    data = read(tmp_path)
    assert data.class_names == ("cat", "dog", "fox")
    assert set(data.eval.targets.tolist()) == {0, 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_without_a_training_image_is_named_and_can_be_allowed(tmp_path: Path, streaming: bool) -> None:
    make(tmp_path, {**PETS, "train/fox": 0, "test/fox": 1})
    with pytest.raises(ValueError, match=r"1 class\(es\) have no image in the training split 'train': 'fox'.*nothing"):
        read(tmp_path, streaming=streaming)
    (tmp_path / "train" / "fox" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"fox' holds 1 not an image \('fox/a.txt'\)"):
        read(tmp_path, streaming=streaming)
    data = read(tmp_path, streaming=streaming, allow_empty_classes=True)
    assert data.class_names == ("cat", "dog", "fox")


def test_a_split_that_is_only_evaluated_has_the_classes_of_training(tmp_path: Path) -> None:
    make(tmp_path, {"train/cat": 2, "train/dog": 2, "test/dog": 2})
    only = section(tmp_path, allow_empty_classes=True).model_copy(update={"train_split": "test"})
    data = open_dataset(only, 0)
    assert data.class_names == ("cat", "dog")
    assert data.eval.targets.tolist() == [1, 1]


def test_files_beside_the_images_that_are_data_sets_too_are_refused(tmp_path: Path) -> None:
    make(tmp_path, PETS)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds images and the file 'train.parquet': to read the images"):
        read(tmp_path)


def test_a_folder_of_archives_tells_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"There is no image in .*but 1 unknown \('train/images.zip'\)"):
        read(tmp_path)


def test_a_stream_knows_its_length_and_is_the_same(tmp_path: Path) -> None:
    make(tmp_path, PETS)
    plain, stream = read(tmp_path), read(tmp_path, streaming=True)
    assert isinstance(stream.train, StreamSplit)
    assert (stream.train.size, stream.eval.size) == (8, 4)
    assert files(stream.train) == files(plain.train)
    assert [row["target"] for row in stream.train.rows] == plain.train.targets.tolist()


def test_the_same_images_stand_in_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, {f"train/c{index}": 5 for index in range(7)})
    with caplog.at_level(logging.INFO, "timm_selfdistill.data"):
        read(tmp_path, eval_fraction=0.2, validation=0.4)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{tmp_path.name}: 17 images of 'train', 11 held out of it for validation, 7 held out of it for evaluation; "
        "7 classes ('c0', 'c1', 'c2', 'c3', 'c4', ...)."
    )


def test_images_are_opened_only_where_the_name_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"cat": 2})
    (tmp_path / "cat" / "a.txt").write_text("")
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened a file"))
    assert len(find_images(str(tmp_path), FolderScan())) == 2


def test_endings_are_those_that_pillow_decodes_itself() -> None:
    assert {".png", ".jpg", ".jpeg", ".avif", ".webp", ".tif", ".heic"} <= image_endings()
    assert not {".eps", ".ps", ".pdf", ".svg", ".wmf", ".emf", ".h5", ".mpg", ".txt"} & image_endings()


def test_digits_have_every_class_whatever_is_drawn() -> None:
    assert len(open_dataset(load_recipe("digits", ["data.max_train=12"]).data, 0).class_names) == 10


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, PETS)
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"The folder '.*/dog' cannot be read: Permission denied\."):
        read(tmp_path)
