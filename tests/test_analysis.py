"""Why it works: noise on the weights, gradients by stage, separability of features, and the command that draws them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from matplotlib.backends.backend_agg import FigureCanvasAgg

import timm_selfdistill as sd
from timm_selfdistill.analysis import analyze_folder, folder_analysis, format_analysis, probes
from timm_selfdistill.analysis.analysis_page import draw_analysis
from timm_selfdistill.analysis.probes import (
    collect_features,
    draw_noise,
    find_stages,
    measure_gradients,
    measure_noise,
    measure_scatter,
    project,
)
from timm_selfdistill.cli import main as cli
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import build_loss, train
from timm_selfdistill.train.checkpoint import load_checkpoint, save_checkpoint
from timm_selfdistill.train.saved_run import SavedRun

SMALL = (
    "epochs=2",
    "batch_size=16",
    "precision='no'",
    "data.max_train=160",
    "data.max_eval=60",
    "data.image_size=16",
    "model.kwargs={channels: [8, 8, 16, 16], in_chans: 1}",
    "exits.points=[layer1, layer2, layer3]",
    "ema={decay: 0.6}",
)
FEW = {"sigmas": (0.02,), "draws": 2}
FILES = {"analysis.json", "analysis.md", "analysis.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a baseline, evaluated with the average of its weights; only read."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_recipe("digits", [*SMALL, f"output_dir={folder}"]))
    AcceleratorState._reset_state(True)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def unwritten(monkeypatch):
    """Analyses are returned, not written: drawing takes half of their time."""
    monkeypatch.setattr(folder_analysis, "write_analysis", lambda analysis, folder: None)


@pytest.fixture
def model(make_backbone):
    """A small network, with dropout before its classifier."""
    return sd.wrap(make_backbone("resnet18", channels=[8, 8, 16, 16], drop_rate=0.5)).eval()


@pytest.fixture
def batches(images):
    return [(images, torch.tensor([0, 1, 2, 0])), (images.flip(0), torch.tensor([3, 0, 4, 1]))]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def snapshot(model: torch.nn.Module) -> Any:
    """Everything that measuring must not change."""
    tensors = [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad is None and parameter.requires_grad for parameter in model.parameters()]
    return tensors, modes, gradients, torch.get_rng_state()


def assert_unchanged(model: torch.nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_scatter_is_that_of_the_textbook():
    generator = np.random.default_rng(0)
    features, targets = generator.normal(2, 3, (50, 6)), generator.integers(0, 4, 50)
    within, between, mean = np.zeros((6, 6)), np.zeros((6, 6)), features.mean(0)
    for label in range(4):
        of_class = features[targets == label]
        own = of_class.mean(0)
        within += sum(np.outer(row - own, row - own) for row in of_class)
        between += len(of_class) * np.outer(own - mean, own - mean)
    found = measure_scatter(torch.tensor(features), torch.tensor(targets))
    assert found["within"] == pytest.approx(np.trace(within) / 50)
    assert found["between"] == pytest.approx(np.trace(between) / 50)
    assert found["ratio"] == pytest.approx(np.trace(within) / np.trace(between))
    assert found["within"] + found["between"] == pytest.approx(features.var(0).sum())
    scaled = measure_scatter(7 * torch.tensor(features) - 5, torch.tensor(targets))
    assert scaled["ratio"] == pytest.approx(found["ratio"])
    alike = measure_scatter(torch.ones(4, 2).double(), torch.tensor([0, 0, 1, 1]))
    assert alike == {"within": 0.0, "between": 0.0, "ratio": None}


def test_projection_is_the_principal_components():
    features = np.random.default_rng(1).normal(0, (1, 5, 2, 0.1), (40, 4))
    found = project(torch.tensor(features), torch.arange(40) % 3)
    left, values, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    points = np.array(found["points"])
    assert np.allclose(np.abs(points), np.abs(expected))
    assert found["explained"] == pytest.approx(values[:2] ** 2 / (values**2).sum())
    assert found["classes"] == [index % 3 for index in range(40)]
    assert project(torch.tensor(features), torch.arange(40) % 3) == found
    assert project(torch.ones(3, 4).double(), torch.zeros(3))["explained"] == [0.0, 0.0]


def test_features_are_those_of_the_exits_without_what_was_skipped(model, batches):
    (images, targets), other = batches
    targets = targets.clone()
    targets[1] = IGNORED
    features, found = collect_features(model, [(images, targets), other])
    assert found.tolist() == [0, 2, 0, 3, 0, 4, 1]
    with torch.no_grad():
        expected = model(images[[0, 2, 3]], return_exits=True).features
    for feature, rows in zip(features, expected, strict=True):
        assert torch.allclose(feature[:3], rows.double(), atol=1e-5)


def test_gradients_are_the_means_of_their_magnitudes(model, batches):
    stages = find_stages(model)
    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    model.drop = model.backbone.drop_rate = 0.0
    loss = sd.SelfDistillationLoss()

    def own(images, targets):
        return loss(model(images, return_exits=True), targets)["loss"]

    def alone(images, targets):
        return F.cross_entropy(model(images), targets)

    for function in (own, alone):
        before = snapshot(model)
        found = measure_gradients(model, batches, function, list(stages.values()), seed=0)
        assert_unchanged(model, before)
        expected = dict.fromkeys(stages, 0.0)
        twin = model.train()
        for images, targets in batches:
            twin.zero_grad()
            function(images, targets).backward()
            for name, parameters in stages.items():
                values = [model.backbone.get_parameter(parameter).grad.flatten() for parameter in parameters]
                expected[name] += float(torch.cat(values).abs().mean()) / len(batches)
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            for tensor, value in zip([*model.parameters(), *model.buffers()], before[0], strict=True):
                tensor.copy_(value)
        assert found == pytest.approx(list(expected.values()), rel=1e-4)


def test_gradients_with_dropout_follow_the_seed(model, batches):
    stages = list(find_stages(model).values())

    def measure(seed):
        return measure_gradients(model, batches, lambda x, y: F.cross_entropy(model(x), y), stages, seed=seed)

    assert measure(3) == measure(3)
    assert measure(3) != measure(4)
    assert measure_gradients(model, batches, lambda x, y: model(x).sum() * math.inf, stages, seed=0)[-1] is None


def test_every_parameter_is_in_one_stage(make_backbone, family):
    model = sd.wrap(make_backbone(family))
    stages = find_stages(model)
    names = [name for stage in stages.values() for name in stage]
    assert sorted(names) == sorted(name for name, _ in model.backbone.named_parameters())
    assert len(stages) > 3


def test_a_backbone_without_groups_has_its_children_as_stages(tiny_net):
    model = sd.wrap(tiny_net(), exits=2, image_size=32)
    stages = find_stages(model)
    assert list(stages) == ["stage0", "stage1", "stage2", "unused", "fc"]
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    loss = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
    found = measure_gradients(model, [batch], loss, list(stages.values()), seed=0)
    assert [value == 0 for value in found] == [False, False, False, True, False]


def test_noise_has_the_standard_deviation_that_was_asked_for(model, batches, monkeypatch):
    added: list[torch.Tensor] = []
    names = [name for name, _ in model.backbone.named_parameters()]
    original = [parameter.detach().clone() for parameter in model.backbone.parameters()]
    others = [tensor.detach().clone() for tensor in [*model.heads.parameters(), *model.buffers()]]
    evaluate = probes.evaluate_model

    def noting(network, *arguments, **options):
        difference = [now - old for now, old in zip(network.backbone.parameters(), original, strict=True)]
        assert len(difference) == len(names)
        assert all(
            torch.equal(now, old)
            for now, old in zip([*network.heads.parameters(), *network.buffers()], others, strict=True)
        )
        added.append(torch.cat([values.flatten() for values in difference]))
        return evaluate(network, *arguments, **options)

    monkeypatch.setattr(probes, "evaluate_model", noting)
    before = snapshot(model.train())
    points = measure_noise(model, batches, Accelerator(), sigmas=(0, 0.01, 0.05), draws=2, seed=5)
    assert_unchanged(model, before)
    assert [point["sigma"] for point in points] == [0, 0.01, 0.05]
    assert len(added) == 5, "without noise there is nothing to draw twice"
    assert not added[0].any()
    for values, sigma in zip(added[1:], (0.01, 0.05, 0.01, 0.05), strict=True):
        # Its own standard error is about sigma / sqrt(2 * 14,000).
        assert float(values.std()) == pytest.approx(sigma, rel=0.03)
        assert abs(float(values.mean())) < 0.05 * sigma
    assert torch.allclose(added[1] * 5, added[2], atol=1e-6), "one draw is scaled"
    assert not torch.allclose(added[1], added[3], atol=1e-3)


def test_noise_is_decided_by_seed_and_draw():
    weights = [torch.zeros(40, 5), torch.zeros(7)]
    first = draw_noise(weights, 1, 0)
    assert [noise.shape for noise in first] == [weight.shape for weight in weights]
    assert all(torch.equal(one, same) for one, same in zip(first, draw_noise(weights, 1, 0), strict=True))
    for seed, draw in ((1, 1), (0, 0), (0, 1)):
        assert not torch.equal(first[0], draw_noise(weights, seed, draw)[0])


def test_the_network_without_noise_is_what_evaluate_finds(model, batches):
    model.heads.requires_grad_(False)
    point, noisy = measure_noise(model, batches, Accelerator(), sigmas=(0.0, 0.5), draws=1, seed=0)
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    assert point["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert point["top1"] == pytest.approx(100 * float((logits.argmax(1) == targets).float().mean()))
    assert point["top1_std"] is point["loss_std"] is None
    assert noisy["loss"] != point["loss"]
    broken = measure_noise(model, batches, Accelerator(), sigmas=(1e30,), draws=2, seed=0)
    assert broken[0]["loss"] is broken[0]["loss_std"] is None


def test_the_command_draws_network_and_baseline(run, capsys):
    before = content(run)
    assert cli(["analyze", str(run), "--sigmas", "0.03,0.01", "--draws", "2", "--images", "50"]) == 0
    printed = capsys.readouterr().out
    analysis = json.loads((run / "analysis.json").read_text())
    assert printed == format_analysis(analysis) + "\n"
    after = content(run)
    assert set(after) - set(before) == FILES
    assert {name: after[name] for name in before} == before
    assert (run / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0.03 |" in (run / "analysis.md").read_text()
    assert analysis["num_samples"] == 50
    assert analysis["baseline"].startswith("run/checkpoints/baseline/checkpoint-")
    assert [point["sigma"] for point in analysis["noise"]["network"]] == [0, 0.01, 0.03]
    assert [row["name"] for row in analysis["features"]] == ["layer1", "layer2", "layer3", "fc", "baseline"]
    assert [stage["name"] for stage in analysis["gradients"]["stages"]][-1] == "fc"
    assert analysis["gradients"]["num_batches"] == 1
    assert all(stage[key] > 0 for stage in analysis["gradients"]["stages"] for key in ("network", "baseline"))
    assert len(analysis["classes"]) == 10
    assert analyze_folder(run, sigmas=(0.01, 0.03), draws=2, images=50) == analysis
    other = analyze_folder(run, sigmas=(0.01, 0.03), draws=2, images=50, seed=1)
    assert other["noise"]["network"][0] == analysis["noise"]["network"][0]
    assert other["noise"]["network"][2] != analysis["noise"]["network"][2]
    assert other["features"] == analysis["features"]


def test_without_noise_both_networks_are_those_of_the_report(run, unwritten):
    report = json.loads((run / "report.json").read_text())
    analysis = analyze_folder(run, sigmas=(), draws=1)
    network, baseline = analysis["noise"]["network"][0], analysis["noise"]["baseline"][0]
    assert network["top1"] == report["exits"][-1]["top1"]
    assert baseline["top1"] == report["baseline"]["top1"]
    assert network["loss"] != baseline["loss"]


def test_the_weights_of_the_baseline_are_those_that_were_evaluated(run):
    path, weights = SavedRun.find(run).baseline_weights()
    assert set(weights) == set(sd.from_pretrained(run / "model").state_dict())
    state = load_checkpoint(path)
    assert all(torch.equal(weights[name], state["ema"][f"module.{name}"]) for name in weights)
    name = "backbone.fc.weight"
    assert not torch.equal(weights[name], state["model"][name])
    # As a run leaves it that selects the best epoch, or that averages no weights.
    state["progress"]["best_weights"] = {name: torch.ones(10, 16)}
    save_checkpoint(path.parent, state, state["progress"]["step"])
    _, weights = SavedRun.find(run).baseline_weights()
    assert torch.equal(weights[name], torch.ones(10, 16))
    state["progress"]["best_weights"] = {}
    model = state["model"]
    save_checkpoint(path.parent, {"progress": state["progress"], "model": model}, state["progress"]["step"])
    _, weights = SavedRun.find(run).baseline_weights()
    assert all(torch.equal(weights[name], model[name]) for name in model)
    state["progress"]["epoch"] = 1
    save_checkpoint(path.parent, state, state["progress"]["step"])
    with pytest.raises(ValueError, match=r"saved after 1 of 2 epochs: the baseline is not trained to its end"):
        analyze_folder(run)


def test_another_run_may_be_the_baseline(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run, tmp_path / "other")
    other = sd.from_pretrained(tmp_path / "other" / "model")
    with torch.no_grad():
        other.backbone.fc.weight.mul_(-1)
    names = json.loads((run / "model" / "config.json").read_text())["label_names"]
    sd.save_pretrained(other, tmp_path / "other" / "model", label_names=names)
    alone = analyze_folder(run, **FEW)
    assert alone["baseline"] is alone["noise"]["baseline"] is None
    assert "There is no baseline" in format_analysis(alone)
    assert "baseline's CE" not in format_analysis(alone)
    both = analyze_folder(run, **FEW, baseline=tmp_path / "other", output=tmp_path / "out")
    assert both["baseline"] == "other"
    assert both["noise"]["network"] == alone["noise"]["network"]
    other_alone = analyze_folder(tmp_path / "other", **FEW)
    assert both["noise"]["baseline"] == other_alone["noise"]["network"] != alone["noise"]["network"]
    assert set(content(tmp_path / "out")) == FILES


def test_a_model_folder_without_a_run_needs_data(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run / "model", tmp_path / "alone"))
    assert cli(["analyze", str(folder)]) == 2
    assert "must be named with --data" in capsys.readouterr().err
    arguments = ["--data", "digits", "--sigmas", "0", "--images", "30", "image_size=16", "workers=0"]
    assert cli(["analyze", str(folder), *arguments]) == 0
    assert "there is no recipe beside the model" in capsys.readouterr().out
    analysis = json.loads((folder / "analysis.json").read_text())
    assert analysis["gradients"]["stages"][0]["network"] is None
    assert analysis["num_samples"] == 30


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["loss={name: cs-kd, preset: null}"], "the loss needs other networks or special batches"),
        (["loss.gate=0.5"], "a gate changed the gradients of the exits"),
        (["schedule.regime=frozen"], "the backbone was frozen"),
        (["teacher={name: resnet18}"], "a model from outside taught too"),
        (["loss.kd_warmup_epochs=1"], None),
        (["loss.teacher=ensemble"], None),
        (["loss.preset=none"], None),
    ],
)
def test_the_loss_of_the_run_is_taken_where_it_can_be(run, unwritten, overrides, reason):
    recipe = load_recipe(run / "recipe.yaml", overrides)
    build_loss(recipe)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    gradients = analyze_folder(run, sigmas=(0,), draws=1, images=20)["gradients"]
    assert gradients["own_loss"] == reason
    stages = gradients["stages"]
    assert all((stage["network"] is None) == (reason is not None) for stage in stages)
    if overrides == ["loss.preset=none"]:
        assert [stage["network"] for stage in stages] == pytest.approx([stage["network_ce"] for stage in stages])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "1"], "images must be 2 or more, received 1"),
        (["--draws", "0"], "draws must be 1 or more, received 0"),
        (["--seed=-1"], "seed must be 0 or more, received -1"),
        (["--sigmas=0.1,-0.1,inf"], "sigmas must be finite and 0 or more, received -0.1, inf"),
        (["--baseline", "RUN/model"], "is the model that is to be analyzed"),
        (["--baseline", "RUN/nothing"], "nothing"),
        (["--baseline", "WIDER"], "only equal backbones can be compared"),
        (["eval_split=no-such"], "has no split 'no-such'"),
    ],
)
def test_what_cannot_work_is_explained_before_anything_is_measured(run, tmp_path, capsys, arguments, message):
    wider = sd.wrap("resnet18", num_classes=10, model_kwargs={"channels": [8, 8, 16, 24], "in_chans": 1})
    sd.save_pretrained(wider, tmp_path / "wider")
    places = {"RUN": str(run), "WIDER": str(tmp_path / "wider")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert cli(["analyze", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not FILES & set(content(run))


def test_a_list_that_holds_no_numbers_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli(["analyze", "runs/digits", "--sigmas", "0.1,much"])
    assert "must be numbers between commas" in capsys.readouterr().err


def test_the_picture_leaves_out_what_is_no_number(run, unwritten):
    analysis = analyze_folder(run, **FEW)
    analysis["noise"]["network"][1]["loss"] = analysis["noise"]["network"][1]["loss_std"] = None
    analysis["gradients"]["stages"][0]["baseline"] = None
    analysis["features"][0]["scatter"]["ratio"] = None
    figure = draw_analysis(analysis)
    FigureCanvasAgg(figure).draw()
    titles = [axes.get_title() for axes in figure.axes]
    assert "0: layer1\nwithin / between n/a" in titles
    assert any(title.startswith("baseline\nwithin / between ") for title in titles)
    loss = figure.axes[1].containers[0].lines[0].get_ydata()
    assert math.isnan(loss[1])
    assert not math.isnan(loss[0])
    lines = format_analysis(analysis).splitlines()
    assert lines[0].split()[:3] == ["noise", "top-1", "%"]
    assert "n/a" in lines[3]
