"""All names in a recipe are checked together, before data is opened or a model is downloaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from timm_selfdistill.cli import main
from timm_selfdistill.recipe import RecipeError, list_recipes, load_recipe
from timm_selfdistill.train import run, train
from timm_selfdistill.train.refusals import all_problems, recipe_problems


def test_all_wrong_names_come_together(
    tmp_path: Path, make_image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_image_folder(tmp_path / "pets")
    words = ["model.name=resnet81", "exits.head=botleneck", "loss.preset=byot-iccv2018", "loss.teacher=deepes"]
    words += [
        "optimizer.name=adamv",
        "schedule.name=cosin",
        f"data.path={folder}",
        "data.eval_split=tst",
        "data.val=vl",
    ]
    assert main(["train", "digits", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: Recipe digits has 7 problems:"
    expected = (
        ("schedule.name: must be 'cosine', ", "received 'cosin'; did you mean 'cosine'?"),
        ("exits.head: unknown, received 'botleneck'; known are auto, ", "did you mean 'bottleneck'?"),
        ("loss.preset: unknown, received 'byot-iccv2018'; known are ", "did you mean 'byot-iccv2019'"),
        ("loss.teacher: unknown, received 'deepes'; ", "did you mean 'deepest'"),
        ("optimizer.name: unknown, received 'adamv'; ", "did you mean 'adam"),
        ("model.name: must be the name of a timm model, received 'resnet81'; did you mean ", "'resnet"),
    )
    for start, end in expected:
        assert any(line.strip().startswith(start) and end in line for line in lines), start
    data = next(line for line in lines if line.strip().startswith("data: "))
    assert "has no split 'tst' and no split 'vl'; it has train, validation." in data


@pytest.mark.parametrize("name", list_recipes())
def test_the_shipped_recipes_have_no_wrong_name(name: str) -> None:
    assert recipe_problems(load_recipe(name).model_dump()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["exits.points=[layer1, layer9, 7]"],
            r"no module 'layer9'; did you mean 'layer.*\n.* 5 stages, 0 to 4, .* 7",
        ),
        (["exits.points=[blocks]"], "resnet18 has no module 'blocks'; it has conv1, bn1, act1"),
        (
            ["model.name=resnet18.a1_in1000"],
            "model.name: has no weights 'a1_in1000'; resnet18 has a1_in1k, .* did",
        ),
        (
            ["model.name=cifar_wrn20_8", "model.pretrained=true"],
            "model.pretrained: must be false, as timm has no w",
        ),
        (["teacher={name: resnet81}"], "teacher.name: must be the name of a timm model"),
        (
            ["teacher={name: resnet18, divergence: kll}"],
            "teacher.divergence: unknown, received 'kll'.* mean 'kl'",
        ),
    ],
)
def test_what_is_wrong_is_said_before_data_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(run, "open_dataset", lambda *_: pytest.fail("opened"))
    with pytest.raises(RecipeError, match=message):
        train(load_recipe("digits", ["model.kwargs={in_chans: 1}", f"output_dir={tmp_path}", *overrides]))


def test_right_names_are_taken_as_timm_takes_them() -> None:
    recipe = load_recipe("digits", ["optimizer.name=lookahead_AdamW", "exits.points=[layer1, 2, 0.7]"])
    assert all_problems(recipe.model_dump()) == []
    own = "{pretrained_cfg_overlay: {file: weights.safetensors}}"
    recipe = load_recipe("digits", ["model.name=cifar_wrn20_8", "model.pretrained=true", f"model.kwargs={own}"])
    assert recipe_problems(recipe.model_dump()) == []
    assert recipe_problems({"model": {"name": 3}, "loss": [], "exits": {"points": "a"}}) == []
