"""The command `timm-selfdistill calibrate` on a small run: what it stores, what it reports, what it refuses."""

import copy
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill import cli_commands
from timm_selfdistill.calibration import Goal, calibrate_folder, collect_logits, format_calibration
from timm_selfdistill.calibration.calibration_page import _PAGE
from timm_selfdistill.cli import main as cli
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.loaders import build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import Line, StageCosts
from timm_selfdistill.early_exit.rules import _RULES
from timm_selfdistill.hub import folder as hub_folder
from timm_selfdistill.metrics import paired_interval
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import train

SMALL = (
    "epochs=3",
    "batch_size=16",
    "baseline=false",
    "precision='no'",
    "data.max_train=640",
    "data.max_eval=90",
    "data.image_size=16",
    "augment={scale: [1.0, 1.0], ratio: [1.0, 1.0], hflip: 0.0}",
)
FILES = ("calibration.json", "calibration.md", "calibration.png")
WEIGHTS = ("model.safetensors", "exits.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on few digits; only read."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = load_recipe("digits", [*SMALL, f"output_dir={folder}"])
    train(recipe)
    # Digits are so easy that the first exit would answer for all: it and the next one get worse.
    model = sd.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head, noise in zip(model.heads, (0.4, 0.2), strict=False):
            weight = head.classifier.weight
            weight += noise * torch.randn(weight.shape, generator=generator)
    names = open_dataset(recipe.data, recipe.seed).class_names
    sd.save_pretrained(model, folder / "model", label_names=names)
    report = json.loads((folder / "report.json").read_text())
    report["baseline"] = {"top1": 91.25, "top5": 99.0, "ece": 0.1}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def loaders(run: Path) -> Any:
    recipe = load_recipe(run / "recipe.yaml")
    data = open_dataset(recipe.data, recipe.seed)
    input = InputConfig.from_model(sd.from_pretrained(run / "model").backbone, recipe.data)
    options = {"batch_size": 16, "accelerator_shards": (0, 1), "seed": 0}
    return data, build_loaders(data, recipe.data, recipe.augment, input, **options)


@pytest.mark.parametrize(
    "options",
    [
        ["--max-accuracy-drop", "3"],
        ["--speedup", "1.2", "--rule", "entropy", "--fallback", "ensemble"],
        ["--speedup", "1.1", "--running-ensemble", "--fallback", "ensemble"],
        ["--risk", "0.08", "--confidence", "0.8", "--rule", "margin"],
        ["--macs-budget", "900000", "--rule", "patience"],
    ],
    ids=lambda options: " ".join(options),
)
def test_the_stored_network_does_what_the_report_says(run, options, capsys):
    before = content(run)
    assert cli(["calibrate", str(run), *options]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run / "calibration.json").read_text())
    assert printed == format_calibration(report) + "\n"
    assert (run / "calibration.md").read_text().startswith(_PAGE.markdown(report))
    after = content(run)
    assert {name for name in before if before[name] != after[name]} == {"model/config.json", "model/README.md"}
    assert set(after) - set(before) == set(FILES)

    assert sum(share > 0 for share in report["early_exit"]["shares"]) > 1
    check_stored(run, report)


def check_stored(run: Path, report: dict[str, Any]) -> None:
    """The network with the settings that were stored does on the evaluation split what the report says."""
    fast = sd.load_early_exit(run / "model")
    assert fast.config.to_json() == report["settings"]
    data, batches = loaders(run)
    right, index = 0, []
    with torch.no_grad():
        for images, targets in batches.eval:
            out = fast(images)
            right += int((out.logits.argmax(-1) == targets).sum())
            index += out.exit_index.tolist()
    assert report["early_exit"]["top1"] == pytest.approx(100 * right / 90)
    assert report["early_exit"]["shares"] == [index.count(exit) / 90 for exit in range(4)]
    assert len(data.eval) == report["num_samples"] == 90


