"""The graph of a network with all its exits, cut into stages that run on the images that are left."""

import math

import pytest
import torch
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.export.early_exit_graphs import DecidingExits
from timm_selfdistill.staged import CONFIDENCE, IMAGES, LOGITS, TEMPERATURES


def cut(model, size=64, dynamic_batch=True, **settings):
    config = EarlyExitConfig((0.5,) * model.num_exits, **settings)
    network = DecidingExits(model, config)
    return network, network.cut((3, size, size), "torch-export", dynamic_batch=dynamic_batch)


def run(network, stages, images, rows):
    """Run stage after stage, keeping `rows[k]` of what is left after stage k; return the outputs of each stage."""
    held = {IMAGES: images, TEMPERATURES: torch.tensor(network.temperatures)}
    found = []
    for index, stage in enumerate(stages):
        with torch.no_grad():
            outputs = stage.network(*[held[tensor.name] for tensor in stage.inputs])
        found.append(dict(zip([tensor.name for tensor in stage.outputs], outputs, strict=True)))
        held |= found[-1]
        if index < len(rows):
            held = {name: value if name == TEMPERATURES else value[rows[index]] for name, value in held.items()}
    return found


def check(network, stages, images):
    """Check the outputs of all stages against the whole network, where other images are left at each."""
    every, confidences = network.answers(images)
    places, rows = torch.arange(len(images)), []
    for index in range(len(stages) - 1):
        kept = torch.arange(len(places)) % len(stages) != index
        rows.append(kept.nonzero().squeeze(1))
        places = places[kept]
    assert 0 < len(places) < len(images)
    places = torch.arange(len(images))
    for index, found in enumerate(run(network, stages, images, rows)):
        torch.testing.assert_close(found[LOGITS], every[index][places], rtol=1e-4, atol=1e-5)
        if index < len(rows):
            torch.testing.assert_close(found[CONFIDENCE], confidences[index][places], rtol=1e-4, atol=1e-5)
            places = places[rows[index]]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(7, 3, 64, 64, generator=generator) * torch.linspace(0.1, 3, 7).view(-1, 1, 1, 1)


def test_stages_of_each_layout_give_the_answers_of_the_whole(family, make_backbone, batch):
    model = sd.wrap(make_backbone(family), image_size=64).eval()
    network, stages = cut(model)
    check(network, stages, batch)
    for index, stage in enumerate(stages[:-1]):
        # One tensor, and that of the exit's size: its views are made anew.
        carried = stage.outputs[:-2]
        assert [tensor.name for tensor in carried] == [f"carried_{index}"]
        assert carried[0].batched
    assert [tensor.name for tensor in stages[0].inputs] == [IMAGES, TEMPERATURES]
    assert [tensor.name for tensor in stages[-1].outputs] == [LOGITS]


def test_no_parameter_is_in_two_stages_and_none_is_lost(make_backbone):
    model = sd.wrap(make_backbone("resnet18"), image_size=64).eval()
    _, stages = cut(model)
    held = [dict(stage.network.named_parameters()) for stage in stages]
    assert sum(map(len, held)) == len(dict(model.named_parameters()))
    assert {"exits.model.backbone.layer1.0.conv1.weight", "exits.model.heads.0.classifier.weight"} <= set(held[0])
    assert not any(name.startswith("exits.model.heads") for name in held[-1])


def test_a_network_of_branches_carries_them_all(make_backbone):
    model = sd.wrap(make_backbone("crossvit_tiny_240", embed_dim=[16, 32], num_heads=[2, 2])).eval()
    network, stages = cut(model, 240)
    assert len(stages[0].outputs) == 2 + 2
    check(network, stages, torch.randn(5, 3, 240, 240))


@pytest.mark.parametrize("rule", ["max-softmax", "margin", "entropy", "patience"])
def test_rules_and_their_state(tiny_net, batch, rule):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), image_size=32, head="linear").eval()
    temperatures = tuple(0.5 + index for index in range(model.num_exits))
    network, stages = cut(model, 32, rule=rule, temperatures=temperatures)
    check(network, stages, batch[..., :32, :32])
    # The state goes from stage to stage as all else that is carried.
    assert len(stages[1].outputs) - 2 == (3 if rule == "patience" and model.num_exits > 2 else 1)


