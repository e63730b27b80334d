"""Files that are no images: an error that names them, or left out, counted and listed."""

import io
import json
import os
import random
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageFile

from timm_selfdistill.cli import main as cli
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.batches import Collate
from timm_selfdistill.data.decode import SkipList, SkippedImage, decode, merge_skipped, read
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.transforms import InputConfig, eval_transform
from timm_selfdistill.metrics import IGNORED, ExitMetrics
from timm_selfdistill.model import ExitOutput
from timm_selfdistill.recipe import AugmentSection, DataSection, load_recipe
from timm_selfdistill.train import evaluate_folder, train

GREY = InputConfig(1, (8, 8), (0.0,), (1.0,), "bilinear", 1.0)
STILL = AugmentSection(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def grey(value: int) -> bytes:
    """An 8 x 8 image that its value identifies."""
    return encode(Image.new("L", (8, 8), value), "PNG")


def photo() -> Image.Image:
    """Noise, of which every row of pixels needs its share of the file."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be so large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BROKEN = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404 not found</html>",
    "cut.jpg": encode(photo(), "JPEG")[:900],
    "cut.png": encode(photo(), "PNG")[:2000],
    "suspicious.png": bomb(10_000, 10_000),  # Pillow only warns of it
    "bomb.png": bomb(65_000, 65_000),
    "thread.png": encode(Image.new("L", (1, 2000), 1), "PNG"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 training and 12 test images of different grey, and among them 7 and 3 that are broken."""
    for split, count, broken in (("train", 20, tuple(BROKEN)), ("test", 12, ("empty.jpg", "text.jpg", "cut.jpg"))):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
        for index in range(count):
            path = tmp_path / "pets" / split / ("cat", "dog")[index % 2] / f"{index:02}.png"
            path.write_bytes(grey(10 * index + 5))
        for index, name in enumerate(broken):
            (tmp_path / "pets" / split / ("cat", "dog")[index % 2] / name).write_bytes(BROKEN[name])
    return tmp_path / "pets"


def load(path: Path, *, batch_size: int = 9, skipped: SkipList | None = None, **fields: Any) -> Loaders:
    own = {"workers": 0, "validation": 0.0, "on_error": "skip", "check_duplicates": False}
    section = DataSection(path=str(path), **(own | fields))
    return build_loaders(
        open_dataset(section, 0),
        section,
        STILL,
        GREY,
        batch_size=batch_size,
        accelerator_shards=(0, 1),
        seed=0,
        skipped=skipped,
    )


def content(loader: Any) -> list[tuple[list[int], list[int]]]:
    """The grey values and targets of every batch."""
    return [([round(255 * image.max().item()) for image in images], targets.tolist()) for images, targets in loader]


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_cannot_be_decoded(name: str) -> None:
    with pytest.raises(
        (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning), match=r"\w"
    ) as raised:
        decode(BROKEN[name], "RGB")
    assert "0x" not in str(raised.value), "an address in memory"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_an_error_wherever_it_ends(kind: str) -> None:
    data = encode(photo(), kind)
    whole = decode(data, "RGB")
    failures = 0
    for length in [*range(0, len(data), 37), *range(len(data) - 20, len(data))]:
        try:
            image = decode(data[:length], "RGB")
        except (OSError, SyntaxError, ValueError):
            failures += 1
        else:
            assert image.tobytes() == whole.tobytes(), "part of the image was made up"
    assert failures > 30


@pytest.mark.parametrize("workers", [0, 2])
def test_by_default_a_broken_image_stops_with_its_place(folder: Path, workers: int) -> None:
    loaders = load(folder, on_error="raise", workers=workers)
    with pytest.raises(
        ValueError, match=r"^Split 'test', row \d+, file /.*\.jpg: the image cannot be decoded: "
    ) as raised:
        list(loaders.eval)
    assert "data.on_error=skip" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def collate(use: Any, skipped: SkipList | None = None) -> Collate:
    return Collate(use, "train", "L", eval_transform(GREY), skipped or SkipList())


def samples(*contents: bytes) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": data, "path": f"{row}.png"}, "target": row, "row": row} for row, data in enumerate(contents)
    ]


def test_the_next_good_image_takes_the_place_of_a_broken_one_in_training() -> None:
    batch = samples(b"", grey(10), b"text", b"", grey(40), grey(50), b"")
    assert content([collate("training")(batch)]) == [([10, 10, 40, 40, 40, 50, 10], [1, 1, 4, 4, 4, 5, 1])]


