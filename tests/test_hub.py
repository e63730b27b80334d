import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill import hub
from timm_selfdistill.hub import BACKBONE, CARD, CONFIG, EXITS, Training, class_names, model_card
from timm_selfdistill.hub.card import card_for_repository
from timm_selfdistill.model import SelfDistillModel

CLASSES = 7
NARROW = {"channels": (16, 32, 64, 128)}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}

# Arguments of `wrap` by case: one for each way in which what must be remembered differs.
CASES: dict[str, dict[str, Any]] = {
    "resnet": {"backbone": "resnet18", "model_kwargs": NARROW},
    "small stem": {"backbone": "resnet18", "small_stem": True, "image_size": 32, "model_kwargs": NARROW},
    "grayscale": {
        "backbone": "resnet18",
        "small_stem": True,
        "image_size": (24, 32),
        "head": "bottleneck",
        "head_kwargs": {"width": 8},
        "model_kwargs": {**NARROW, "in_chans": 1},
    },
    "vit": {"backbone": "vit_tiny_patch16_224", "exits": [0, 2], "model_kwargs": TINY_VIT},
    "swin": {
        "backbone": "swin_tiny_patch4_window7_224",
        "model_kwargs": {
            "img_size": 32,
            "window_size": 2,
            "embed_dim": 24,
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 4, 8),
        },
    },
    "convnext": {
        "backbone": "convnext_atto",
        "head": "sepconv_attention",
        "hint_adapter": True,
        "model_kwargs": {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)},
    },
}
plain_cases = pytest.mark.parametrize("case", [case for case in CASES if not CASES[case].get("small_stem")])
all_cases = pytest.mark.parametrize("case", CASES)


def make_model(case: str = "resnet", seed: int = 0) -> SelfDistillModel:
    """Return the model of a case, its batch statistics moved, in eval mode."""
    torch.manual_seed(seed)
    kwargs = dict(CASES[case])
    model = sd.wrap(kwargs.pop("backbone"), num_classes=CLASSES, **kwargs).train()
    with torch.no_grad():
        model(images(model, seed=2), return_exits=True)
    return model.eval()


def images(model: SelfDistillModel, seed: int = 1) -> Tensor:
    """Return images of the model's number of channels, [4, C, 32, 32]."""
    return torch.randn(4, model.backbone.in_chans, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: SelfDistillModel) -> list[Tensor]:
    """Return logits and features of all exits."""
    out = model(images(model), return_exits=True)
    return [*out.logits, *out.features]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether two lists of tensors are equal bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@all_cases
def test_a_loaded_model_gives_the_same_bits_at_every_exit(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    assert sd.save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = sd.from_pretrained(tmp_path / "new" / "folder")
    assert same(outputs(loaded), outputs(model))
    assert not any(module.training for module in loaded.modules())
    assert loaded.num_classes == CLASSES
    assert loaded.exit_names == model.exit_names
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }


@all_cases
def test_a_loaded_model_is_saved_to_the_same_files(case: str, tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(CLASSES)]
    sd.save_pretrained(make_model(case), tmp_path / "first", label_names=names)
    sd.save_pretrained(sd.from_pretrained(tmp_path / "first"), tmp_path / "second", label_names=names)
    for name in (BACKBONE, EXITS, CARD):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    first, second = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("first", "second"))
    assert first["timm_selfdistill"] == second["timm_selfdistill"]
    assert first["model_args"] == second["model_args"]


