"""What a stranger's config.json may ask for: nothing that the weights beside it do not need."""

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.compat import version_of
from timm_selfdistill.heads import HEADS
from timm_selfdistill.hub import CONFIG
from timm_selfdistill.hub.build import on_meta_device
from timm_selfdistill.hub.saved_config import read_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    sd.save_pretrained(sd.wrap("test_resnet", num_classes=4, image_size=64).eval(), folder)
    return folder


def changed(saved: Path, tmp_path: Path, **changes: Any) -> Path:
    """Return a folder with the weights of another and a changed configuration; changes of our key begin with "our_"."""
    config = json.loads((saved / CONFIG).read_text())
    ours = {key.removeprefix("our_"): value for key, value in changes.items() if key.startswith("our_")}
    config |= {key: value for key, value in changes.items() if not key.startswith("our_")}
    config["timm_selfdistill"] |= ours
    for path in saved.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_7b_patch16_dinov3"}, "does not fit the model"),
        ({"model_args": {"layers": [20000, 1, 1, 1]}}, "more parameters than a network of the .* tensors beside it"),
        ({"model_args": {"layers": [10**9, 1, 1, 1]}}, "add up to more than 1,048,576"),
        ({"model_args": {"layers": [10**6] * 1000}}, "add up to more than 1,048,576"),
        ({"model_args": {"channels": [10**5] * 4}}, "does not fit the model"),
        ({"model_args": {"in_chans": 10**9}}, "add up to more than 1,048,576"),
        ({"model_args": {"num_classes": 10**9}}, "num_classes is 1000000000"),
        ({"model_args": {"num_classes": 10**6}}, "fc.weight has the shape"),
        ({"model_args": {"drop_rate": 1e300}}, "allowed are finite ones"),
        ({"model_args": {"drop_rate": [0.0] * 20_000}}, "more than 10,000 values"),
        ({"model_args": {"device": "meta"}}, "model_args holds device"),
        ({"model_args": {"dtype": "float64"}}, "model_args holds dtype"),
        ({"model_args": [1]}, "model_args is .* allowed is an object"),
        ({"model_args": {"norm_layer": {"a": 1}}}, "cannot be built"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 100_000}}, "cannot be built|does not fit"),
        ({"our_image_size": [6000, 6000]}, "image_size is 6000 x 6000"),
        ({"our_image_size": [0, 64]}, "image_size is 0 x 64"),
        ({"our_exits": ["layer1"] * 100_000}, "at most 1000 items"),
        ({"our_head_kwargs": {"width": 10**9}}, "add up to more than 1,048,576"),
        ({"our_head_kwargs": {"width": 2000}}, "exits.safetensors does not fit the model"),
        ({"our_head_kwargs": {"width": 10**5}}, r"exits.safetensors does not fit the model|have parameters of .* GiB"),
        ({"our_head": "token", "our_head_kwargs": {"width": 10**6}}, "exits.safetensors does not fit the model"),
        ({"pretrained_cfg": {"input_size": [3, 10**5, 10**5]}}, "input_size is 100000 x 100000"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 1e-6}}, "crop_pct is 1e-06"),
        ({"pretrained_cfg": {"input_size": 64}}, "allowed are channels, height and width"),
        ({"label_names": ["x" * 1000] * 9000}, "allowed are 8,388,608"),
    ],
)
def test_a_small_file_asks_for_no_large_model(
    saved: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(saved, tmp_path, **changes)
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        sd.from_pretrained(folder)
    assert time.process_time() - began < 20  # about 1 on a fast machine
    assert len(str(caught.value)) < 2500


def test_what_is_behind_an_exit_is_limited_too(saved: Path, tmp_path: Path) -> None:
    folder = sd.export_model(sd.from_pretrained(saved), 0, tmp_path / "net", format="safetensors")
    config = json.loads((folder / CONFIG).read_text())
    assert isinstance(sd.load_exported(folder), nn.Module)
    config["model_args"] = {"channels": [32, 48, 40_000, 96], "num_classes": 4}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"it takes .* bytes, and the weights beside it only"):
        sd.load_exported(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1, "a": 2}', "the key 'a' stands in it twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("\xff", "damaged"),
    ],
)
def test_json_that_readers_take_for_different_things_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    model = sd.wrap("test_resnet", num_classes=4, image_size=64)
    with pytest.raises(ValueError, match="input_size is 6000 x 6000"):
        sd.save_pretrained(model, tmp_path / "model", data_config={"input_size": (3, 6000, 6000)})
    assert not (tmp_path / "model" / CONFIG).exists()


