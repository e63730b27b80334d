"""Fine-tuning from a pretrained tag: what timm knows of the weights stays known."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config
from timm.data.model_config import resolve_input_data_config
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from torch import nn

import timm_selfdistill as sd

NAME = "pretrained_probe.tag_in11"
CONFIG: dict[str, Any] = {
    "num_classes": 11,
    "input_size": (3, 48, 48),
    "test_input_size": (3, 64, 64),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.1),
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "test_crop_pct": 1.0,
    "crop_mode": "squash",
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "cc-by-nc-4.0",
    "origin_url": "https://example.com/weights",
}
default_cfgs = generate_default_cfgs({NAME: {"hf_hub_id": "example/weights", **CONFIG}})


@register_model
def pretrained_probe(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A narrow ResNet with a block a stage, and weights for 11 classes under a tag."""
    kwargs = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), **kwargs}
    return build_model_with_cfg(ResNet, "pretrained_probe", pretrained, **kwargs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file with the "pretrained" weights."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.torch.save_file(timm.create_model("pretrained_probe").state_dict(), file)
    return file


def overlay(weights: Path) -> dict[str, Any]:
    """Arguments that make timm read a tag's weights from a file instead of the network."""
    return {"pretrained_cfg_overlay": {"file": str(weights)}}


@pytest.fixture
def plain(weights: Path) -> nn.Module:
    """The same fine-tuning start in plain timm."""
    return timm.create_model(NAME, pretrained=True, num_classes=7, **overlay(weights))


@pytest.fixture
def model(weights: Path) -> sd.SelfDistillModel:
    """A wrapped model that starts from the tag's weights."""
    return sd.wrap(NAME, pretrained=True, num_classes=7, model_kwargs=overlay(weights))


def data_config(model: nn.Module) -> dict[str, Any]:
    """A model's data configuration; what JSON made a list of is a tuple again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in resolve_model_data_config(model).items()}


def test_weights_come_from_the_tag_and_the_classifier_is_new(model, weights):
    source = safetensors.torch.load_file(weights)
    state = model.backbone.state_dict()
    assert [name for name in source if not torch.equal(source[name], state[name])] == ["fc.bias", "fc.weight"]
    assert model.num_classes == 7
    assert model(torch.randn(2, 3, 48, 48), return_exits=True).logits[0].shape == (2, 7)


def test_pretrained_and_data_config_are_those_of_plain_timm(model, plain):
    assert model.pretrained_cfg == plain.pretrained_cfg
    assert model.pretrained_cfg["tag"] == "tag_in11"
    for use_test_size, size, crop_pct in ((False, 48, 0.9), (True, 64, 1.0)):
        config = resolve_model_data_config(model, use_test_size=use_test_size)
        assert config == resolve_model_data_config(plain, use_test_size=use_test_size)
        assert config == {
            "input_size": (3, size, size),
            "mean": CONFIG["mean"],
            "std": CONFIG["std"],
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": "squash",
        }
    assert resolve_input_data_config(model) == resolve_input_data_config(plain)


def test_what_was_fine_tuned_is_saved_with_its_data_config_and_no_borrowed_tag(model, plain, weights, tmp_path):
    task = sd.SelfDistillationTask(model, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, layer_decay=0.7)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task.train()(torch.randn(4, 3, 48, 48), torch.arange(4))["loss"].backward()
    optimizer.step()
    trained = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, source[name])}
    assert {"backbone.conv1.weight", "backbone.fc.weight", "heads.0.classifier.weight"} <= trained

    folder = sd.save_pretrained(model.eval(), tmp_path / "saved")
    text = (folder / "config.json").read_text()
    saved = json.loads(text)["pretrained_cfg"]
    assert saved["tag"] == "selfdistill"
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        value = CONFIG[name]
        assert saved[name] == (list(value) if isinstance(value, tuple) else value), name
    assert saved["num_classes"] == 7
    for untrue in (str(weights), "example/weights", "example.com", "cc-by-nc", "tag_in11"):
        assert untrue not in text

    images = torch.randn(2, 3, 48, 48)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert data_config(loaded) == data_config(plain)
    assert torch.equal(loaded(images), model(images))
    again = sd.from_pretrained(folder)
    assert data_config(again) == data_config(plain)
    assert torch.equal(again(images, return_exits=True).logits[0], model(images, return_exits=True).logits[0])
