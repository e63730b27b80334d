"""`init` looks at a data set and writes a recipe; `recipes` lists, prints and copies the shipped ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from timm_selfdistill.cli import main
from timm_selfdistill.data.survey import Survey, survey
from timm_selfdistill.recipe import DataSection, load_recipe, read_shipped
from timm_selfdistill.starter import choose_start
from timm_selfdistill.train import train

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parquet(path: Path, counts: list[int], side: int = 40) -> Path:
    """Write images of so many classes, each of so many images, as the split "train"."""
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    images = [Image.new("RGB", (side + 8, side), (number % 256, label, 0)) for number, label in enumerate(labels)]
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=list("abcdef")[: len(counts)])}
    )
    path.mkdir()
    datasets.Dataset.from_dict({"img": images, "kind": labels}, features).to_parquet(path / "train.parquet")
    return path


def test_a_folder_gives_a_recipe_that_trains(
    make_image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_image_folder(Path("pets"), classes=3, train=20)
    assert main(["init", "pets"]) == 0
    said = capsys.readouterr().out
    for text in (
        "54 for training ('train'), 6 for validation (held out of 'train'), 15 for evaluation ('validation')",
        "splits    train, validation",
        "classes   3: class0, class1, class2",
        "balance   20 (class0) to 20 (class0) images a class",
        "sizes     24 x 24 pixels in the middle, sides from 24 to 24",
        "timm-selfdistill train pets.yaml",
    ):
        assert text in said
    recipe = load_recipe("pets.yaml")
    assert (recipe.data.eval_split, recipe.data.validation, recipe.data.image_size) == ("validation", 0.1, 32)
    assert (recipe.model.name, recipe.model.small_stem, recipe.model.pretrained) == ("resnet18", True, False)
    assert recipe.data.sampling == "shuffled"
    assert len(Path("pets.yaml").read_text().splitlines()) < 24
    channels = "model.kwargs={channels: [4, 8, 8, 8]}"
    small = ["epochs=1", "schedule.warmup_epochs=0", "data.workers=0", "data.max_train=16", "precision='no'", channels]
    report = train(load_recipe("pets.yaml", small))
    assert report["num_samples"] == 15

    before = Path("pets.yaml").read_bytes()
    assert main(["init", "pets", "--model", "resnet50"]) == 2
    assert "pets.yaml is there already: give another --output, or --force to replace it." in capsys.readouterr().err
    assert Path("pets.yaml").read_bytes() == before
    assert main(["init", "pets", "--model", "convnext_atto", "--force"]) == 0
    assert (load_recipe("pets.yaml").model.name, load_recipe("pets.yaml").model.pretrained) == ("convnext_atto", True)
    assert main(["init", "pets", "--model", "resnet81", "--output", "other.yaml"]) == 2
    assert "must be the name of a timm model, received 'resnet81'; did you mean 'resnet" in capsys.readouterr().err


def test_columns_splits_and_uneven_classes_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    parquet(Path("uneven"), [40, 20, 3])
    assert main(["init", "uneven", "--output", "new/a.yaml"]) == 0
    section = load_recipe("new/a.yaml").data
    assert (section.image, section.target, section.sampling) == ("img", "kind", "balanced")
    assert (section.eval_fraction, section.validation) == (0.2, 0.1)
    assert "balance   3 (c) to 40 (a) images a class" in capsys.readouterr().out
    found = survey(DataSection(path="uneven"))
    assert found.counts.tolist() == [40, 20, 3]
    assert (found.side, found.sizes[0], found.grey) == (40, (48, 40), False)


def test_classes_too_small_to_hold_images_out_are_all_trained_on(make_image_folder: Callable[..., Path]) -> None:
    make_image_folder(Path("few"), classes=2, train=3)
    (Path("few") / "train" / "class0" / "1.png").unlink()
    (Path("few") / "train" / "class0" / "2.png").unlink()
    found = survey(DataSection(path="few"))
    assert (found.section.eval_split, found.section.validation) == ("validation", 0.0)
    assert found.counts.tolist() == [1, 3]


def test_a_test_split_without_labels_is_not_reported_on() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    Path("shop").mkdir()
    for split, labels in (("train", [0, 1] * 20), ("validation", [0, 1] * 4), ("test", [-1] * 8)):
        images = [Image.new("L", (32, 32), number) for number in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
        rows.to_parquet(Path("shop") / f"{split}.parquet")
    found = survey(DataSection(path="shop"))
    assert (found.section.eval_split, found.section.validation, found.splits) == (
        "validation",
        0.1,
        ("train", "validation", "test"),
    )
    assert found.grey


def test_what_the_recipe_says_of_the_data_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    parquet(Path("uneven"), [12, 12])
    assert main(["init", "uneven", "validation=0.25", "eval_fraction=0.5"]) == 0
    section = load_recipe("uneven.yaml").data
    assert (section.validation, section.eval_fraction) == (0.25, 0.5)
    assert main(["init", "nothing-there/at-all/here"]) == 2
    assert "there is no such folder or file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "images", "model", "has_gpu", "expected"),
    [
        (28, 1_000, None, False, {"name": "resnet18", "small_stem": True, "image_size": 32, "pretrained": False}),
        (64, 1_000, None, True, {"name": "resnet18", "small_stem": True, "image_size": 64}),
        (500, 1_000, None, False, {"name": "resnet18", "pretrained": True, "image_size": 128, "epochs": 15}),
        (500, 1_000, None, True, {"name": "convnext_tiny", "pretrained": True, "image_size": 224, "epochs": 30}),
        (100, 1_000, "resnet50", True, {"image_size": 128, "small_stem": False, "batch_size": 64}),
        (500, 40, "vit_tiny_patch16_224", False, {"image_size": 224, "pretrained": True, "batch_size": 4}),
        (500, 100_000, "cifar_wrn20_8", False, {"image_size": 32, "pretrained": False, "batch_size": 128}),
    ],
)
def test_model_size_and_length_suit_images_and_machine(
    side: int, images: int, model: str | None, has_gpu: bool, expected: dict[str, Any]
) -> None:
    class Found(Survey):
        side = property(lambda self: side)  # type: ignore[assignment]
        train = property(lambda self: range(images))  # type: ignore[assignment]

    start = choose_start(Found(*[None] * 6), model, has_gpu=has_gpu)  # type: ignore[arg-type]
    assert {key: getattr(start, key) for key in expected} == expected


def test_recipes_are_printed_and_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "digits"]) == 0
    assert capsys.readouterr().out == read_shipped("digits")
    assert main(["recipes", "digits", "--copy"]) == 0
    assert Path("digits.yaml").read_text() == read_shipped("digits")
    assert main(["recipes", "digits", "--copy", "mine.yaml"]) == 0
    assert load_recipe("mine.yaml").data == load_recipe("digits").data
    assert main(["recipes", "digits", "--copy", "mine.yaml"]) == 2
    assert main(["recipes", "digit"]) == 2
    assert main(["recipes", "--copy"]) == 2
    errors = capsys.readouterr().err
    assert "mine.yaml is there already" in errors
    assert "no shipped recipe 'digit'; shipped are" in errors
    assert "did you mean 'digits'?" in errors
    assert "--copy needs the name of a recipe" in errors
