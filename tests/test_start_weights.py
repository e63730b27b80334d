"""`model.weights`: training starts from weights of one's own; and `model.grad_checkpointing`."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.hub.start_weights import load_start_weights
from timm_selfdistill.recipe import RecipeError, load_recipe
from timm_selfdistill.train.builders import build_model

CHANNELS = {"channels": [4, 8, 8, 16]}
NETWORK = "model={name: resnet18, kwargs: {channels: [4, 8, 8, 16]}}"


def model(num_classes: int = 4, seed: int = 0, **kwargs: Any) -> sd.SelfDistillModel:
    torch.manual_seed(seed)
    settings = {"exits": ["layer1", "layer2", "layer3"], "head": "bottleneck", "model_kwargs": CHANNELS} | kwargs
    return sd.wrap("resnet18", num_classes=num_classes, image_size=32, **settings)


def equal(one: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> bool:
    pairs = [(name, tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()]
    return all(torch.equal(first, second) for name, first, second in pairs if not name.startswith(but or ("no",)))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[sd.SelfDistillModel, Path]:
    source = model(seed=1)
    sd.save_pretrained(source, tmp_path / "run" / "model")
    return source, tmp_path / "run"


def stored(kind: str, source: sd.SelfDistillModel, folder: Path) -> Path:
    """Write weights as others do, and return the file or folder."""
    state = source.backbone.state_dict()
    if kind in ("run", "run/model"):
        return folder / kind
    if kind == "plain.safetensors":
        safetensors.torch.save_file(state, folder / kind)
    elif kind == "whole.pt":
        torch.save(source.state_dict(), folder / kind)
    elif kind == "timm.pth.tar":
        # As timm's train.py writes it.
        args = argparse.Namespace(model="resnet18", lr=0.1)
        averaged = {f"module.{name}": tensor for name, tensor in state.items()}
        others = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        torch.save({"epoch": 3, "args": args, "state_dict": others, "state_dict_ema": averaged}, folder / kind)
    return folder / kind


@pytest.mark.parametrize("kind", ["run", "run/model", "plain.safetensors", "whole.pt", "timm.pth.tar"])
def test_weights_are_those_of_the_file(saved: tuple[sd.SelfDistillModel, Path], tmp_path: Path, kind: str) -> None:
    source, _ = saved
    begun = model()
    assert load_start_weights(begun, stored(kind, source, tmp_path)) == []
    assert equal(source.backbone, begun.backbone)
    assert equal(source.heads, begun.heads) == (kind in ("run", "run/model", "whole.pt"))


def test_a_classifier_of_other_classes_is_not_loaded(saved: tuple[sd.SelfDistillModel, Path]) -> None:
    source, run = saved
    begun = model(num_classes=7)
    before = copy.deepcopy(begun)
    (notice,) = load_start_weights(begun, run)
    assert notice == f"model.weights: the classifier is not loaded: {run} has 4 classes, and the model 7."
    assert equal(source.backbone, begun.backbone, ("fc.",))
    assert equal(before.backbone.fc, begun.backbone.fc)
    for index in range(3):
        assert equal(source.head_of(index), begun.head_of(index), ("classifier.",))
        assert equal(before.head_of(index).classifier, begun.head_of(index).classifier)


def test_exits_of_another_head_are_not_loaded(saved: tuple[sd.SelfDistillModel, Path]) -> None:
    source, run = saved
    begun = model(head="linear")
    before = copy.deepcopy(begun)
    (notice,) = load_start_weights(begun, run)
    assert "the exits layer1, layer2, layer3 are not loaded" in notice
    assert equal(source.backbone, begun.backbone)
    assert equal(before.heads, begun.heads)


def test_weights_that_do_not_fit_are_explained(saved: tuple[sd.SelfDistillModel, Path], tmp_path: Path) -> None:
    source, _ = saved
    state = source.backbone.state_dict()
    wrong = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.")}
    wrong |= {"layer9.weight": torch.zeros(2), "conv1.weight": torch.zeros(4, 1, 7, 7)}
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="does not fit resnet18") as caught:
        load_start_weights(model(), tmp_path / "wrong.pt")
    for text in (
        "missing are layer4.0.bn1.bias",
        "and 25 more",
        "unexpected are layer9.weight",
        "of another shape are conv1.weight (4 x 1 x 7 x 7, here 64 x 3 x 7 x 7)",
    ):
        assert text in str(caught.value)
    torch.save({"a": model}, tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("code.pt", "cannot be read as weights .* is never unpickled"),
        ("none.pt", "holds no state dict"),
        ("broken.safetensors", "cannot be read as weights"),
        ("empty", "there is no model.safetensors in"),
        ("gone.pt", "there is no file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_start_weights(model(), tmp_path / name)


def test_a_recipe_names_them(saved: tuple[sd.SelfDistillModel, Path], caplog: pytest.LogCaptureFixture) -> None:
    source, run = saved
    recipe = load_recipe("digits", [NETWORK, f"model.weights={run}", "data.image_size=32"])
    begun = build_model(recipe, list("abcdef"), "letters", tell=True)
    assert equal(source.backbone, begun.backbone, ("fc.",))
    assert "is not loaded" in caplog.text
    assert recipe.without_local_paths().model.weights == "run"
    assert recipe.local_paths()["model"] == {"weights": str(run)}
    with pytest.raises(RecipeError, match=r"model.weights: must be null where model.pretrained is true"):
        load_recipe("digits", [NETWORK, "model.pretrained=true", f"model.weights={run}"])


def test_grad_checkpointing_changes_neither_loss_gradients_nor_statistics(
    family: str, make_backbone: Callable[..., nn.Module], images: Tensor
) -> None:
    plain = sd.wrap(make_backbone(family), image_size=64).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    loss, target = sd.SelfDistillationLoss(), torch.arange(4)
    for network in (plain, saving):
        for _ in range(2):
            torch.manual_seed(0)
            loss(network(images, return_exits=True), target)["loss"].backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), other in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    momenta = [module.momentum for module in saving.modules() if isinstance(module, nn.BatchNorm2d)]
    assert 0.0 not in momenta
    hooks = [len(module._forward_hooks) for module in saving.backbone.modules()]
    saving.set_grad_checkpointing(False)
    saving.set_grad_checkpointing()
    assert [len(module._forward_hooks) for module in saving.backbone.modules()] == hooks


def test_a_model_that_cannot_checkpoint_gradients_is_refused() -> None:
    recipe = load_recipe("digits", ["model={name: vgg11, grad_checkpointing: true}", "data.image_size=32"])
    with pytest.raises(ValueError, match=r"model.grad_checkpointing: must be false for 'vgg11'"):
        build_model(recipe, list("abcdef"), "letters")
    saving = build_model(load_recipe("digits", [NETWORK, "model.grad_checkpointing=true"]), list("abcd"), "letters")
    assert saving.backbone.grad_checkpointing
