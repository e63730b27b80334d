"""Training from recipes, in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState
from once import once
from PIL import Image

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.losses import SelfDistillationLoss
from timm_selfdistill.losses.protocol import _LOSSES
from timm_selfdistill.recipe import Recipe, list_recipes, load_recipe
from timm_selfdistill.report import format_markdown
from timm_selfdistill.train import evaluate_folder, train, trainer
from timm_selfdistill.train.builders import build_loss, check_one_image, self_distillation_phases
from timm_selfdistill.train.launch import per_process_batch
from timm_selfdistill.train.saved_run import evaluation_loaders

# In float32: at 16 px, bf16 convolutions of oneDNN leave the gradient of weights that only meet padding undefined.
SMALL = (
    "epochs=1",
    "batch_size=16",
    "data.max_train=64",
    "data.max_eval=40",
    "data.image_size=16",
    "precision='no'",
    "baseline=false",
)


def small_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, f"output_dir={folder}", *overrides])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of the small recipe; only to be read."""
    return once(tmp_path_factory, "trained", lambda folder: train(small_recipe(folder)))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model" / name for name in ("model.safetensors", "exits.safetensors")]
    return {f"{file.name}:{k}": v for file in files for k, v in safetensors.torch.load_file(file).items()}


@pytest.mark.whole_reports
def test_a_run_writes_what_the_design_promises(tmp_path):
    recipe = small_recipe(tmp_path, "baseline=true", "epochs=2")
    report = train(recipe)

    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [row["name"] for row in report["exits"]] == ["layer1", "layer2", "layer3", "fc"]
    assert report["baseline"] is not None
    assert report["num_samples"] == 40
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "exits.safetensors",
        "README.md",
    }
    assert format_markdown(report) in (tmp_path / "model" / "README.md").read_text()
    assert format_markdown(report) in (tmp_path / "report.md").read_text()
    assert Image.open(tmp_path / "report.png").width > 500
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"baseline", "self-distilled"}

    logged = lines(tmp_path)
    trained = [entry for entry in logged if "self-distilled/train/loss" in entry]
    assert {entry["network"] for entry in trained} == {"self-distilled"}
    terms = {f"self-distilled/train/{term}/{k}" for term in ("ce", "kd") for k in range(4)}
    assert terms <= set(trained[0])
    assert trained[-1]["step"] == 2 * 4
    validated = [entry for entry in logged if "self-distilled/validation/top1/ensemble" in entry]
    assert [entry["epoch"] for entry in validated] == [1, 2]


def test_the_saved_model_is_the_evaluated_one_and_plain_timm_reads_it(trained):
    ours = sd.from_pretrained(trained / "model")
    plain = timm.create_model(f"local-dir:{trained / 'model'}", pretrained=True).eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain(x), ours(x))
        assert torch.equal(plain(x), ours(x, return_exits=True).logits[-1])
    data_config = timm.data.resolve_model_data_config(plain)
    assert data_config["input_size"] == (1, 16, 16)


def test_the_ensemble_is_fitted_on_held_out_images_and_saved_and_reported(tmp_path, trained):
    report = json.loads((trained / "report.json").read_text())
    model, recipe = sd.from_pretrained(trained / "model"), load_recipe(trained / "recipe.yaml")
    data = open_dataset(recipe.data, recipe.seed)
    assert len(data.validation) == model.ensemble.images == report["fitted_ensemble"]["images"] == 40
    assert list(model.ensemble.weights) == report["fitted_ensemble"]["weights"]
    input_config = InputConfig.from_model(model.backbone, recipe.data)
    batches = evaluation_loaders(data, recipe, recipe.augment, input_config, SkipList()).validation
    again = sd.fit_ensemble(sd.from_pretrained(trained / "model"), batches)
    assert model.ensemble.weights == pytest.approx(again.weights, abs=1e-4)
    assert "fitted ensemble" in (trained / "model" / "README.md").read_text()
    evaluated = evaluate_folder(trained)
    for key in ("top1", "ece", "weights", "images"):
        assert evaluated["fitted_ensemble"][key] == pytest.approx(report["fitted_ensemble"][key]), key

    without = train(small_recipe(tmp_path, "data.validation=0", "schedule.select=last"))
    assert without["fitted_ensemble"] is None
    assert sd.from_pretrained(tmp_path / "model").ensemble.is_mean


