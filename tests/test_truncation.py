"""A network cut off after an exit; every class of timm is in test_timm_families."""

import copy

import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def test_the_forward_ends_by_itself_where_it_can(family, make_backbone, images):
    """Programs that trace a network bear no exception that goes through them, as the one that ended the forward was."""
    model = sd.wrap(make_backbone(family), image_size=64).eval()
    small = sd.truncate(model, 0)
    assert small.ends_by_itself
    exported = torch.export.export(small, (images,)).module()
    torch.testing.assert_close(exported(images), model.forward_exit(images, 0))
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        small(images)
    small.ends_by_itself = False
    with FlopCounterMode(display=False) as ended, torch.no_grad():
        small(images)
    assert whole.get_total_flops() == ended.get_total_flops() > 0


@pytest.mark.parametrize("unpacks", [True, False])
def test_elsewhere_an_exception_ends_it(tiny_net, images, unpacks):
    """What unpacks the output of a removed layer, or reads it, cannot do without the layer."""

    class Late(tiny_net):
        def __init__(self):
            super().__init__(size=64)
            self.late = Pair() if unpacks else nn.Conv2d(32, 32, 1)

        def forward(self, x):
            x = self.act(self.stage0(x))
            x = self.act(self.stage2(self.act(self.stage1(x))))
            if unpacks:
                one, two = self.late(x)
                x = one + two
            else:
                x = nn.functional.conv2d(x, self.late.weight)
            return self.fc(x.mean((2, 3)))

    model = sd.wrap(Late(), exits=["stage0"], image_size=64).eval()
    small = sd.truncate(model, 0)
    assert not small.ends_by_itself
    assert torch.equal(small(images), model.forward_exit(images, 0))
    with pytest.raises((RuntimeError, AttributeError), match=r"comes after the exit|weight"):
        small.backbone(images)


class Pair(nn.Module):
    """A layer with two outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 1)

    def forward(self, x):
        return self.conv(x).chunk(2, 1)


@pytest.mark.parametrize("exit", [-1, 4])
def test_there_must_be_such_an_exit(model, exit):
    with pytest.raises(ValueError, match=f"There is no exit {exit}; allowed are 0 to 3"):
        sd.truncate(model, exit)


def test_only_a_wrapped_model_is_cut(make_backbone):
    with pytest.raises(ValueError, match="got ResNet: call wrap first"):
        sd.truncate(make_backbone("resnet18"), 0)
