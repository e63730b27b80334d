"""Losses side by side: what a comparison trains, skips and says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_train import SMALL, small_recipe

from timm_selfdistill.cli import main as cli
from timm_selfdistill.compare import compare, list_variants, with_loss
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.report.comparison_page import Comparison, draw_comparison, format_comparison, summarize
from timm_selfdistill.train import build_loss, train


def report(seed: int, *top1: float | None, seconds: float = 60.0) -> Any:
    """A report of two exits, the backbone and the ensemble, as far as a comparison reads it."""
    names = ("layer1", "layer2", "fc")
    return {
        "exits": [{"name": name, "top1": value} for name, value in zip(names, top1, strict=False)],
        "ensemble": {"top1": top1[3]},
        "train_seconds": {"self-distilled": seconds},
        "seed": seed,
        "backbone": "resnet18",
        "dataset": "digits, test",
        "num_samples": 360,
        "versions": {"torch": "2"},
        "device": "cpu",
    }


def summary(**losses: list[Any]) -> Comparison:
    reports = {name.replace("_", "-"): runs for name, runs in losses.items()}
    seeds = [run["seed"] for run in next(iter(reports.values()))]
    return summarize(reports, recipe="mine", epochs=3, seeds=seeds, backbone_only={"none"})


PLAIN = [report(0, 10.0, 10.0, 70.0, 12.0), report(1, 11.0, 9.0, 74.0, 13.0), report(2, 9.0, 9.5, 72.0, 11.0)]
TAUGHT = [
    report(0, 60.0, 66.0, 73.0, 75.0, seconds=90.0),
    report(1, 61.0, 65.0, 75.0, 76.0, seconds=80.0),
    report(2, 62.0, 67.0, 74.0, 77.0, seconds=100.0),
]


def test_means_spreads_and_paired_differences_are_those_of_the_textbook() -> None:
    comparison = summary(none=PLAIN, byot_iccv2019=TAUGHT)
    assert comparison["baseline"] == "none"
    plain, taught = comparison["losses"]
    assert [output["name"] for output in plain["outputs"]] == ["fc"], "untrained exits are not shown"
    assert plain["outputs"][0]["difference"] is None
    assert plain["outputs"][0]["top1"] == {"values": [70.0, 74.0, 72.0], "mean": 72.0, "std": 2.0}
    assert [output["name"] for output in taught["outputs"]] == ["layer1", "layer2", "fc", "ensemble"]
    assert taught["train_seconds"] == {"values": [90.0, 80.0, 100.0], "mean": 90.0, "std": 10.0}
    # Paired by seed: 3, 1 and 2; 4.3027 is Student's t for two degrees of freedom at 97.5 %, from a table.
    difference = taught["outputs"][2]["difference"]
    assert difference is not None
    assert difference["mean"] == 2.0
    assert difference["high"] == pytest.approx(2.0 + 4.3027 * 1.0 / math.sqrt(3), abs=1e-4)
    assert difference["low"] == pytest.approx(2.0 - 4.3027 * 1.0 / math.sqrt(3), abs=1e-4)
    assert taught["outputs"][3]["difference"]["mean"] == pytest.approx((5 + 2 + 5) / 3)


def test_one_seed_has_no_spread_and_no_interval() -> None:
    comparison = summary(none=PLAIN[:1], byot_iccv2019=TAUGHT[:1])
    output = comparison["losses"][1]["outputs"][2]
    assert output["top1"]["std"] is None
    assert output["difference"] == {"mean": 3.0, "low": None, "high": None}
    text = format_comparison(comparison)
    assert "±" not in text
    assert "[" not in text
    assert "+3.00" in text


def test_without_a_baseline_the_first_loss_stands_for_it() -> None:
    comparison = summary(deep_supervision=TAUGHT, byot_iccv2019=PLAIN)
    assert comparison["baseline"] == "deep-supervision"
    assert comparison["losses"][0]["outputs"][2]["difference"] is None
    assert comparison["losses"][1]["outputs"][2]["difference"]["mean"] == -2.0


def test_an_accuracy_that_is_no_number_names_the_run() -> None:
    broken = report(1, 60.0, None, 75.0, 76.0)
    with pytest.raises(ValueError, match="byot-iccv2019, seed 1: the accuracy is not a number"):
        summary(none=PLAIN[:2], byot_iccv2019=[TAUGHT[0], broken])


def test_table_and_picture_show_each_output_of_each_loss() -> None:
    comparison = summary(none=PLAIN, byot_iccv2019=TAUGHT)
    lines = format_comparison(comparison).splitlines()
    assert lines[0].split() == ["top-1", "%", "layer1", "layer2", "fc", "ensemble", "minutes", "time"]
    assert lines[2].split() == ["none", "72.00", "±", "2.00", "1.0", "1.00x"]
    assert "61.00 ± 1.00" in lines[3]
    assert lines[3].endswith("1.5  1.50x")
    assert any("+2.00 [-0.48, +4.48]" in line for line in lines)
    figure = draw_comparison(comparison)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0: layer1", "1: layer2", "backbone", "ensemble"]
    drawn = [container.get_label() for container in axes.containers]
    assert drawn == ["none", "byot-iccv2019"]
    means = axes.containers[1].lines[0].get_ydata()
    assert list(means) == [61.0, 66.0, 74.0, 76.0]


def test_every_known_loss_builds_and_changes_nothing_else() -> None:
    recipe = load_recipe("digits", ["exits.hint_adapter=true", "loss.temperature=2"])
    assert {"none", "label-smoothing", "deep-supervision", "byot-iccv2019", "byot-tpami2021"} <= set(list_variants())
    for name in ("none", "label-smoothing", "deep-supervision", "byot-iccv2019", "byot-tpami2021"):
        changed = with_loss(recipe, name)
        config: Any = build_loss(changed).config
        assert changed.exits.hint_adapter == (config.hint_weight > 0), name
        assert config.temperature == 3.0, "a published loss has its published settings"
        assert config.label_smoothing == (0.1 if name == "label-smoothing" else 0.0)
        same = {"exits": recipe.exits, "loss": recipe.loss}
        assert changed.model_copy(update=same) == recipe
    assert with_loss(recipe, "recipe") == recipe


def test_what_is_done_is_skipped_and_what_is_missing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tmp_path / "cmp")
    trained: list[str] = []

    def noting(run: Recipe) -> Any:
        trained.append(Path(str(run.output_dir)).name)
        return train(run)

    monkeypatch.setattr("timm_selfdistill.compare.train", noting)
    first = compare(recipe, ["none", "byot-iccv2019"], [3])
    assert trained == ["none-seed-3", "byot-iccv2019-seed-3"]
    folder = tmp_path / "cmp"
    assert json.loads((folder / "comparison.json").read_text()) == first
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "byot-iccv2019" in (folder / "comparison.md").read_text()
    for name in trained:
        seconds = json.loads((folder / name / "report.json").read_text())["train_seconds"]
        assert list(seconds) == ["self-distilled"]
        assert seconds["self-distilled"] > 0

    trained.clear()
    assert compare(recipe, ["none", "byot-iccv2019"], [3]) == first
    assert trained == []

    (folder / "none-seed-3" / "report.json").unlink()
    again = compare(recipe, ["none", "byot-iccv2019"], [3])
    assert trained == ["none-seed-3"]
    assert again["losses"][0]["outputs"][0]["top1"] == first["losses"][0]["outputs"][0]["top1"]

    trained.clear()
    with pytest.raises(ValueError, match=r"none-seed-3 holds a run of another recipe: epochs \(1, now 2: with sched"):
        compare(small_recipe(folder, "epochs=2"), ["deep-supervision", "none"], [3])
    assert trained == [], "refused before anything is trained"

    (folder / "none-seed-3" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        compare(recipe, ["none"], [3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "none,byot"], "Unknown losses byot; a comparison knows byot-iccv2019"),
        (["--losses", "none,none"], "losses must be one or more different entries, received none, none"),
        (["--losses", ","], "losses must be one or more different entries"),
        (["--seeds", "1,1"], "seeds must be one or more different entries, received 1, 1"),
        (["--seeds=-1"], "seeds must be 0 or more, received -1"),
    ],
)
def test_what_cannot_be_compared_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli(["compare", "digits", f"output_dir={tmp_path / 'cmp'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cmp").exists()


def test_the_command_prints_the_table_and_takes_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["compare", "digits", *SMALL, "--losses", "none", "--seeds", "0"]) == 0
    assert "Written to runs/digits-compare" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-compare" / "none-seed-0" / "model").is_dir()
    assert not (tmp_path / "runs" / "digits").exists()