def test_the_loss_falls_and_the_same_seed_gives_the_same_weights(tmp_path):
    longer = ("epochs=3", "data.max_train=192", "data.validation=0", "augment.scale=[1.0,1.0]")
    train(small_recipe(tmp_path / "a", *longer))
    train(small_recipe(tmp_path / "b", *longer))
    losses = [entry["self-distilled/train/loss"] for entry in lines(tmp_path / "a")]
    assert losses[-1] < 0.9 * losses[0]
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    train(small_recipe(tmp_path / "c", *longer, "seed=1"))
    assert any(not torch.equal(first[name], value) for name, value in weights(tmp_path / "c").items())


def test_baseline_and_self_distilled_network_start_from_the_same_weights(tmp_path, monkeypatch):
    starts = {}
    run = trainer.Trainer.run

    def remember(self):
        starts[self.name] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return run(self)

    monkeypatch.setattr(trainer.Trainer, "run", remember)
    train(small_recipe(tmp_path, "baseline=true"))
    assert set(starts) == {"baseline", "self-distilled"}
    assert all(torch.equal(starts["baseline"][name], value) for name, value in starts["self-distilled"].items())


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused(tmp_path, trained, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = weights(tmp_path)
    monkeypatch.setattr(trainer.Trainer, "_step", lambda *args: pytest.fail("trained again"))
    train(small_recipe(tmp_path))
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())
    with pytest.raises(ValueError, match=r"another recipe: optimizer\.lr \(0\.05, now 0\.01\)"):
        train(small_recipe(tmp_path, "optimizer.lr=0.01"))
    with pytest.raises(ValueError, match="already holds a run"):
        train(small_recipe(tmp_path, "resume=never"))
    with pytest.raises(ValueError, match="is not a checkpoint of this run"):
        train(small_recipe(tmp_path, f"resume={tmp_path}"))


def test_frozen_trains_the_exits_only(tmp_path, monkeypatch):
    starts = []
    run = trainer.Trainer.run
    monkeypatch.setattr(
        trainer.Trainer,
        "run",
        lambda self: (starts.append({k: v.clone() for k, v in self.model.state_dict().items()}), run(self))[1],
    )
    train(small_recipe(tmp_path, "schedule.regime=frozen", "model.channels_last=false"))
    trained = sd.from_pretrained(tmp_path / "model").state_dict()
    for name, value in starts[0].items():
        if name.startswith("backbone."):
            assert torch.equal(value, trained[name]), name
    assert not torch.equal(starts[0]["heads.0.classifier.weight"], trained["heads.0.classifier.weight"])


def test_mixed_trains_the_backbone_first(tmp_path):
    mixed = ("schedule.regime=mixed", "schedule.backbone_epochs=1", "epochs=3", "schedule.cooldown_epochs=1")
    train(small_recipe(tmp_path, *mixed))
    entries = [entry for entry in lines(tmp_path) if "self-distilled/train/loss" in entry]
    assert [(entry["epoch"], "self-distilled/train/kd/0" in entry) for entry in entries] == [
        (1, False),
        (2, True),
        (3, True),
        (4, True),
    ]
    # Each phase has a schedule of its own, and only the cool-down ends at the lowest rate.
    assert [entry["self-distilled/train/lr"] > 0 for entry in entries] == [True, True, True, False]


def test_accumulation_gives_the_same_gradients_as_one_large_batch(tmp_path):
    same = (
        "model.name=test_vit",
        "model.kwargs={in_chans: 1, img_size: 16}",
        "data.validation=0",
        "augment.scale=[1.0,1.0]",
        "augment.ratio=[1.0,1.0]",
    )
    train(small_recipe(tmp_path / "one", *same))
    train(small_recipe(tmp_path / "four", *same, "optimizer.accumulate=4"))
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert all(torch.allclose(one[name], four[name], atol=1e-5) for name in one)