@pytest.mark.parametrize(("fallback", "running"), [("ensemble", False), ("ensemble", True), ("last", True)])
def test_ensembles(tiny_net, batch, fallback, running):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), image_size=32, head="linear").eval()
    weights = tuple(0.1 * (index + 1) for index in range(model.num_exits + 1))
    model.ensemble = sd.Ensemble(weights, images=9, bias=(0.5, -0.25, 0.0, 1.0, 0.125))
    network, stages = cut(model, 32, fallback=fallback, running_ensemble=running)
    check(network, stages, batch[..., :32, :32])


@pytest.mark.parametrize("place", ["several rows", "second dimension"])
def test_rows_that_are_elsewhere_are_carried_as_the_first_dimension(tiny_net, batch, place):
    class Net(tiny_net):
        def forward(self, x):
            x = self.act(self.stage0(x))  # [B, 8, 16, 16]
            if place == "several rows":
                moved = x.flatten(0, 1) * 2  # [8 B, 16, 16]
                x, mean = moved.unflatten(0, (-1, 8)), moved.unflatten(0, (-1, 8)).mean((1, 2, 3))
            else:
                moved = x.movedim(0, 1) * 2  # [8, B, 16, 16]
                x, mean = moved.movedim(1, 0), moved.amax((0, 2, 3))
            x = self.act(self.stage1(x))
            return self.fc(self.act(self.stage2(x)).mean((2, 3)) + mean.unsqueeze(1))

    torch.manual_seed(0)
    model = sd.wrap(Net(), exits=["stage1"], image_size=32, head="linear").eval()
    network, stages = cut(model, 32)
    assert [tensor.shape for tensor in stages[0].outputs[:2]] == [(None, 8, 16, 16), (None, 16, 8, 8)]
    check(network, stages, batch[..., :32, :32])


def test_sizes_and_what_is_no_number_of_the_images_are_computed_in_each_stage(tiny_net, batch):
    class Sized(tiny_net):
        def forward(self, x):
            count = x.shape[0]
            token = torch.ones(count, 1, 1, 1) * self.fc.weight.mean()
            x = self.act(self.stage0(x)) + token
            x = self.act(self.stage1(x)).reshape(count, 16, 64).reshape(count, 16, 8, 8) + token
            return self.fc((self.act(self.stage2(x)) + token).mean((2, 3)))

    torch.manual_seed(0)
    model = sd.wrap(Sized(), exits=["stage0", "stage1"], image_size=32, head="linear").eval()
    network, stages = cut(model, 32)
    assert [len(stage.outputs) for stage in stages] == [3, 3, 1]
    check(network, stages, batch[..., :32, :32])


def test_a_network_that_mixes_its_images_cannot_be_cut(tiny_net):
    class Mixing(tiny_net):
        def forward(self, x):
            x = self.act(self.stage0(x))
            mean = x.mean(0, keepdim=True)
            x = self.act(self.stage1(x - mean))
            return self.fc((self.act(self.stage2(x)) - mean.mean()).mean((2, 3)))

    model = sd.wrap(Mixing(), exits=["stage1"], image_size=32, head="linear").eval()
    message = (
        r"cannot be cut after exit 0 \(stage1\): .* the tensor mean\w*, of shape .*, which has no row for each image"
    )
    with pytest.raises(sd.ExportError, match=message):
        cut(model, 32)
    # For one image there is nothing to tell apart.
    network, stages = cut(model, 32, dynamic_batch=False)
    image = torch.randn(1, 3, 32, 32)
    found = run(network, stages, image, [])
    torch.testing.assert_close([outputs[LOGITS] for outputs in found], network.answers(image)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_has_no_confidence(tiny_net, batch, bad):
    for rule in ("max-softmax", "margin", "entropy", "patience"):
        model = sd.wrap(tiny_net(), exits=["stage0"], image_size=32, head="linear").eval()
        nn.init.constant_(model.head_of(0).classifier.bias, bad)
        network = DecidingExits(model, EarlyExitConfig((0.5,), rule))
        _, confidences = network.answers(batch[..., :32, :32])
        assert confidences[0].isnan().all()
        nn.init.constant_(model.head_of(0).classifier.bias, 0)
        model.head_of(0).classifier.bias.data[1] = -math.inf  # one class that is never taken is no error
        _, confidences = network.answers(batch[..., :32, :32])
        assert confidences[0].isfinite().all()
