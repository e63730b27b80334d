"""A backbone without the hooks of exits gives the same, calls none of them, and follows what changes."""

import copy
import math
import sys

import pytest
import torch

import timm_selfdistill as sd

HOOKS = {"_enter", "_leave", "_record_feature"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def fast(tiny_net):
    torch.manual_seed(0)
    return sd.EarlyExit(sd.wrap(tiny_net(), image_size=32, head="linear").eval(), math.inf)


def hooks_called(run, *args):
    """Return how many calls of our hooks there are."""
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_name in HOOKS

    before = sys.getprofile()
    try:
        sys.setprofile(watch)
        run(*args)
    finally:
        sys.setprofile(before)
    return count


def test_every_layout_gives_the_same_without_hooks(family, make_backbone):
    model = sd.wrap(make_backbone(family)).eval()
    x = torch.randn(2, 3, 64, 64)
    fast = sd.EarlyExit(model, math.inf)
    assert torch.equal(fast(x).logits, model(x))
    assert hooks_called(model, x) > 0
    assert hooks_called(fast, x) == 0


def test_weights_are_those_of_the_model(fast):
    x, model = torch.randn(2, 3, 32, 32), fast.model
    before = fast(x).logits
    for change in (
        lambda: [parameter.mul_(1.5) for parameter in model.parameters()],
        lambda: model.load_state_dict({name: value + 0.125 for name, value in model.state_dict().items()}),
        lambda: model.double(),
    ):
        change()
        x = x.to(model.backbone.fc.weight.dtype)
        after = fast(x).logits
        assert torch.equal(after, model(x))
        assert not torch.equal(after, before.to(after))
        assert hooks_called(fast, x) == 0
        before = after


def test_what_else_changes_in_the_backbone_counts(fast):
    x, backbone, seen = torch.randn(2, 3, 32, 32), fast.model.backbone, []
    expected = fast(x).logits
    handle = backbone.stage1.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert torch.equal(fast(x).logits, expected)
    assert seen == [2]
    handle.remove()
    assert hooks_called(fast, x) == 0
    backbone.forward = lambda x: torch.zeros(len(x), 5)
    assert not fast(x).logits.any()
    del backbone.forward
    assert torch.equal(fast(x).logits, expected)
    backbone.fc = torch.nn.Linear(backbone.fc.in_features, 5)
    assert torch.equal(fast(x).logits, fast.model(x))
    assert not torch.equal(fast(x).logits, expected)


def test_a_copy_has_a_bare_backbone_of_its_own(fast):
    x, clone = torch.randn(2, 3, 32, 32), copy.deepcopy(fast)
    expected = fast(x).logits
    for parameter in fast.model.parameters():
        parameter.zero_()
    assert torch.equal(clone(x).logits, expected)
    assert hooks_called(clone, x) == 0


def test_a_backbone_that_cannot_be_copied_runs_itself(tiny_net):
    class Odd(type(tiny_net())):
        def forward(self, x):
            return super().forward(x) * (2 if any(self is module for module in OWN) else 1)

    OWN = [Odd()]
    fast = sd.EarlyExit(sd.wrap(OWN[0], image_size=32, head="linear").eval(), math.inf)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fast(x).logits, fast.model(x))
    assert hooks_called(fast, x) > 0