def test_options_of_the_loop_work_together(tmp_path, monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: plain(model, backend="eager", fullgraph=True))
    report = train(
        small_recipe(
            tmp_path,
            "compile=true",
            "epochs=2",
            "ema={decay: 0.5, warmup: true}",
            "optimizer.clip_grad=0.02",
            "optimizer.clip_mode=agc",
            "optimizer.name=adamw",
            "optimizer.lr=1e-3",
            "optimizer.layer_decay=0.75",
            "augment.mixup_alpha=0.2",
            "augment.cutmix_alpha=1.0",
            "loss.label_smoothing=0.1",
            "loss.preset=byot-tpami2021",
            "exits.hint_adapter=true",
            "exits.head=sepconv_attention",
            "schedule.select=best",
        )
    )
    assert len(report["exits"]) == 4
    assert not any("_orig_mod" in name for name in weights(tmp_path))


def test_more_classes_than_the_data_has_are_warned_about(tmp_path, caplog):
    with pytest.raises(ValueError, match="less than one batch"):  # before it trains
        train(small_recipe(tmp_path, "model.num_classes=12", "batch_size=4096"))
    assert "12 is more than the 10 classes of digits: classes 10 to 11 have no training image" in caplog.text


def test_label_smoothing_is_applied_once(tmp_path):
    plain = load_recipe("digits", ["loss.label_smoothing=0.1"])
    assert build_loss(plain).config.label_smoothing == 0.1
    mixing = load_recipe("digits", ["loss.label_smoothing=0.1", "augment.mixup_alpha=0.2"])
    assert build_loss(mixing).config.label_smoothing == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp16", "fp16 does nothing on a CPU"),
        ("trackers=[nonsense]", "nonsense cannot be used"),
        ("optimizer.accumulate=2", "an epoch has only 1"),
        ("model.num_classes=3", "less than the 10 classes"),
        ("model.name=resnet81", "model.name: must be the name of a timm model, received 'resnet81'; did you mean"),
        ("optimizer.name=sgdd", "optimizer.name: unknown, received 'sgdd'; did you mean 'sgd"),
        (
            "loss.preset=byot",
            "loss.preset: unknown, received 'byot'; known are byot-iccv2019, byot",
        ),
        ("exits.head=round", "exits.head: unknown"),
        ("exits.points=[layer9]", "no module 'layer9'; did you mean 'layer"),
        ("data.path=./nowhere", "nowhere"),
        ("loss.divergence_kwargs={beta: 8}", "'kl' has no setting beta"),
        ("loss.exit_weights=[1,2]", "exit_weights has 2 values for 3 added exits"),
        ("loss.teacher=ema", "ema: must not be null for this loss"),
        (
            "loss={name: cs-kd, kwargs: {temperature: 0}}",
            "temperature is 0; allowed is a finite number, from 1e-06 to 1000",
        ),
        ("loss={name: ps-kd, temperature: 2.0}", "temperature are settings of self-distillation"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch, override, message):
    monkeypatch.setattr(trainer.Trainer, "_train_epoch", lambda *args: pytest.fail("training began"))
    extra = ["batch_size=24", "data.max_train=20", "data.validation=0"] if "accumulate" in override else []
    with pytest.raises(ValueError, match=message):
        train(small_recipe(tmp_path, override, *extra))


def test_the_global_batch_must_divide_evenly():
    recipe = load_recipe("digits", ["batch_size=64"])
    assert per_process_batch(recipe, 2) == 32
    with pytest.raises(ValueError, match="multiples of 3"):
        per_process_batch(recipe, 3)


