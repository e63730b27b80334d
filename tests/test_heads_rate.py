"""The heads' own learning rate."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_selfdistill as sd
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.task import unscaled_rate
from timm_selfdistill.train.builders import build_optimizer


# All but the backbone's own classifier.
def is_backbone(name):
    return name.startswith("backbone.") and not name.startswith("backbone.fc.")


@pytest.fixture
def model():
    return sd.wrap(timm.create_model("test_resnet", num_classes=5), image_size=32)


def rates(model, optimizer):
    """Learning rate and weight decay of every parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_only_the_heads_learn_faster_and_all_else_stays(model, decay):
    def make():
        return create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=decay)

    before = rates(model, make())
    sd.scale_heads_lr(optimizer := make(), model, 5.0)
    expected = {n: (lr if is_backbone(n) else 5 * lr, wd) for n, (lr, wd) in before.items()}
    assert rates(model, optimizer) == expected
    assert unscaled_rate(optimizer) == pytest.approx(0.1)
    assert {"heads.0.classifier.weight", "backbone.fc.bias"} <= set(expected)


def test_a_classifier_of_two_parts_counts_as_a_whole():
    model = sd.wrap(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, depth=4))
    sd.scale_heads_lr(optimizer := torch.optim.SGD(model.parameters(), lr=0.1), model, 5.0)
    parts = ("heads.", "backbone.head.", "backbone.head_dist.")
    assert {round(lr, 6) for n, (lr, _) in rates(model, optimizer).items() if n.startswith(parts)} == {0.5}
    assert {round(lr, 6) for n, (lr, _) in rates(model, optimizer).items() if not n.startswith(parts)} == {0.1}


def test_schedules_of_timm_and_torch_keep_the_factor(model):
    def make():
        sd.scale_heads_lr(optimizer := create_optimizer_v2(model, opt="sgd", lr=0.1), model, 4.0)
        return optimizer

    optimizer = make()
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10)
    scheduler.step(5)
    assert unscaled_rate(optimizer) == pytest.approx(0.05)
    assert {round(lr, 6) for lr, _ in rates(model, optimizer).values()} == {0.05, 0.2}
    optimizer = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert {round(lr, 6) for lr, _ in rates(model, optimizer).values()} == {0.1, 0.4}


def test_a_group_of_heads_alone_is_not_split(model):
    groups = [list(part.parameters()) for part in (model.backbone.layer1, model.heads)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
    sd.scale_heads_lr(optimizer, model, 3.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])
    assert [group["params"] for group in optimizer.param_groups] == groups


def test_factor_one_changes_nothing(model):
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    groups = len(optimizer.param_groups)
    sd.scale_heads_lr(optimizer, model, 1.0)
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize("scale", [0, -1, float("nan"), "5x"])
def test_a_factor_that_is_none_is_refused(model, scale):
    with pytest.raises(ValueError, match=r"scale is .*allowed is a finite number above 0"):
        sd.scale_heads_lr(torch.optim.SGD(model.parameters(), lr=0.1), model, scale)


def test_an_optimizer_in_use_is_refused(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="has taken a step"):
        sd.scale_heads_lr(optimizer, model, 5.0)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ([], 1),
        (["model.pretrained=true"], 5),
        (["model.weights=weights.safetensors"], 5),
        (["model.pretrained=true", "schedule.regime=frozen"], 1),
        (["model.pretrained=true", "optimizer.heads_lr_scale=1"], 1),
        (["optimizer.heads_lr_scale=2"], 2),
    ],
)
def test_recipes_choose_by_whether_the_backbone_is_trained_already(model, changes, scale):
    recipe = load_recipe("digits", changes)
    optimizer = build_optimizer(model, sd.SelfDistillationLoss(), recipe)
    lr = recipe.optimizer.lr
    found = {(is_backbone(n), round(value, 6)) for n, (value, _) in rates(model, optimizer).items()}
    assert found == {(True, lr), (False, round(scale * lr, 6))}
    assert unscaled_rate(optimizer) == pytest.approx(lr)