def test_the_limit_is_for_the_thread_that_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread builds a model of more parameters than the limit, while one is loaded."""
    monkeypatch.setattr("timm_selfdistill.hub.build._PARAMETERS", (1, 0))
    built: list[nn.Module] = []

    def other(*args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: built.append(nn.Sequential(*(nn.Linear(1, 1) for _ in range(500)))))
        thread.start()
        thread.join()
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr("timm_selfdistill.hub.build.timm.create_model", other)
    assert sd.from_pretrained(saved).num_classes == 4
    assert built


def test_loading_neither_runs_the_model_nor_leaves_a_hook(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    monkeypatch.setattr(
        "timm.models.resnet.ResNet.forward_head",
        lambda self, x, *args, **kwargs: devices.append(x.device.type) or self.fc(self.global_pool(x)),
    )
    model = sd.from_pretrained(saved)
    assert set(devices) == {"meta"}
    assert all(parameter.device == torch.device("cpu") for parameter in model.parameters())
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_long_names_and_settings_are_not_printed_whole(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path, label_names=["a", "b", "c", "d" * 1001])
    with pytest.raises(ValueError, match="label_names holds one of more than 1,000 characters"):
        sd.from_pretrained(folder)
    for settings in ([0.5] * 50_000, {"thresholds": [-1] * 50_000}, "x" * 50_000):
        config = json.loads((saved / CONFIG).read_text())
        config["timm_selfdistill"]["early_exit"] = settings
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match="early-exit settings that are not allowed") as caught:
            sd.load_early_exit(folder)
        assert len(str(caught.value)) < 1500


def test_a_head_of_another_package_may_compute_numbers_while_it_is_built(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self, tap: Any, feature_dim: int, width: int = 3) -> None:
            super().__init__()
            self.share = torch.linspace(0, 1, 3)[1].item()
            self.project = nn.Linear(tap.channels, feature_dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.share * self.project(x.mean((2, 3)))

    try:
        sd.register_head("counting")(Counting)
        model = sd.wrap("test_resnet", num_classes=4, image_size=64, head="counting", head_kwargs={"width": 5}).eval()
        sd.save_pretrained(model, tmp_path / "model")
        loaded = sd.from_pretrained(tmp_path / "model")
        small = sd.load_exported(sd.export_model(model, 1, tmp_path / "net", format="safetensors"))
    finally:
        HEADS._entries.pop("counting", None)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x, return_exits=True).logits[1], model(x, return_exits=True).logits[1])
        assert torch.allclose(small(x), model.forward_exit(x, 1))
    assert loaded.wrap_config == model.wrap_config


@pytest.mark.parametrize("act", [F.relu, F.gelu, F.silu, F.elu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid])
def test_quick_shapes_are_those_of_the_meta_device(act: Callable[[Tensor], Tensor]) -> None:
    with torch.device("meta"):
        x, scale = torch.empty(2, 4, 3), torch.empty(4)
        calls = [
            lambda: act(x),
            lambda: F.batch_norm(x, scale, scale),
            lambda: F.layer_norm(x, (3,)),
            lambda: F.group_norm(x, 2),
        ]
        expected = [call() for call in calls]
    with on_meta_device():
        found = [call() for call in calls]
    assert [(y.shape, y.dtype, y.device) for y in found] == [(y.shape, y.dtype, y.device) for y in expected]


@pytest.mark.parametrize("change", [Tensor.normal_, Tensor.uniform_, partial(F.relu, inplace=True)])
def test_what_is_done_in_place_is_a_change_on_the_meta_device_too(change: Callable[[Tensor], Tensor]) -> None:
    with on_meta_device():
        x = torch.empty(2, 3)
        before = version_of(x)
        assert change(x) is x
    assert version_of(x) > before