def test_one_image_is_refused_where_batch_norm_cannot_train_on_it(tmp_path):
    network = ["model={name: resnet18, kwargs: {in_chans: 1, channels: [8, 8, 16, 16]}}", "data.workers=0"]
    message = (
        r"batch_size: 8 leaves one image for each of 1 process\(es\) and optimizer\.accumulate=8 micro batch\(es\), "
        r"which the batch norm of resnet18 cannot train on at 16 x 16 pixels; allowed are multiples of 8 from 16 on"
    )
    single = ["batch_size=8", "optimizer.accumulate=8"]
    with pytest.raises(ValueError, match=message):
        train(small_recipe(tmp_path, *network, *single))
    assert not (tmp_path / "recipe.yaml").exists()
    # The mended recipe runs in the same folder, and so does a network that needs no second image.
    AcceleratorState._reset_state(True)
    train(small_recipe(tmp_path, *network, "batch_size=16", "optimizer.accumulate=8"))
    AcceleratorState._reset_state(True)
    transformer = ["model={name: test_vit, kwargs: {in_chans: 1, img_size: 16}}", "data.workers=0"]
    train(small_recipe(tmp_path / "vit", *transformer, *single))


def test_looking_at_one_image_leaves_a_network_as_it_was():
    recipe = small_recipe(Path("none"), "batch_size=1")
    model = sd.wrap("resnet18", num_classes=10, image_size=64, small_stem=True, model_kwargs={"in_chans": 1})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    input = InputConfig(1, (64, 64), (0.5,), (0.5,), "bilinear", 1.0)
    model.eval()
    torch.manual_seed(3)
    check_one_image(model, input, self_distillation_phases(recipe), recipe, 1)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_settings_that_another_loss_would_ignore_are_refused(monkeypatch):
    registered = {"needs_exits": True, "forward": lambda self, out, target: {"loss": out.logits[-1].sum()}}
    monkeypatch.setitem(_LOSSES._entries, "test-loss", type("TestLoss", (torch.nn.Module,), registered))
    with pytest.raises(ValueError, match=r"temperature are settings of self-distillation"):
        build_loss(load_recipe("digits", ["loss.name=test-loss", "loss.temperature=4"]))
    assert type(build_loss(load_recipe("digits", ["loss.name=test-loss"]))).__name__ == "TestLoss"