def test_a_training_batch_without_any_good_image_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Split 'train', row 0, file 0.png: none of the 2 images of a training batch"):
        collate("training")(samples(b"", b"text"))


def test_elsewhere_a_broken_image_is_marked_as_not_to_be_counted() -> None:
    for contents in ((b"", grey(10), b"text"), (b"", b"", b"")):
        images, targets = collate("evaluation")(samples(*contents))
        assert images.shape == (3, 1, 8, 8)
        assert targets.tolist() == [
            row if data.startswith(b"\x89PNG") else IGNORED for row, data in enumerate(contents)
        ]


def test_a_missing_image_is_empty_and_a_missing_file_an_error_whatever_on_error_says(tmp_path: Path) -> None:
    assert read(None) == read({"bytes": None, "path": None}) == b""
    gone = {"image": {"bytes": None, "path": str(tmp_path / "gone.png")}, "target": 0, "row": 7}
    for use in ("training", "evaluation"):
        with pytest.raises(ValueError, match=r"row 7, file .*gone\.png: the image cannot be read: .*No such file"):
            collate(use)([gone, *samples(grey(1))])


def test_what_is_no_file_is_never_opened_whatever_on_error_says(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, what in (("pipe.png", "a named pipe"), ("zero.png", "a device")):
        sample = {"image": {"bytes": None, "path": str(tmp_path / name)}, "target": 0, "row": 7}
        with pytest.raises(ValueError, match=f"row 7, file .*{name}: .*it is not a file, but {what}"):
            collate("training")([sample, *samples(grey(1))])


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_keep_full_batches_of_good_images(folder: Path, workers: int) -> None:
    batches = content(load(folder, workers=workers).train)
    assert [len(values) for values, _ in batches] == [9, 9, 9]
    for values, targets in batches:
        assert set(values) <= {10 * index + 5 for index in range(20)}, "neither black nor grey was made up"
        assert targets == [(value - 5) // 10 % 2 for value in values]
    assert len({value for values, _ in batches for value in values}) == 20


def test_the_content_of_a_batch_does_not_depend_on_who_loads_it(folder: Path) -> None:
    assert content(load(folder, workers=0).train) == content(load(folder, workers=2).train)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_skipped_image_is_listed_once(folder: Path, tmp_path: Path, workers: int) -> None:
    for _ in range(2):  # as a run and its continuation do
        loaders = load(folder, workers=workers, skipped=SkipList(tmp_path / "run", process=1))
        for _ in range(2):
            list(loaders.train)
            list(loaders.eval)
    assert merge_skipped(tmp_path / "run") == {"training": 7, "evaluation": 3}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["skipped.jsonl"]
    entries = listed(tmp_path / "run")
    assert Counter(Path(entry["file"]).name for entry in entries if entry["use"] == "training") == Counter(
        BROKEN.keys()
    )
    rows = open_dataset(DataSection(path=str(folder), validation=0.0, check_duplicates=False), 0)
    for entry in entries:
        split = rows.train if entry["use"] == "training" else rows.eval
        assert split.name == entry["split"]
        assert split[entry["row"]]["image"]["path"] == entry["file"]
        assert entry["reason"]
    # Nothing new: the list stays as it is.
    assert merge_skipped(tmp_path / "run") == {"training": 7, "evaluation": 3}
    assert listed(tmp_path / "run") == entries


def test_lists_of_several_processes_become_one_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    image = SkippedImage("training", "train", 3, "a.png", "0" * 64, "it is empty")
    for process in range(2):
        SkipList(tmp_path, process).add(image)
    SkipList(tmp_path, 1).add(SkippedImage("training", "train", 3, "a.png", "0" * 64, "another reason"))
    SkipList(tmp_path, 1).add(SkippedImage("evaluation", "test", 3, "a.png", "0" * 64, "it is empty"))
    with (tmp_path / "skipped-0.jsonl").open("a") as file:
        file.write('{"use": "train')
    assert merge_skipped(tmp_path) == {"training": 1, "evaluation": 1}
    assert [entry["use"] for entry in listed(tmp_path)] == ["training", "evaluation"]
    assert merge_skipped(tmp_path / "no such folder") == {}


def test_the_first_skipped_image_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collate("training", SkipList(tmp_path))(samples(b"", b"text", grey(1)))
    (record,) = caplog.records
    assert "0.png" in record.getMessage()
    assert str(tmp_path / "skipped-0.jsonl") in record.getMessage()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_with_broken_bytes(tmp_path: Path, streaming: bool, workers: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    contents = [b"text", *map(grey, range(10, 100, 10)), b"", b"\x89PNG broken"]
    images = [{"bytes": data, "path": None} for data in contents]
    split = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 6}, features=features)
    for name in ("train", "test"):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
    fields = {"streaming": True, "train_size": 12} if streaming else {}
    loaders = load(tmp_path / "parquet", batch_size=6, workers=workers, skipped=SkipList(tmp_path / "run"), **fields)
    assert {value for values, _ in content(loaders.train) for value in values} <= set(range(10, 100, 10))
    evaluated = [pair for values, targets in content(loaders.eval) for pair in zip(values, targets, strict=True)]
    kept = [value for value, target in evaluated if target != IGNORED]
    assert kept == list(range(10, 100, 10))
    assert merge_skipped(tmp_path / "run") == {"training": 3, "evaluation": 3}
    rows = sorted(str(entry["row"]) for entry in listed(tmp_path / "run") if entry["use"] == "training")
    assert rows == (["None"] * 3 if streaming else ["0", "10", "11"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_in_a_damaged_file_says_so(tmp_path: Path, workers: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    generator = random.Random(0)
    images = [{"bytes": encode(Image.frombytes("L", (16, 16), generator.randbytes(256)), "PNG")} for _ in range(100)]
    split = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 50}, features=features)
    for name in ("train", "test"):
        split.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    damaged = tmp_path / "train-00000-of-00001.parquet"
    content = bytearray(damaged.read_bytes())
    middle = len(content) // 2
    content[middle - 2000 : middle + 2000] = b"\xff" * 4000
    damaged.write_bytes(content)
    loaders = load(tmp_path, workers=workers, batch_size=10, streaming=True, train_size=100)
    with pytest.raises(ValueError, match=f"^{tmp_path.name}, split 'train': the stream cannot be read on: ") as raised:
        list(loaders.train)
    assert "Traceback" not in str(raised.value)
    assert sum(len(targets) for _, targets in loaders.eval) == 100


def test_metrics_leave_out_what_is_ignored() -> None:
    logits, target = torch.randn(12, 4), torch.arange(12) % 4
    kept = torch.arange(12) % 3 > 0
    whole, ignoring = ExitMetrics(1), ExitMetrics(1)
    whole.update(ExitOutput((logits[kept],), ()), target[kept])
    broken = torch.where(kept.unsqueeze(1), logits, torch.nan)
    for part in range(0, 12, 4):
        rows = slice(part, part + 4)
        ignoring.update(ExitOutput((broken[rows],), ()), target.where(kept, IGNORED)[rows])
    assert ignoring.compute() == whole.compute() | {"num_skipped": 4}
    ignoring.update(ExitOutput((logits,), ()), torch.full((12,), IGNORED))
    with pytest.raises(ValueError, match="All 12 samples were skipped"):
        ignoring.compute()


def test_pillow_must_not_make_up_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is on"):
        load(folder)


RUN = ("data.image_size=16", "batch_size=9", "epochs=2", "precision='no'", "baseline=false", "data.validation=0.2")


def test_a_run_stops_and_goes_on_without_the_images(folder: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    # The splits hold equal images.
    command = ["train", "digits", *RUN, f"data.path={folder}", "data.check_duplicates=false", f"output_dir={run}"]
    assert cli(command) == 2
    assert "cannot be decoded" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    assert cli([*command, "data.on_error=skip"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert report["num_samples"] == 12
    skipped = report["num_skipped"]
    assert skipped["evaluation"] == 3
    assert skipped["training"] + skipped["validation"] == 7
    assert Counter(entry["use"] for entry in listed(run)) == skipped
    assert f"Images that could not be decoded, and are not counted: {skipped['training']} for training" in printed
    assert "skipped.jsonl" in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "self-distilled/validation/top1/0" in line]
    assert {line["self-distilled/validation/num_skipped"] for line in validated} == {skipped["validation"]}

    AcceleratorState._reset_state(True)
    again = evaluate_folder(run, output=tmp_path / "again")
    assert (again["num_samples"], again["num_skipped"]) == (12, {"evaluation": 3})
    assert [row["top1"] for row in again["exits"]] == [row["top1"] for row in report["exits"]]
    assert len(listed(tmp_path / "again")) == 3


def test_a_run_without_broken_images_lists_none(tmp_path: Path) -> None:
    report = train(
        load_recipe("digits", [*RUN, "epochs=1", "data.max_train=36", "data.max_eval=9", f"output_dir={tmp_path}"])
    )
    assert report["num_skipped"] == {"evaluation": 0}
    assert not list(tmp_path.glob("skipped*"))
