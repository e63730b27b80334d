"""WebDataset shards, stored and streamed."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import decode, read
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.shards import load_shards
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.recipe import AugmentSection, DataSection

GREY = InputConfig(1, (4, 4), (0.0,), (1.0,), "nearest", 1.0)
STILL = AugmentSection(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def section(path: Path | str, **fields: Any) -> DataSection:
    settings = {"validation": 0.0, "workers": 0, "image": "png", "target": "cls"} | fields
    return DataSection(path=str(path), **settings)


def open_shards(path: Path | str, **fields: Any) -> ImageData:
    return open_dataset(section(path, **fields), 0)


def loaders(path: Path | str, **fields: Any) -> Loaders:
    given = section(path, streaming=True, **fields)
    return build_loaders(open_dataset(given, 0), given, STILL, GREY, batch_size=2, accelerator_shards=(0, 1), seed=0)


def values(split: Any) -> list[int]:
    return [decode(read(split[index]["image"]), "L").getpixel((0, 0)) for index in range(len(split))]


def grey(value: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, kind)
    return buffer.getvalue()


def write(file: Path, *members: tuple[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def pairs(numbers: range, labels: str = "01") -> list[tuple[str, bytes]]:
    """The members of samples whose class is their number's, modulo the number of labels."""
    members = []
    for number in numbers:
        members += [
            (f"pets/{number:04}.png", grey(number)),
            (f"pets/{number:04}.cls", labels[number % len(labels)].encode() + b"\n"),
        ]
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Eight images to train on in two shards, four to test on in one."""
    write(tmp_path / "pets" / "train-000.tar", *pairs(range(4)))
    write(tmp_path / "pets" / "train-001.tar", *pairs(range(4, 8)))
    write(tmp_path / "pets" / "test-000.tar", *pairs(range(8, 12)))
    return tmp_path / "pets"


def test_shards_are_read_by_index(shards: Path) -> None:
    data = open_shards(shards)
    assert (data.name, data.class_names) == ("pets", ("0", "1"))
    assert [values(split) for split in (data.train, data.eval)] == [list(range(8)), list(range(8, 12))]
    assert data.eval.targets.tolist() == [0, 1, 0, 1]
    assert data.train[3]["image"]["path"] == "pets/0003.png"
    assert open_shards(shards, classes=["cat", "dog"]).class_names == ("cat", "dog")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_streamed(shards: Path, workers: int) -> None:
    built = loaders(shards, classes=2, train_size=8, workers=workers)
    images = torch.cat([images for images, _ in built.train])
    assert sorted(round(255 * image.max().item()) for image in images) == list(range(8))
    assert torch.cat([targets for _, targets in built.eval]).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("pattern", ["*.tar", "train-*.tar", "train-{000..001}.tar", "train-000.tar"])
def test_shards_are_named_by_a_pattern(shards: Path, pattern: str) -> None:
    data = open_shards(shards / pattern, **({} if pattern == "*.tar" else {"eval_fraction": 0.5}))
    assert len(data.train) == {"*.tar": 8, "train-000.tar": 2}.get(pattern, 4)
    assert data.name == "pets"


def test_folders_of_shards_are_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split / "a-test-0.tgz", *pairs(range(4)))
    data = open_shards(tmp_path, eval_split="validation")
    assert len(data.train) == len(data.eval) == 4


def test_a_tar_file_beside_images_is_left_alone(tmp_path: Path, make_image_folder: Any) -> None:
    folder = make_image_folder(tmp_path / "pets")
    for place in (folder, folder / "train", folder / "train" / "class0"):
        write(place / "train.tar", *pairs(range(2)))
    assert load_shards(folder, section(folder)) is None
    for other, count in (("notes.txt", 1), ("a.png", 0)):
        write(tmp_path / "tars" / "train.tar", *pairs(range(2)))
        (tmp_path / "tars" / "logs").mkdir(exist_ok=True)
        (tmp_path / "tars" / "logs" / other).touch()
        found = load_shards(tmp_path / "tars", section(tmp_path / "tars"))
        assert (0 if found is None else len(found.rows)) == count


def test_a_changed_shard_is_read_anew(shards: Path) -> None:
    assert values(open_shards(shards).eval) == [8, 9, 10, 11]
    write(shards / "test-000.tar", *pairs(range(20, 24)))
    os.utime(shards / "test-000.tar", (1, 1))
    assert values(open_shards(shards).eval) == [20, 21, 22, 23]


def test_images_and_labels_of_several_kinds(tmp_path: Path) -> None:
    members = []
    for number, kind in enumerate(("jpeg", "png", "webp", "bmp")):
        ending = {"jpeg": "JPG"}.get(kind, kind)
        about = json.dumps({"label": number % 2, "more": {"name": ("cat", "dog")[number % 2]}}).encode()
        members += [(f"{number}.json", about), (f"{number}.{ending}", grey(90, kind))]
        members += [(f"{number}.txt", b"dog\n" if number % 2 else b"01\n"), (f"._{number}.png", b"x")]
        members += [(f"__{number}__.png", b"x"), (f"{number}.seg.png", b"x")]
    file = write(tmp_path / "train.tar", *members)

    def read_all(**fields: Any) -> ImageData:
        data = open_shards(file, eval_fraction=0.5, **fields)
        assert all(abs(value - 90) < 3 for value in values(data.train) + values(data.eval))
        return data

    assert read_all(image="image", target="json.label").class_names == ("0", "1")
    assert read_all(image="jpg;png;webp;bmp", target="json.more.name").class_names == ("cat", "dog")
    assert read_all(image="image", target="cls;txt").class_names == ("01", "dog")
    with pytest.raises(ValueError, match=r"train\.tar, sample '0': there is no member 'png'; there are json, jpg, txt"):
        open_shards(file, eval_fraction=0.5, target="txt")


@pytest.mark.parametrize(
    ("members", "target", "message"),
    [
        ([("0.png", grey(0))], "cls", "sample '0': there is no member 'cls'; there are png"),
        ([("0.png", grey(0)), ("0.json", b"{")], "json.label", "'json.label' cannot be read from the member 'json'"),
        ([("0.png", grey(0)), ("0.json", b"{}")], "json.label", "'json.label' cannot be read from the member 'json'"),
        ([("0.png", grey(0)), ("0.json", b'{"a": 0.5}')], "json.a", "'json.a' is 0.5; labels are integers or strings"),
        ([*pairs(range(3)), *pairs(range(3, 4), "xx")], "cls", "sample 'pets/0003': 'cls' is 'x', but the first label"),
        ([*pairs(range(2)), ("pets/0001.png", grey(1))], "cls", "the sample 'pets/0001' has two members 'png'"),
        ([], "cls", "holds no sample"),
    ],
)
def test_samples_that_cannot_be_read_are_explained(tmp_path: Path, members: Any, target: str, message: str) -> None:
    file = write(tmp_path / "train.tar", *members)
    with pytest.raises(ValueError, match=message):
        open_shards(file, eval_fraction=0.5, target=target)


def test_damaged_shards_are_explained(shards: Path) -> None:
    (shards / "test-000.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"The shard .*test-000\.tar cannot be read"):
        open_shards(shards)
    (shards / "test-000.tar").unlink()
    whole = (shards / "train-001.tar").read_bytes()
    end = whole.rstrip(b"\0")
    # Within a header, within a member, and at the border of a member; then joined to another one.
    for content, what in (
        (whole[: 2 * 1024 * 3 + 100], "ends without the mark"),
        (whole[:1100], "there is no member|cannot be read|ends without the mark"),
        (whole[: len(end) + -len(end) % 512], "ends without the mark"),
        (whole + whole, "holds more after the mark of its end"),
    ):
        (shards / "train-001.tar").write_bytes(content)
        with pytest.raises(ValueError, match=what) as raised:
            open_shards(shards, eval_fraction=0.5)
        assert "train-001.tar" in str(raised.value)


def test_a_stream_without_the_names_of_its_classes_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"a stream cannot tell its classes.*: set data\.classes"):
        open_shards(shards, streaming=True)


def test_a_label_outside_of_the_classes_stops_a_stream(tmp_path: Path) -> None:
    for labels, classes, label in (("012", 2, "2"), ("ab", ["b", "c"], "'a'")):
        write(tmp_path / "train.tar", *pairs(range(4), labels))
        write(tmp_path / "test.tar", *pairs(range(4), labels))
        built = loaders(tmp_path, classes=classes, train_size=4)
        with pytest.raises(ValueError, match=rf"Split 'test', file pets/000\d\.png: the label is {label}, which is"):
            list(built.eval)