@pytest.mark.parametrize("name", ["cs-kd", "dlb"])
def test_data_that_cannot_give_a_losss_batches_are_refused(name):
    with pytest.raises(
        ValueError, match=r"data\.streaming: must be false for this loss, whose (paired|repeated) batches"
    ):
        self_distillation_phases(
            load_recipe("digits", [f"loss.name={name}", "data.streaming=true", "data.validation=0"])
        )
    with pytest.raises(ValueError, match="augment: must not mix images for this loss"):
        self_distillation_phases(load_recipe("digits", [f"loss.name={name}", "augment.mixup_alpha=0.2"]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", r"optimizer\.accumulate"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "compile: true"),
    ],
)
def test_settings_of_the_launcher_that_belong_to_the_recipe_are_refused(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(small_recipe(tmp_path))


@pytest.fixture(scope="module")
def colour_images(tmp_path_factory):
    """Two classes of 12 small colour images each, as an image folder and as parquet with other column names."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            folder = root / "folder" / split / name
            folder.mkdir(parents=True)
            for index in range(12):
                pixels = rng.integers(120 * label, 120 * label + 120, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    for split, name in (("train", "train"), ("validation", "test")):
        loaded = datasets.load_dataset("imagefolder", data_dir=str(root / "folder"), cache_dir=str(root / "cache"))
        rows = loaded[split].rename_columns({"image": "img", "label": "fine_label"})
        (root / "parquet").mkdir(exist_ok=True)
        table = datasets.table.embed_table_storage(rows.data.table)
        datasets.Dataset(datasets.table.InMemoryTable(table)).to_parquet(root / "parquet" / f"{name}.parquet")
    return root


def test_streamed_data_trains_and_counts_every_sample_once(tmp_path, colour_images):
    streamed = [
        "epochs=2",
        "batch_size=4",
        "baseline=false",
        "precision='no'",
        f"data.path={colour_images / 'parquet'}",
        "data.image=img",
        "data.target=fine_label",
        "data.streaming=true",
        "data.validation=0",
        "data.train_size=24",
        "data.workers=0",
        "data.image_size=32",
        "model.kwargs.in_chans=3",
        f"output_dir={tmp_path}",
    ]
    report = train(load_recipe("digits", streamed))
    assert report["num_samples"] == 24
    assert [entry["step"] for entry in lines(tmp_path)] == [6, 12]


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_trains_an_epoch(tmp_path, colour_images, name):
    recipe = load_recipe(name)
    overrides = ["epochs=1", "batch_size=4", "data.workers=0", f"output_dir={tmp_path}", "baseline=false"]
    overrides += ["schedule.warmup_epochs=0", "model.pretrained=false", "data.max_train=10", "data.max_eval=6"]
    if name != "digits":
        columns = recipe.data.image == "img"
        overrides += [f"data.path={colour_images / ('parquet' if columns else 'folder')}", "data.name=null"]
        overrides += ["data.image_size=32", "model.num_classes=null"]
    report = train(load_recipe(name, overrides))
    assert len(report["exits"]) == 4
    assert sd.from_pretrained(tmp_path / "model").num_exits == 3


def test_the_command_line_evaluates_lists_and_explains(tmp_path, capsys):
    run = tmp_path / "run"
    overrides = [*SMALL, f"output_dir={run}"]
    assert cli(["train", "digits", *overrides]) == 0
    assert "layer1" in capsys.readouterr().out
    trained = json.loads((run / "report.json").read_text())
    assert cli(["evaluate", str(run), "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    for key in ("top1", "top5", "ece", "params", "macs"):
        assert [row[key] for row in again["exits"]] == pytest.approx([row[key] for row in trained["exits"]]), key
    assert cli(["evaluate", str(run / "model"), "--data", "digits", "max_eval=40", "image_size=16"]) == 0
    capsys.readouterr()
    assert cli(["train", "digit"]) == 2
    assert "did you mean 'digits'" in capsys.readouterr().err
    assert cli(["evaluate", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli(["evaluate", str(run), "--device", "cuda"])
    assert "unrecognized arguments: --device cuda" in capsys.readouterr().err
    assert cli(["recipes"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in listed] == list_recipes()
    assert dict(listed)["imagefolder-vit"] == "Fine-tune a pretrained ViT-Small on your own images"


def test_evaluation_refuses_other_classes(trained, colour_images, capsys):
    assert cli(["evaluate", str(trained), "--data", str(colour_images / "folder"), "eval_split=validation"]) == 2
    assert "they must be the same" in capsys.readouterr().err
    assert cli(["evaluate", str(trained), "--data", "digits", "eval_split=train", "max_eval=20"]) == 0


@pytest.mark.parametrize("cache", ["null", "device"])
def test_uneven_classes_are_balanced_by_sampling_and_by_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    counts = [30, 8, 2]
    for split, parts in (("train", counts), ("test", [2, 2, 2])):
        for index, count in enumerate(parts):
            (tmp_path / "data" / split / f"class{index}").mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (16, 16), 80 * index + number + 40 * (split == "test"))
                image.save(tmp_path / "data" / split / f"class{index}" / f"{number}.png")
    seen, losses = [], []
    forward = SelfDistillationLoss.forward

    def watched(self: Any, out: Any, target: torch.Tensor, **given: Any) -> Any:
        seen.append(target)
        losses.append(self.config.class_weights)
        return forward(self, out, target, **given)

    monkeypatch.setattr(SelfDistillationLoss, "forward", watched)
    fields = (f"data.path={tmp_path / 'data'}", "data.val=0", "batch_size=8", f"data.cache={cache}", "baseline=true")
    train(small_recipe(tmp_path / "sampled", *fields, "data.sampling=balanced"))
    assert sorted(np.bincount(torch.cat(seen)).tolist()) == [26, 26, 28], "the 40 images of an epoch, for two networks"
    seen.clear()
    losses.clear()
    train(small_recipe(tmp_path / "weighted", *fields, "loss.class_weights=balanced"))
    assert {tuple(np.round(weights, 6)) for weights in losses} == {
        tuple(round(40 / 3 / count, 6) for count in counts)
    }, "those of the baseline too"
    with pytest.raises(ValueError, match="class_weights has 2 values for 3 classes"):
        train(small_recipe(tmp_path / "few", *fields, "loss.class_weights=[1, 2]"))