RULES = """
import math

import torch

from timm_selfdistill.early_exit import Rule


class NegativeEntropy(Rule):
    lowest = -math.inf
    highest = 0.0

    def confidence(self, logits, state):
        return -torch.special.entr(logits.softmax(-1)).sum(-1), ()


class LogitMargin(Rule):
    highest = math.inf
    uses_temperatures = False

    def confidence(self, logits, state):
        first, second = logits.topk(2).values.unbind(-1)
        return first - second, ()


class SumOfLogs(Rule):
    lowest = -math.inf
    highest = 0.0
    keeps_state = True

    def confidence(self, logits, state):
        total = logits.log_softmax(-1).amax(-1) + (state[0] if state else -1.0)
        return total, (total,)


class Liar(Rule):
    def confidence(self, logits, state):
        return -logits.amax(-1), ()
"""
ENTRY_POINTS = """
[timm_selfdistill.rules]
negative-entropy = example_rules:NegativeEntropy
example-margin = example_rules:LogitMargin
example-sum = example_rules:SumOfLogs
liar = example_rules:Liar
missing = example_rules:Missing
no-rule = math:sqrt
"""


@pytest.fixture
def example_rules(tmp_path, monkeypatch):
    """Another package with rules, as pip installs it."""
    info = tmp_path / "site" / "example_rules-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "example_rules.py").write_text(RULES)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.setattr(_RULES, "_entries", dict(_RULES._entries))
    monkeypatch.setattr(_RULES, "_broken", {})
    monkeypatch.setattr(_RULES, "_entry_points_loaded", False)
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path / "site")
        with pytest.warns(UserWarning, match="rule 'missing' cannot be loaded"):
            assert {"example-margin", "max-softmax", "no-rule"} <= set(sd.list_rules())
        yield
    sys.modules.pop("example_rules")


@pytest.mark.parametrize("rule", ["negative-entropy", "example-margin", "example-sum"])
def test_a_rule_of_another_package_calibrates_and_is_restored(run, example_rules, rule, capsys):
    assert cli(["calibrate", str(run), "--speedup", "1.8", "--rule", rule]) == 0
    report = json.loads((run / "calibration.json").read_text())
    assert report["settings"]["rule"] == rule
    assert (report["settings"]["temperatures"] is None) == (rule == "example-margin")
    assert report["calibration"]["speedup"] >= 1.8
    assert sum(share > 0 for share in report["early_exit"]["shares"]) > 1
    check_stored(run, report)
    # A threshold that lets every image leave is told as such, whatever its value is.
    assert cli(["calibrate", str(run), "--max-accuracy-drop", "100", "--rule", rule]) == 0
    report = json.loads((run / "calibration.json").read_text())
    assert report["early_exit"]["shares"] == [1, 0, 0, 0]
    assert re.search(r"^0: layer1 .* always  ", capsys.readouterr().out, re.M)
    check_stored(run, report)