def test_the_methods_are_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("resnet")
    names = [f"class {index}" for index in range(CLASSES)]
    assert model.save_pretrained(tmp_path / "method", label_names=names) == tmp_path / "method"
    sd.save_pretrained(model, tmp_path / "function", label_names=names)
    for name in (BACKBONE, EXITS, CARD, CONFIG):
        assert (tmp_path / "method" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    loaded = SelfDistillModel.from_pretrained(tmp_path / "method")
    assert isinstance(loaded, SelfDistillModel)
    assert class_names(loaded) == tuple(names)
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    monkeypatch.setattr(hub, "push_to_hub", lambda *args, **options: (args, options))
    assert model.push_to_hub("me/net", private=True) == ((model, "me/net"), {"private": True})


@plain_cases
def test_plain_timm_loads_the_backbone_bit_for_bit(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    plain = timm.create_model(f"local-dir:{sd.save_pretrained(model, tmp_path)}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(plain(x), model(x, return_exits=True).logits[-1])


@plain_cases
def test_the_number_of_classes_stands_once_among_what_builds_the_backbone(case: str, tmp_path: Path) -> None:
    """As transformers' wrapper of timm builds it: its own arguments beside `model_args`."""
    config = json.loads((sd.save_pretrained(make_model(case), tmp_path) / CONFIG).read_text())
    built = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    built.load_state_dict(safetensors.torch.load_file(tmp_path / BACKBONE))
    assert built.num_classes == CLASSES


def test_plain_timm_needs_no_help_of_this_package(tmp_path: Path) -> None:
    model = make_model("convnext")
    sd.save_pretrained(model, tmp_path / "model")
    x = images(model)
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, timm, safetensors.torch as st\n"
        "plain = timm.create_model('local-dir:model', pretrained=True).eval()\n"
        "st.save_file({'logits': plain(st.load_file('x.safetensors')['x']).detach()}, 'logits.safetensors')\n"
        "assert 'timm_selfdistill' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=900)
    with torch.no_grad():
        assert torch.equal(safetensors.torch.load_file(tmp_path / "logits.safetensors")["logits"], model(x))


@all_cases
def test_the_model_card_shows_code_that_loads_the_model(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    sd.save_pretrained(model, tmp_path)
    card = (tmp_path / CARD).read_text()
    plain_code, own_code, fast_code = (
        code.replace("FOLDER)", f"{str(tmp_path)!r})").replace("FOLDER", str(tmp_path))
        for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    )
    x = images(model)
    plain: dict[str, Any] = {}
    exec(plain_code, plain)
    assert "timm_selfdistill" not in plain_code
    assert torch.equal(plain["model"].eval()(x), outputs(model)[model.num_exits])
    own: dict[str, Any] = {"x": x}
    exec(own_code, own)
    assert same([*own["out"].logits, *own["out"].features], outputs(model))
    with torch.no_grad():
        exec(fast_code, own)
        assert same([*own["out"]], [*sd.EarlyExit(model, 0.9)(x)])
    assert f"{CLASSES} classes" in card
    assert all(f"`{name}`" in card for name in model.exit_names)


def make_training() -> Training:
    """Return the results of a run with one exit, whose accuracy was not a number, and the backbone's."""
    rows = [{"index": 0, "name": "layer1", "top1": None}, {"index": 1, "name": "fc", "top1": 81.239}]
    report = {"exits": rows, "ensemble": {"top1": 82.0}, "dataset": "my data, test"}
    report["fitted_ensemble"] = {"top1": 83.0}
    return Training("/data/my data", False, None, "epochs: 3\n", report, "## The table\n")


def test_the_card_of_a_run_holds_its_results_in_the_hubs_form() -> None:
    card = model_card(make_model(), make_training())
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("timm", "image-classification", ["accuracy"])
    assert {"timm", "timm_selfdistill"} <= set(data.tags)
    assert [
        (r.dataset_name, r.dataset_type, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results
    ] == [
        ("my data, test", "/data/my-data", "accuracy", "top-1 accuracy in percent (exit 1, fc)", 81.24),
        ("my data, test", "/data/my-data", "accuracy", "top-1 accuracy in percent (ensemble)", 82.0),
        ("my data, test", "/data/my-data", "accuracy", "top-1 accuracy in percent (fitted ensemble)", 83.0),
    ]
    assert "## The table" in card
    assert "```yaml\nepochs: 3\n```" in card
    assert ModelCard(model_card(make_model())).data.eval_results is None


def test_the_card_names_licence_data_set_and_origin() -> None:
    training = Training("uoft-cs/cifar100", True, "timm/resnet18.a1_in1k", "epochs: 3\n")
    card = model_card(make_model(), training, license="apache-2.0")
    data = ModelCard(card).data
    assert (data.license, data.datasets, data.base_model) == (
        "apache-2.0",
        ["uoft-cs/cifar100"],
        "timm/resnet18.a1_in1k",
    )
    assert "on [uoft-cs/cifar100](https://huggingface.co/datasets/uoft-cs/cifar100), from the weights of [timm" in card
    assert "Licence: apache-2.0." in card
    here = model_card(make_model(), make_training())
    assert "as its own teacher on `/data/my data`. Licence: not stated." in here
    assert (ModelCard(here).data.license, ModelCard(here).data.datasets) == (None, None)


def test_a_licence_that_is_given_at_the_push_is_the_cards() -> None:
    model = make_model()
    for before in (None, "mit"):
        card = f"{model_card(model, make_training(), license=before)}\nMy own words.\n"
        pushed = card_for_repository(card, model, "me/net", license="cc-by-4.0")
        assert ModelCard(pushed).data.license == "cc-by-4.0"
        assert len(ModelCard(pushed).data.eval_results) == 3
        assert pushed.count("Licence: cc-by-4.0.") == pushed.count("Licence: ") == 1
        assert pushed.rstrip().endswith("My own words.")


def test_early_exit_is_saved_with_the_model(tmp_path: Path) -> None:
    model = make_model()
    fast = sd.EarlyExit(model, [0.2, math.inf, 0.25], rule="margin", temperatures=[1, 2, 3], fallback="ensemble")
    sd.save_pretrained(model, tmp_path, early_exit=fast.config)
    loaded = sd.load_early_exit(tmp_path)
    assert loaded.config == fast.config
    assert same([*loaded(images(model))], [*fast(images(model))])
    assert "Infinity" not in (tmp_path / CONFIG).read_text()  # which is not JSON
    card = (tmp_path / CARD).read_text()
    assert "fast = sd.load_early_exit(FOLDER)" in card
    assert 'sd.load_early_exit("me/net")' in card_for_repository(card, model, "me/net", early_exit=fast.config)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)

    sd.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="has no early-exit settings; with thresholds of your own"):
        sd.load_early_exit(tmp_path)
    with pytest.raises(ValueError, match="1 thresholds for 3 exits"):
        sd.save_pretrained(model, tmp_path, early_exit=sd.EarlyExitConfig((0.5,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "mood"}, "Unknown rule 'mood'; known are"),
        ({"thresholds": ["high", 1, 1]}, "allowed are numbers"),
        ({"thresholds": 3}, "thresholds are 3 .* allowed are lists of numbers"),
        ({"thresholds": [0.5]}, "1 thresholds for 3 exits"),
        ({"colour": "red"}, "must be an object with the keys costs, fallback, rule"),
    ],
)
def test_damaged_early_exit_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = sd.EarlyExitConfig((0.5, 0.5, 0.5))
    sd.save_pretrained(make_model(), tmp_path, early_exit=config)
    describe(early_exit=config.to_json() | settings)(tmp_path)
    with pytest.raises(ValueError, match=message):
        sd.load_early_exit(tmp_path)


@all_cases
def test_the_card_in_a_repository_tells_how_to_load_from_there(case: str) -> None:
    model = make_model(case)
    card = f"{model_card(model, make_training())}\nMy own words.\n"
    pushed = card_for_repository(card, model, "me/net")
    assert "FOLDER" not in pushed
    assert 'timm.create_model("hf-hub:me/net", pretrained=' in pushed
    assert 'sd.from_pretrained("me/net")' in pushed
    assert "](report.png)" in pushed
    assert pushed.endswith("\nMy own words.\n")
    for code in re.findall(r"```python\n(.*?)```", pushed, flags=re.DOTALL):
        compile(code, "card", "exec")


def test_a_card_of_ones_own_is_written_as_it_is(tmp_path: Path) -> None:
    sd.save_pretrained(make_model(), tmp_path, card="# Mine\n")
    assert (tmp_path / CARD).read_text() == "# Mine\n"


def test_a_channels_last_model_is_saved_to_the_same_files_as_a_contiguous_one(tmp_path: Path) -> None:
    model = make_model("convnext")
    sd.save_pretrained(model, tmp_path / "contiguous")
    sd.save_pretrained(copy.deepcopy(model).to(memory_format=torch.channels_last), tmp_path / "channels_last")
    for name in (BACKBONE, EXITS, CONFIG):
        assert (tmp_path / "contiguous" / name).read_bytes() == (tmp_path / "channels_last" / name).read_bytes()
    assert same(outputs(sd.from_pretrained(tmp_path / "channels_last")), outputs(model))


def test_labels_and_preprocessing_reach_plain_timm(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    data_config = {
        "input_size": (3, 48, 40),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    }
    sd.save_pretrained(make_model(), tmp_path, label_names=names, data_config=data_config)
    assert json.loads((tmp_path / CONFIG).read_text())["label_names"] == names
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for backbone in (plain, sd.from_pretrained(tmp_path).backbone):
        resolved = resolve_model_data_config(backbone, use_test_size=True)
        resolved |= {key: tuple(resolved[key]) for key in ("mean", "std")}  # read from JSON, timm keeps these as lists
        assert {key: resolved[key] for key in data_config} == data_config
        assert list(backbone.pretrained_cfg["label_names"]) == names


def test_exits_do_not_depend_on_the_saved_input_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # On an 8 px image layer3 has a grid of one: its head would be built smaller than at the dry run's 224 px.
    model = sd.wrap("resnet18", num_classes=CLASSES, exits=["layer2.1", "layer3.0"], model_kwargs=NARROW).eval()
    sd.save_pretrained(model, tmp_path, data_config={"input_size": (3, 8, 8)})
    assert same(outputs(sd.from_pretrained(tmp_path)), outputs(model))


def test_what_was_true_of_the_pretrained_weights_only_is_not_kept(tmp_path: Path) -> None:
    backbone = timm.create_model("convnextv2_atto.fcmae_ft_in1k", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    original = backbone.pretrained_cfg
    assert original["tag"] == "fcmae_ft_in1k"
    assert original["license"] == "cc-by-nc-4.0"
    sd.save_pretrained(sd.wrap(backbone, exits=2, head="linear", image_size=64), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert not [word for word in ("fcmae", "cc-by-nc", "fbaipublicfiles", "hf_hub_id") if word in text]
    assert "license:" not in (tmp_path / CARD).read_text()
    reloaded = timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg
    assert reloaded["tag"] == "selfdistill"
    assert not any(reloaded.get(key) for key in ("license", "origin_url", "url", "hf_hub_id"))
    assert backbone.pretrained_cfg == original


def test_a_folder_holds_four_files_and_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    model = make_model()
    sd.save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([BACKBONE, CONFIG, EXITS, CARD])
    assert set(safetensors.torch.load_file(tmp_path / BACKBONE)) == set(model.backbone.state_dict())
    assert set(safetensors.torch.load_file(tmp_path / EXITS)) == set(model.heads.state_dict())
    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    assert same(outputs(sd.from_pretrained(tmp_path)), outputs(model))


def test_others_may_read_the_files_where_the_umask_lets_them(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        sd.save_pretrained(make_model(), tmp_path)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def cut(name: str) -> Callable[[Path], None]:
    """Return a damage: the second half of a file is lost."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    """Return a damage: one bit of the last byte is another."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    """Return a damage: a file is missing."""
    return lambda folder: (folder / name).unlink()


def swap(folder: Path) -> None:
    """Exchange the two files of weights."""
    (folder / BACKBONE).rename(folder / "other")
    (folder / EXITS).rename(folder / BACKBONE)
    (folder / "other").rename(folder / EXITS)


def exchange(folder: Path) -> None:
    """Put the exits of another model of the same shapes in place of the model's own."""
    sd.save_pretrained(make_model(seed=5), folder / "other")
    (folder / "other" / EXITS).replace(folder / EXITS)


def configure(**changes: Any) -> Callable[[Path], None]:
    """Return a damage: top-level keys of the configuration are others."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return damage


def describe(**changes: Any) -> Callable[[Path], None]:
    """Return a damage: keys below our key of the configuration are others, or gone where None."""

    def damage(folder: Path) -> None:
        ours = json.loads((folder / CONFIG).read_text())["timm_selfdistill"] | changes
        configure(timm_selfdistill={key: value for key, value in ours.items() if value is not None})(folder)

    return damage


def rewrite(text: str) -> Callable[[Path], None]:
    """Return a damage: the configuration is another text."""
    return lambda folder: (folder / CONFIG).write_text(text) and None


def forge(folder: Path) -> None:
    """Put a file that is not of safetensors, with the right checksum."""
    (folder / EXITS).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    sums = json.loads((folder / CONFIG).read_text())["timm_selfdistill"]["sha256"]
    describe(sha256=sums | {EXITS: empty})(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(BACKBONE), "model.safetensors is damaged or was exchanged"),
        (cut(EXITS), "exits.safetensors is damaged or was exchanged"),
        (cut(CONFIG), "config.json is damaged"),
        (flip(BACKBONE), "model.safetensors is damaged or was exchanged"),
        (flip(EXITS), "exits.safetensors is damaged or was exchanged"),
        (remove(BACKBONE), "model.safetensors is missing"),
        (remove(EXITS), "exits.safetensors is missing"),
        (remove(CONFIG), "there is no config.json"),
        (swap, "damaged or was exchanged"),
        (exchange, "exits.safetensors is damaged or was exchanged"),
        (forge, "exits.safetensors is not a safetensors file"),
        (rewrite("[]"), "no key 'timm_selfdistill'"),
        (rewrite("\0"), "config.json is damaged"),
        (configure(timm_selfdistill=3), "no key 'timm_selfdistill'"),
        (configure(architecture="resnet19"), "cannot be built.*resnet19"),
        (configure(model_args={"channels": [16, 32, 64, 64]}), "does not fit the model"),
        (configure(model_args={"chanels": [16]}), "cannot be built.*chanels"),
        (describe(format_version=2), "format version 2.*reads 1.*upgrade"),
        (describe(sha256=None), "in 'timm_selfdistill', sha256: Field required"),
        (describe(sha256={}), "damaged or was exchanged"),
        (describe(colour="red"), "in 'timm_selfdistill', colour: Unexpected keyword argument"),
        (describe(exits=["layer1", "layer2", "layer9"]), "cannot be built.*layer9"),
        (describe(exits=["layer1", "layer2"]), "cannot be built.*a list of one for each of the 2 exits"),
        (describe(head_kwargs=[{"width": 8}] * 3), "exits.safetensors does not fit the model"),
        (describe(head="nose"), "cannot be built.*nose"),
        (describe(image_size="large"), "image_size: Input should be a valid array"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    sd.save_pretrained(make_model(), tmp_path)
    sd.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        sd.from_pretrained(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        sd.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no model"):
        sd.from_pretrained(str(tmp_path / "nowhere"))
    timm.models.save_for_hf(make_model().backbone, str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match="a model of plain timm"):
        sd.from_pretrained(tmp_path)


def test_a_backbone_that_timm_cannot_build_is_not_saved(tiny_net: type[nn.Module], tmp_path: Path) -> None:
    model = sd.wrap(tiny_net(), exits=1, image_size=32)
    with pytest.raises(ValueError, match="TinyNet"):
        sd.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_later_save_replaces_an_older_one(tmp_path: Path) -> None:
    sd.save_pretrained(make_model("vit"), tmp_path, label_names=list("abcdefg"))
    newer = make_model("convnext")
    sd.save_pretrained(newer, tmp_path)
    assert same(outputs(sd.from_pretrained(tmp_path)), outputs(newer))
    assert "label_names" not in json.loads((tmp_path / CONFIG).read_text())


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_save_that_fails_leaves_the_older_one(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = make_model(seed=0)
    sd.save_pretrained(older, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []
    save_file = safetensors.torch.save_file

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == failing_call:
            raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    newer = make_model(seed=1)
    with pytest.raises(OSError, match="No space left"):
        sd.save_pretrained(newer, tmp_path)
    assert len(calls) == failing_call
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert same(outputs(sd.from_pretrained(tmp_path)), outputs(older))


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_save_killed_while_its_files_are_put_in_place_is_noticed(
    renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd.save_pretrained(make_model(seed=0), tmp_path)
    calls = []
    replace = os.replace

    def kill(source: Path, target: Path) -> None:
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    newer = make_model(seed=1)
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        sd.save_pretrained(newer, tmp_path)
    with pytest.raises(ValueError, match="damaged or was exchanged"):
        sd.from_pretrained(tmp_path)


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = make_model("small stem").to(memory_format=torch.channels_last).train()
    model.backbone.layer1.eval()
    parameters = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    strides = {key: value.stride() for key, value in model.state_dict().items()}
    config = model.pretrained_cfg
    sd.save_pretrained(model, tmp_path, label_names=list("abcdefg"), data_config={"input_size": (3, 32, 32)})
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {key: value.stride() for key, value in model.state_dict().items()} == strides
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg == config
    sum(logits.sum() for logits in model(images(model), return_exits=True).logits).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_folder_may_move_and_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sd.save_pretrained(model, tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "a #1 (é)?")
    monkeypatch.chdir(tmp_path)
    assert same(outputs(sd.from_pretrained("a #1 (é)?")), outputs(model))


def test_classes_without_a_name_are_named_by_their_index(tmp_path: Path) -> None:
    model = sd.wrap("test_resnet", num_classes=4, image_size=64)
    sd.save_pretrained(model, tmp_path, label_names=["a", "3"])
    loaded = sd.from_pretrained(tmp_path)
    assert class_names(loaded) == ("a", "3", "2", "class 3")
    assert timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg["label_names"] == ["a", "3", "2", "class 3"]
    with pytest.raises(ValueError, match=r"5 label_names .* for 4 classes"):
        sd.save_pretrained(model, tmp_path, label_names=list("abcde"))
    # An older folder, which has fewer names, and a damaged one.
    configure(label_names=["a"])(tmp_path)
    assert class_names(sd.from_pretrained(tmp_path)) == ("a", "1", "2", "3")
    configure(label_names=["a"] * 5)(tmp_path)
    with pytest.raises(ValueError, match="5 label_names"):
        class_names(sd.from_pretrained(tmp_path))
    configure(label_names="abcd")(tmp_path)
    with pytest.raises(ValueError, match="allowed is a list of names"):
        class_names(sd.from_pretrained(tmp_path))


@pytest.mark.parametrize("num_classes", [2, 6])
def test_names_of_other_classes_are_not_kept(num_classes: int, tmp_path: Path) -> None:
    sd.save_pretrained(sd.wrap("test_resnet", num_classes=4, image_size=64), tmp_path, label_names=list("abcd"))
    model = sd.from_pretrained(tmp_path)
    model.reset_classifier(num_classes)
    assert class_names(model) is None
    sd.save_pretrained(model, tmp_path / "new")
    assert "label_names" not in json.loads((tmp_path / "new" / CONFIG).read_text())
    assert class_names(sd.from_pretrained(tmp_path / "new")) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_answers_is_neither_saved_nor_exported(value: float, tmp_path: Path) -> None:
    model = sd.wrap("test_resnet", num_classes=4, image_size=64)
    model.heads[0].classifier.weight.data[1, 2] = value
    message = r"1 tensors of the model hold NaN or infinity, .* heads.0.classifier.weight"
    with pytest.raises(ValueError, match=message):
        sd.save_pretrained(model, tmp_path / "model")
    for format in ("safetensors", "torch-export"):
        with pytest.raises(ValueError, match=message):
            sd.export_model(model, 1, tmp_path / "net.pt2", format=format)
    assert not list(tmp_path.iterdir())
