"""An image that is in two splits is found, by its file or by its bytes."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from timm_selfdistill.data import file_rows, open_dataset
from timm_selfdistill.recipe import DataSection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three splits of two classes; no two files are equal, all have one size and one end."""
    for number, split in enumerate(("train", "val", "test")):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                start = f"{number} {name} {index}".encode()
                (tmp_path / split / name / f"{index}.png").write_bytes(start + bytes(9000 - len(start)))
    return tmp_path


def check(folder: Path, **fields: object) -> None:
    section = DataSection(path=str(folder), **({"validation": "val"} | fields))
    open_dataset(section, 0)


def test_different_files_of_one_size_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(folder)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("train/cat/1.png", "test/cat/x.png"), ("train/cat/1.png", "test/dog/x.png"), ("test/dog/2.png", "val/dog/0.jpg")],
)
def test_equal_bytes_are_refused_unless_they_are_allowed(folder: Path, one: str, other: str) -> None:
    shutil.copy(folder / one, folder / other)
    with pytest.raises(ValueError, match=rf"1 image\(s\) are in two splits, the same bytes: '{one}' and '{other}'\."):
        check(folder)
    check(folder, check_duplicates=False)
    check(folder, eval_fraction=0.4, validation=0.0)


@pytest.mark.parametrize("compared", [True, False])
def test_a_link_to_a_file_of_another_split_is_refused(folder: Path, compared: bool) -> None:
    (folder / "test/cat/x.png").symlink_to(folder / "train/cat/1.png")
    with pytest.raises(ValueError, match=r"the same file: 'train/cat/1.png' and 'test/cat/x.png'\. .*in one split\.$"):
        check(folder, check_duplicates=compared)


def test_a_split_folder_that_is_a_link_to_another_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to(folder / "val")
    with pytest.raises(ValueError, match=r"6 image\(s\) are in two splits, the same file: 'test/cat/0.png' and 'val/"):
        check(folder, check_duplicates=False)


def test_what_is_under_several_classes_is_warned_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("train/cat", "train/dog", "test/cat"):
        (folder / path / "empty tile.png").write_bytes(bytes(9000))
    check(folder)
    assert "3 images are in two splits and under several classes of one" in caplog.text
    assert "'train/cat/empty tile.png'" in caplog.text


def test_empty_files_and_copies_inside_a_split_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("train/cat", "test/cat"):
        (folder / path / "empty.png").write_bytes(b"")
    shutil.copy(folder / "train/cat/1.png", folder / "train/cat/copy.png")
    check(folder)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_only_files_of_equal_size_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(bytes(100 + number))
    monkeypatch.setattr(file_rows, "_digest_of_end", lambda path: pytest.fail("read a file"))
    check(folder)


def test_only_files_with_the_same_end_are_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(bytes(9000) + bytes([number]))
    monkeypatch.setattr(file_rows, "_digest", lambda path: pytest.fail("read a whole file"))
    check(folder)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    files = {"a": [str(folder / "gone.png")], "b": [str(folder / "test/cat/1.png")]}
    splits = {name: file_rows.FileSplit(paths, np.array([0])) for name, paths in files.items()}
    with pytest.raises(ValueError, match=r"The image '.*gone.png' cannot be read: No such file"):
        file_rows.check_no_shared_images(splits, str(folder), compare_bytes=False)


def test_only_the_first_process_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(folder / "train/cat/1.png", folder / "test/cat/x.png")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    check(folder)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(ValueError, match="the same bytes"):
        check(folder)
