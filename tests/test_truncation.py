"""A network cut off after an exit; every class of timm is in test_timm_families."""

import copy

import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.report.report_content import measure_costs
from timm_selfdistill.truncation import TruncatedModel


@pytest.fixture
def model(make_backbone):
    return sd.wrap(make_backbone("resnet18"), hint_adapter=True)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_holds_what_the_exit_needs_and_gives_its_logits(family, make_backbone, images):
    model = sd.wrap(make_backbone(family), hint_adapter=True, image_size=64).eval()
    costs, _ = measure_costs(model, (3, 64, 64), batch_size=1)
    for index in range(model.num_exits):
        small = sd.truncate(model, exit=index)
        assert isinstance(small, TruncatedModel)
        assert (small.exit_name, small.num_classes) == (model.exit_names[index], model.num_classes)
        assert torch.equal(small(images), model.forward_exit(images, index))
        assert count(small) == costs[index]["params"] < count(model)
        assert resolve_model_data_config(small) == resolve_model_data_config(model)
        kept = dict(small.named_parameters())
        assert small.no_weight_decay() & kept.keys() == model.no_weight_decay() & kept.keys()
        names = {name.replace("head.", f"heads.{index}.") for name in small.state_dict() if name.startswith("head.")}
        names |= {name for name in small.state_dict() if name.startswith("backbone.")}
        assert names < set(model.state_dict())


def test_the_model_stays_as_it_is(family, make_backbone, images):
    model = sd.wrap(make_backbone(family), image_size=64)
    model.backbone.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    small = sd.truncate(model, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [small.training, small.backbone.training, small.head.training] == [True, False, True]
    small.train()(images).sum().backward()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_trains(family, make_backbone, images, checkpointing):
    model = sd.wrap(make_backbone(family, drop_path_rate=0.5), image_size=64).train()
    small = sd.truncate(model, 1)
    small.set_grad_checkpointing(checkpointing)
    for run in (lambda: model.forward_exit(images, 1), lambda: small(images)):
        torch.manual_seed(3)
        run().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        expected = gradients[name.replace("head.", "heads.1.", 1) if name.startswith("head.") else name]
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_copies_compiles_and_saves(family, make_backbone, images, tmp_path):
    model = sd.wrap(make_backbone(family), image_size=64).eval()
    small = sd.truncate(model, 1)
    expected = model.forward_exit(images, 1)
    assert torch.equal(copy.deepcopy(small)(images), expected)
    compiled = torch.compile(small, backend="eager")
    assert torch.equal(compiled(images), expected)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    other = sd.truncate(sd.wrap(make_backbone(family, seed=1), image_size=64).eval(), 1)
    assert not torch.equal(other(images), expected)
    other.load_state_dict(torch.load(tmp_path / "small.pth", weights_only=True))
    assert torch.equal(other.eval()(images), expected)


def test_the_last_exit_is_the_backbone(model, images):
    last = sd.truncate(model.eval(), exit=model.num_exits)
    assert type(last) is type(model.backbone)
    assert torch.equal(last(images), model(images))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in last.modules())
    assert last.fc.weight is not model.backbone.fc.weight


def test_what_is_looked_at_but_not_run_stays(tiny_net, images):
    """The forward reads the last layer's width, and runs one module in train mode only, before the exit."""

    class Nosy(tiny_net):
        def forward(self, x):
            assert self.fc.in_features == 32
            if self.training:
                x = self.noise(x)
            return super().forward(x)

    backbone = Nosy(size=64)
    backbone.noise = nn.Sequential(nn.Conv2d(3, 3, 1))
    model = sd.wrap(backbone, exits=["stage0"], image_size=64).eval()
    small = sd.truncate(model, 0)
    assert torch.equal(small(images), model.forward_exit(images, 0))
    assert torch.equal(small.train()(images), model.train().forward_exit(images, 0))
    left = {name.split(".")[1] for name, _ in small.named_parameters() if name.startswith("backbone.")}
    assert left == {"stage0", "noise", "fc"}


def test_other_hooks_on_the_backbone_stay(model, images):
    sizes = []
    model.backbone.conv1.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    small = sd.truncate(model, 0)
    sizes.clear()
    small(images)
    assert sizes == [4]


def test_a_removed_layer_that_is_called_says_that_it_is_gone(model, images):
    small = sd.truncate(model, 0)
    with pytest.raises(RuntimeError, match="comes after the exit"):
        small.backbone(images)


@pytest.mark.parametrize("exit", [-1, 4])
def test_there_must_be_such_an_exit(model, exit):
    with pytest.raises(ValueError, match=f"There is no exit {exit}; allowed are 0 to 3"):
        sd.truncate(model, exit)


def test_only_a_wrapped_model_is_cut(make_backbone):
    with pytest.raises(ValueError, match="got ResNet: call wrap first"):
        sd.truncate(make_backbone("resnet18"), 0)