def test_rules_that_cannot_be_used_are_named(run, example_rules, monkeypatch, capsys):
    for rule, message in (
        ("liar", r"The rule liar gives confidences from -.* to .*; its range is 0 to 1"),
        ("missing", "rule 'missing' is installed but cannot be loaded: example_rules:Missing"),
        ("no-rule", r"Rule 'no-rule' is <.*sqrt>; allowed is a subclass of timm_selfdistill.early_exit.Rule"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_folder(run, Goal(speedup=1.1), rule=rule)
    calibrate_folder(run, Goal(speedup=1.1), rule="example-margin")
    # Without the package, the saved settings cannot be used, and say why.
    monkeypatch.delitem(_RULES._entries, "example-margin")
    with pytest.raises(ValueError, match=r"Unknown rule 'example-margin'; known are .*entropy, .*margin, max-softmax"):
        sd.load_early_exit(run / "model")
    assert len(sd.from_pretrained(run / "model").heads) == 3


@pytest.mark.whole_reports
def test_what_is_reported(run):
    report = calibrate_folder(run, Goal(max_accuracy_drop=3))
    model = sd.from_pretrained(run / "model")
    trained = json.loads((run / "report.json").read_text())
    data, batches = loaders(run)
    assert report["goal"] == {"max_accuracy_drop": 3}
    held_out = report["calibration"]
    assert held_out["dataset"] == "digits, the 10 % of train that the run held out"
    assert held_out["num_samples"] == len(data.validation)
    assert not set(data.validation.indices) & set(data.train.indices)
    stored = collect_logits(model, batches.validation)
    assert held_out["backbone_top1"] == pytest.approx(100 * float(stored.correct[-1].double().mean()))
    assert held_out["top1"] >= held_out["backbone_top1"] - 3
    assert held_out["tested"] is None

    stored = collect_logits(model, batches.eval)
    for row, ours, right in zip(trained["exits"], report["exits"], stored.correct, strict=True):
        assert ours["index"] == row["index"]
        assert ours["name"] == row["name"]
        assert ours["macs"] == row["macs"]
        assert ours["top1"] == pytest.approx(100 * float(right.double().mean()))
        assert ours["speedup"] == pytest.approx(trained["exits"][-1]["macs"] / row["macs"])
    assert report["exits"][-1]["top1"] == pytest.approx(trained["exits"][-1]["top1"])
    assert report["ensemble"]["top1"] == pytest.approx(100 * float(stored.ensemble_correct.double().mean()))
    assert report["ensemble"]["macs"] == trained["ensemble"]["macs"]
    pools = [stored.combined.prefix(k)(stored.logits[: k + 1]) for k in range(4)]
    for row, pool in zip(report["running"], pools, strict=True):
        assert row["top1"] == pytest.approx(100 * float((pool.argmax(-1) == stored.targets).double().mean()))
    # Its answers are those of exit 0 but for a bias that may have been fitted, which costs nothing.
    assert all(report["running"][0][key] == report["exits"][0][key] for key in ("macs", "speedup"))
    assert report["running"][-1] == report["ensemble"]
    full = trained["exits"][-1]["macs"]
    assert report["baseline"] == {"top1": 91.25, "gain_interval": None, "macs": full, "speedup": 1}
    gained, lost = (stored.correct[0] & ~stored.correct[-1]).sum(), (stored.correct[-1] & ~stored.correct[0]).sum()
    assert report["exits"][0]["gain_interval"] == list(paired_interval(int(gained), int(lost), 90))
    assert f"the goal was met on {len(data.validation)} images only" in format_calibration(report)
    chosen = copy.deepcopy(report)
    chosen["calibration"] |= {"num_samples": 5_000, "as_good": 1}
    text = format_calibration(chosen)
    assert "images only" not in text
    assert f"exit 1 ({report['exits'][1]['name']}) for all images is as accurate" in text
    first = [next((exit for exit in range(4) if stored.correct[exit, i]), 3) for i in range(90)]
    assert report["oracle"]["shares"] == [first.count(exit) / 90 for exit in range(4)]
    assert report["oracle"]["top1"] == pytest.approx(100 * float(stored.correct.any(0).double().mean()))
    assert report["oracle"]["top1"] >= max(row["top1"] for row in report["exits"])
    macs = [point["macs"] for point in report["curve"]]
    assert len(macs) > 2
    assert all(macs[0] * 0.99 <= value <= report["ensemble"]["macs"] for value in macs)
    assert (run / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "sd.load_early_exit(FOLDER)" in (run / "model" / "README.md").read_text()
    assert list(run.glob("model/.*")) == []


def test_settings_are_replaced_and_an_edited_card_stays(run):
    card = run / "model" / "README.md"
    card.write_text(card.read_text() + "\nTrained on a rainy day.\n")
    first = calibrate_folder(run, Goal(speedup=1.1))
    text = card.read_text()
    assert text.endswith("\nTrained on a rainy day.\n")
    second = calibrate_folder(run / "model", Goal(macs_budget=2 * first["exits"][0]["macs"]), rule="margin")
    assert second["recipe"] == "run"
    assert card.read_text() == text
    assert sd.load_early_exit(run / "model").config.rule == "margin"
    assert json.loads((run / "calibration.json").read_text()) == second


def test_exported_stages_get_settings_of_their_own(run, capsys):
    """Thresholds for what the quantised graphs say, kept in their manifest."""
    before = content(run)
    assert cli(["export", str(run), "--format", "onnx-stages", "--threshold", "1", "--quantize", "dynamic"]) == 0
    stages = run / "onnx-stages"
    assert cli(["calibrate", str(run), "--max-accuracy-drop", "3", "--onnx", str(stages)]) == 0
    assert {name: data for name, data in content(run).items() if not name.startswith("onnx-stages")} == before
    report = json.loads((stages / "calibration.json").read_text())
    assert "early exit" in capsys.readouterr().out
    network = sd.OnnxEarlyExit(stages)
    settings = network.manifest["early_exit"]
    assert [math.inf if value is None else value for value in settings["thresholds"]] == list(network.thresholds)
    assert min(network.thresholds) < 1
    assert any(value != 1 for value in settings["temperatures"])
    _, held_out = loaders(run)
    right = torch.cat([torch.from_numpy(network(x.numpy()).logits).argmax(-1) == y for x, y in held_out.eval])
    # Dynamic ranges are those of the batch, and so an image's answer depends a little on who is left beside it.
    assert report["early_exit"]["top1"] == pytest.approx(100 * right.float().mean().item(), abs=3)
    for options, message in (
        (["--rule", "margin"], "was exported with rule 'max-softmax', which is part of its graphs; 'margin' was asked"),
        (["--fallback", "ensemble"], "was exported with fallback 'last'"),
        (["--by-time", "1"], "exported stages are calibrated by MACs"),
    ):
        assert cli(["calibrate", str(run), "--speedup", "1.1", "--onnx", str(stages), *options]) == 2
        assert message in capsys.readouterr().err


def test_exported_stages_that_answer_with_an_ensemble(run):
    """The settings are those that the network itself would get."""
    pytest.importorskip("onnx")
    model = sd.from_pretrained(run / "model")
    model.ensemble = sd.Ensemble((0.1, 0.2, 0.3, 0.4), images=100, bias=tuple(0.01 * n for n in range(10)))
    settings = sd.EarlyExitConfig((0.9,) * 3, fallback="ensemble", running_ensemble=True)
    sd.save_pretrained(model, run / "model", early_exit=settings)
    stages = sd.export_early_exit(sd.load_early_exit(run / "model"), run / "stages", format="onnx-stages")
    asked = {"fallback": "ensemble", "running_ensemble": True}
    report = calibrate_folder(run, Goal(max_accuracy_drop=3), onnx=stages, **asked)
    assert sd.load_early_exit(run / "model").config == settings
    found = json.loads((stages / "manifest.json").read_text())["early_exit"]
    expected = calibrate_folder(run, Goal(max_accuracy_drop=3), **asked)
    chosen = sd.load_early_exit(run / "model").config
    assert report["early_exit"]["top1"] == pytest.approx(expected["early_exit"]["top1"])
    assert report["ensemble"]["top1"] == pytest.approx(expected["ensemble"]["top1"])
    assert found["temperatures"] == pytest.approx(chosen.temperatures, rel=1e-3)
    thresholds = [math.inf if value is None else value for value in found["thresholds"]]
    assert thresholds == pytest.approx(chosen.thresholds, rel=1e-3)
    assert min(thresholds) < 1


def test_held_out_images_set_the_ranges_of_a_static_export(run, monkeypatch, capsys):
    asked = {}

    def export(source, **options):
        asked.update(options)
        return run

    monkeypatch.setattr(cli_commands, "export_folder", export)
    monkeypatch.setattr(cli_commands, "_RANGE_IMAGES", 5)
    assert cli(["export", str(run), "--format", "onnx-stages", "--quantize", "static"]) == 0
    found = asked["calibration_images"]
    assert asked["quantize"] == "static"
    assert found.shape == (5, 1, 16, 16)
    _, held_out = loaders(run)
    known = torch.cat([x for x, _ in held_out.validation])
    places = [int((known == image).flatten(1).all(1).nonzero()[0]) for image in found]
    assert places[0] == 0
    assert places[-1] == len(known) - 1
    assert cli(["export", str(run), "--format", "onnx-stages", "--quantize", "static", "--data", "digits"]) == 2
    assert "Name the split of digits" in capsys.readouterr().err
    assert cli(["export", str(run), "--format", "onnx-stages", "--split", "test"]) == 2
    assert "--data and --split name the images of --quantize static" in capsys.readouterr().err


def test_settings_can_be_chosen_by_time(run, capsys):
    assert cli(["calibrate", str(run), "--speedup", "1.05", "--by-time", "2"]) == 0
    report = json.loads((run / "calibration.json").read_text())
    time = report["time"]
    assert (time["batch_size"], time["num_images"]) == (2, 90)
    assert time["speedup"] > 0
    printed = capsys.readouterr().out
    assert f"the time of batches of 2 on {time['device']}" in printed
    assert f"on {time['num_images']} of the samples, early exit is {time['speedup']:.2f} times as fast" in printed
    assert cli(["calibrate", str(run), "--macs-budget", "1e6", "--by-time", "2"]) == 2
    assert "chosen by time: give speedup" in capsys.readouterr().err
    assert cli(["calibrate", str(run), "--speedup", "1.05", "--by-time", "0"]) == 2
    assert "time_batch_size is 0" in capsys.readouterr().err


def test_what_takes_long_is_not_asked_where_time_counts(run, monkeypatch):
    stages, heads = [(0, 0.1), (0, 0.1), (0, 0.1), (0, 0.7)], [(40, 10), (0, 50), (0, 0.01)]
    slow = StageCosts(*(tuple(Line(*line) for line in part) for part in (stages, heads, heads)), batch_size=1)
    monkeypatch.setattr("timm_selfdistill.calibration.calibrate.measure_stage_costs", lambda *arguments: slow)
    report = calibrate_folder(run, Goal(speedup=1.05), time_batch_size=1)
    assert report["settings"]["thresholds"][:2] == [None, None]
    assert sd.load_early_exit(run / "model").config.costs == slow


def test_images_from_all_over_the_split_are_timed(run, monkeypatch):
    seen = {}

    def measure(model, config, images, batch_size):
        seen["images"] = images
        return 1.0

    monkeypatch.setattr("timm_selfdistill.calibration.calibrate.measure_speedup", measure)
    report = calibrate_folder(run, Goal(speedup=1.05), overrides=["max_eval=360"], time_batch_size=1)
    assert (report["num_samples"], report["time"]["num_images"]) == (360, 128)
    recipe = load_recipe(run / "recipe.yaml", ["data.max_eval=360"])
    input = InputConfig.from_model(sd.from_pretrained(run / "model").backbone, recipe.data)
    data = open_dataset(recipe.data, recipe.seed)
    loaders = build_loaders(
        data, recipe.data, recipe.augment, input, batch_size=16, accelerator_shards=(0, 1), seed=recipe.seed
    )
    every = torch.cat([images for images, _ in loaders.eval])
    assert torch.equal(seen["images"][0], every[0])
    assert torch.equal(seen["images"][-1], every[-1])
    assert torch.equal(seen["images"][64], every[round(64 * 359 / 127)])


def test_a_crash_leaves_a_whole_model(run, monkeypatch):
    before = content(run)
    real, left = os.replace, []

    def crash(source, target):
        if not left:
            raise OSError("no more electricity")
        left.pop()
        real(source, target)

    monkeypatch.setattr(hub_folder.os, "replace", crash)
    for replaced, changed in ((0, set()), (1, {"model/config.json"})):
        left[:] = [None] * replaced
        with pytest.raises(OSError, match="electricity"):
            calibrate_folder(run, Goal(speedup=1.1))
        after = content(run)
        assert {name for name in before if before[name] != after.get(name)} == changed
        assert set(after) == set(before)
        sd.from_pretrained(run / "model")
    sd.load_early_exit(run / "model")


def test_a_finished_run_that_is_run_again_keeps_the_settings_of_its_weights(tmp_path):
    recipe = load_recipe("digits", [*SMALL, "epochs=1", "data.max_train=64", f"output_dir={tmp_path}"])
    train(recipe)
    calibrate_folder(tmp_path, Goal(speedup=1.0))
    settings = sd.load_early_exit(tmp_path / "model").config
    train(recipe)
    assert sd.load_early_exit(tmp_path / "model").config == settings
    assert "sd.load_early_exit(" in (tmp_path / "model" / "README.md").read_text()
    # Other weights are another network: what was chosen for these says nothing about it.
    model = sd.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    sd.save_pretrained(model, tmp_path / "model", early_exit=settings)
    train(recipe)
    with pytest.raises(ValueError, match="early-exit settings"):
        sd.load_early_exit(tmp_path / "model")


def test_another_data_set(run, tmp_path, capsys):
    source = open_dataset(load_recipe("digits").data, 0)
    images = [{"image": row["image"], "label": row["target"]} for row in source.eval]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.class_names))}
    rows = datasets.Dataset.from_list(images, features=datasets.Features(features))
    splits = {"one": rows.select(range(0, 200)), "two": rows.select(range(200, 360))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "other")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "recipe.yaml").unlink()
    named = ["--data", str(tmp_path / "other"), "image_size=16", "workers=0", "eval_split=two"]
    assert cli(["calibrate", str(run / "model"), "--speedup", "1.1", "--split", "one", *named]) == 0
    report = json.loads((run / "model" / "calibration.json").read_text())
    assert (report["calibration"]["num_samples"], report["num_samples"]) == (200, 160)
    assert (report["calibration"]["dataset"], report["dataset"]) == ("other, one", "other, two")
    assert report["baseline"] is None

    # One split, halved.
    halved = ["--data", str(tmp_path / "other"), "--split", "one", "image_size=16", "workers=0", "eval_fraction=0.4"]
    assert cli(["calibrate", str(run / "model"), "--speedup", "1.1", *halved, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (report["calibration"]["num_samples"], report["num_samples"]) == (120, 80)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "--split test is the split that is reported on"),
        (["--split", "train"], "--split train is the split that the model was trained on"),
        (["--data", "digits"], "Name the split of digits to calibrate on with --split"),
        (["--data", "digits", "--split", "test"], "--split test is the split that is reported on"),
        (["--data", "digits", "--split", "train"], "--split train of digits is what the model was trained on"),
        (["validation=0.5"], "validation cannot be changed here: it decides which images were trained on"),
        (["train_split=test", "eval_split=train"], "train_split cannot be changed here"),
        (["eval_split=train"], "must not be the split that is trained on"),
        (["--split", "night"], "has no split 'night'"),
        (["--confidence", "0.9"], "--confidence is that of --risk"),
        (["--data", "imagenet-of-mine/none.parquet", "--split", "a"], "there is no such folder or file"),
    ],
)
def test_what_is_refused(run, options, message, capsys):
    before = content(run)
    assert cli(["calibrate", str(run), "--speedup", "1.1", *options]) == 2
    assert message in capsys.readouterr().err
    assert content(run) == before


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (["--speedup", "0.9"], "speedup is 0.9; it must be a factor of 1 or more"),
        (["--speedup", "100"], "the cheapest exit costs"),
        (["--risk", "0.0001"], "a smaller one needs more images"),
        (["--max-accuracy-drop", "nan"], "max_accuracy_drop is nan"),
    ],
)
def test_goals_that_cannot_be_reached(run, goal, message, capsys):
    before = content(run)
    assert cli(["calibrate", str(run), *goal]) == 2
    assert message in capsys.readouterr().err
    assert content(run) == before


@pytest.mark.parametrize(
    ("goal", "message"),
    [([], "one of the arguments"), (["--risk", "0.1", "--speedup", "2"], "not allowed with argument")],
)
def test_one_goal_must_be_given(goal, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli(["calibrate", "runs/none", *goal])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_without_validation_images_needs_a_split(run, capsys):
    text = (run / "recipe.yaml").read_text()
    assert "validation: 0.1" in text
    (run / "recipe.yaml").write_text(text.replace("validation: 0.1", "validation: 0.0"))
    assert cli(["calibrate", str(run), "--speedup", "1.1"]) == 2
    assert "held out no images for validation (data.validation is 0)" in capsys.readouterr().err


def test_other_classes_and_no_recipe_are_refused(run, make_image_folder, tmp_path, capsys):
    folder = make_image_folder(tmp_path / "images")
    named = ["--data", str(folder), "--split", "train", "eval_split=validation"]
    assert cli(["calibrate", str(run), "--speedup", "1.1", *named]) == 2
    assert "they must be the same, in the same order" in capsys.readouterr().err
    (run / "recipe.yaml").unlink()
    assert cli(["calibrate", str(run), "--speedup", "1.1"]) == 2
    assert "no recipe.yaml beside the model" in capsys.readouterr().err
