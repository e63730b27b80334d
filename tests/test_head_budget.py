"""Heads in proportion: what the default heads may cost, and which points are worth an exit."""

import copy
import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_selfdistill as sd
from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.heads.proportional import body_cost
from timm_selfdistill.hub import CONFIG
from timm_selfdistill.recipe import RecipeError, load_recipe

SIZE = 64
# One network for each layout: NCHW, NHWC, NLC with one and with two prefix tokens, NCL, two branches of tokens.
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
VIT = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
LAYOUTS = {
    "NCHW": ("resnet18", {"channels": [16, 32, 64, 128]}),
    "NHWC": ("swin_tiny_patch4_window7_224", SWIN),
    "NLC": ("vit_tiny_patch16_224", VIT),
    "NLC, two in front": ("deit_tiny_distilled_patch16_224", VIT),
    "branches": ("crossvit_tiny_240", {"embed_dim": [16, 32], "num_heads": [2, 2], "depth": [[1, 2, 0], [1, 2, 0]]}),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make_backbone(layout, num_classes=5):
    name, kwargs = LAYOUTS[layout]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def make_model(layout, num_classes=5, **arguments):
    size = 240 if layout == "branches" else SIZE
    return sd.wrap(make_backbone(layout, num_classes), image_size=size, **arguments)


def images(layout, batch=2, seed=1):
    size = 240 if layout == "branches" else SIZE
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def widths(model):
    return [kwargs["width"] for kwargs in model.wrap_config.head_kwargs]


def num_params(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def shares(model, x):
    """Count, head by head, the shares of the backbone's multiply-accumulates and parameters."""
    model = copy.deepcopy(model).eval()
    taps = {}
    for index, head in enumerate(model.heads):
        head.register_forward_pre_hook(lambda module, args, index=index: taps.update({index: args}))
    model(x, return_exits=True)
    with FlopCounterMode(display=False) as whole:
        model.backbone(x)
    found = []
    for index, head in enumerate(model.heads):
        with FlopCounterMode(display=False) as own:
            head(*taps[index])
        macs = own.get_total_flops() / whole.get_total_flops()
        found.append((macs, num_params(head) / num_params(model.backbone)))
    return found


@every_layout
@pytest.mark.parametrize(("num_classes", "budget"), [(5, None), (200, 0.1), (5, 0.03)])
def test_heads_hold_their_budget(layout, num_classes, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(layout, num_classes, head_budget=budget)
    limit = 0.1 if budget is None else budget
    found = shares(model, images(layout, batch=1))
    assert all(macs <= limit for macs, _ in found)
    assert sum(params for _, params in found) <= 2.5 * limit
    # An exit costs less than it saves.
    assert all(macs <= (1 - point.cost) / 2 for (macs, _), point in zip(found, model.points, strict=True))


@every_layout
def test_a_head_is_as_wide_as_the_budget_allows(layout):
    model = make_model(layout, head_budget=0.05)
    names = [point.name for point in model.points]
    for index, width in enumerate(widths(model)):
        if width == model.taps.feature_dim:
            continue
        step = next(w for w in (*range(8, 2000, 8), model.taps.feature_dim) if w > width)
        kwargs = model.wrap_config.head_kwargs
        wider = [one | {"width": step} if n == index else one for n, one in enumerate(kwargs)]
        macs, params = shares(
            make_model(layout, exits=names, head="proportional", head_kwargs=wider), images(layout, 1)
        )[index]
        assert macs > 0.05 or params > 0.125 / len(names)


def test_a_head_costs_at_most_half_of_what_its_exit_saves():
    # Of a budget that is as large as the network, this is all that limits the head of so deep an exit.
    model = sd.wrap("efficientnet_lite0", num_classes=5, exits=["blocks.6"], image_size=96, head_budget=1.0)
    ((macs, _),) = shares(model, torch.randn(1, 3, 96, 96))
    assert 0.25 * (1 - model.points[0].cost) < macs <= 0.5 * (1 - model.points[0].cost)
    assert widths(model)[0] < model.taps.feature_dim


@every_layout
@pytest.mark.filterwarnings("ignore:No head fits")
def test_width_grows_with_the_budget_up_to_the_teachers(layout):
    exits = [point.name for point in make_model(layout).points]
    budgets = (0.02, 0.06, 0.12, 0.5, 1.0)
    found = [widths(make_model(layout, num_classes=200, exits=exits, head_budget=budget)) for budget in budgets]
    assert all(a <= b for less, more in pairwise(found) for a, b in zip(less, more, strict=True))
    assert found[0] < found[-1]
    assert found[-1] == [make_model(layout).taps.feature_dim] * len(exits)


def test_costs_are_those_that_a_network_has():
    for layout, prefix in (("NCHW", 0), ("NHWC", 0), ("NLC", 0), ("NLC", 2), ("NCL", 0)):
        for downsample, grid in ((1, (5, 7)), (4, (9, 9)), (32, (16, 12))):
            tap = Tap("stage", layout, 12, grid, prefix, downsample, None)
            shape = {
                "NCHW": (1, 12, *grid),
                "NHWC": (1, *grid, 12),
                "NLC": (1, math.prod(grid) + prefix, 12),
                "NCL": (1, 12, math.prod(grid) + prefix),
            }[layout]
            point = ExitPoint("stage", "stage", 0.5, (tap,))
            for kwargs in ({"width": 9}, {"width": 70, "expand": 1}, {"width": 90, "expand": 2}):
                head = ExitHead(point, 20, 5, "proportional", kwargs).eval()
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    head.body(torch.zeros(shape))
                assert body_cost(tap, shape, **kwargs) == (num_params(head.body), counter.get_total_flops() / 2)


def test_channels_of_a_default_head_double_where_its_map_is_halved():
    model = sd.wrap("resnet18", num_classes=5, image_size=64, head_budget=1.0)
    found = [
        [module.out_channels for module in head.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
        for head in model.heads
    ]
    assert found == [[256, 512, 512, 512], [512, 512, 512], [512, 512]]
    assert all(kwargs["expand"] == 4 for kwargs in model.wrap_config.head_kwargs)


def test_channels_never_exceed_the_width():
    model = sd.wrap("resnet18", num_classes=5, exits=["layer1"], head_kwargs={"width": 200, "expand": 2}, image_size=64)
    convs = [module for module in model.heads[0].modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs if conv.groups == 1] == [128, 200, 200, 200]


@pytest.mark.parametrize("expand", [0, -1, 1.5, True, "2"])
def test_expand_must_be_a_multiple(expand):
    message = r"expand of a head must be a positive multiple of the tap's channels, got"
    with pytest.raises(ValueError, match=message):
        make_model("NCHW", head="proportional", head_kwargs={"expand": expand})


def test_a_head_of_one_width_is_as_it_was_saved_before_there_was_expand(tmp_path):
    model = make_model("NCHW", head="proportional", head_kwargs={"width": 48}).eval()
    channels = [head.body.embed.reduce.conv.out_channels for head in model.heads]
    assert channels == [48] * 3
    assert [head.body.embed.pool.kernel_size for head in model.heads] == [3] * 3
    sd.save_pretrained(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    with torch.no_grad():
        first, second = (network(images("NCHW"), return_exits=True) for network in (model, loaded))
    assert all(map(torch.equal, first.logits, second.logits))


def test_classifier_reads_the_embedding_and_hints_a_feature_of_the_teachers_width():
    model = make_model("NCHW", head_budget=0.05).eval()
    assert widths(model)[0] < model.taps.feature_dim == 128
    out = model(images("NCHW"), return_exits=True)
    assert [feature.shape for feature in out.features] == [(2, 128)] * 4
    taps = {}
    model.heads[0].register_forward_pre_hook(lambda module, args: taps.update(x=args[0]))
    model(images("NCHW"), return_exits=True)
    embedding = model.heads[0].body(taps["x"])
    assert embedding.shape == (2, widths(model)[0])
    torch.testing.assert_close(out.logits[0], model.heads[0].classifier(embedding))
    torch.testing.assert_close(out.features[0], model.heads[0].adapter(embedding))
    small = sd.truncate(model, 0)
    assert not any("adapter" in name for name in small.state_dict())
    torch.testing.assert_close(small(images("NCHW")), out.logits[0])


@every_layout
def test_saved_heads_are_rebuilt_exactly(layout, tmp_path):
    model = make_model(layout, head_budget=0.04).eval()
    sd.save_pretrained(model, tmp_path)
    loaded = sd.from_pretrained(tmp_path)
    assert loaded.wrap_config.head_kwargs == model.wrap_config.head_kwargs
    with torch.no_grad():
        first, second = (network(images(layout), return_exits=True) for network in (model, loaded))
    assert all(map(torch.equal, (*first.logits, *first.features), (*second.logits, *second.features)))


def test_a_saved_model_does_not_depend_on_the_rule(tmp_path, monkeypatch):
    model = make_model("NCHW", head_budget=0.04)
    sd.save_pretrained(model, tmp_path)
    monkeypatch.setattr("timm_selfdistill.heads.proportional.HeadBudget.width", lambda *args: 16)
    assert widths(make_model("NCHW")) == [16] * 3
    assert widths(sd.from_pretrained(tmp_path)) == widths(model)


@every_layout
def test_a_model_saved_before_there_were_budgets_keeps_its_heads(layout, tmp_path):
    model = make_model(layout, head="published").eval()
    sd.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["timm_selfdistill"] |= {"head": "auto", "head_kwargs": {}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = sd.from_pretrained(tmp_path)
    kinds = {"NCHW": "Bottleneck"}.get(layout, "TokenHead")
    bodies = [module for head in loaded.heads for module in head.body.modules() if type(module).__name__ == kinds]
    assert len(bodies) == sum(len(point.taps) for point in model.points)
    with torch.no_grad():
        first, second = (network(images(layout), return_exits=True) for network in (model, loaded))
    assert all(map(torch.equal, (*first.logits, *first.features), (*second.logits, *second.features)))


def test_points_where_no_head_fits_are_not_chosen_by_default():
    backbone = make_backbone("NCHW", num_classes=1000)
    # Of 0.8 M parameters, 4 % are 33 k: fewer than three classifiers of 16 x 1000.
    model = sd.wrap(backbone, image_size=SIZE, head_budget=0.016)
    assert len(model.points) == 1
    assert shares(model, images("NCHW", 1))[0][1] <= 0.04


def test_too_small_a_budget_is_refused_by_default_and_told_where_exits_are_asked_for():
    message = r"No head fits head_budget=0.0001 at any of this backbone's exit points: give a larger head_budget"
    with pytest.raises(ValueError, match=message):
        make_model("NCHW", head_budget=1e-4)
    told = (
        r"No head fits head_budget=0.0001 at layer1 \([\d.]+% of the MACs, [\d.]+% of the parameters\), layer2 .*: the "
    )
    with pytest.warns(UserWarning, match=told + "smallest, of width 16, was built there") as caught:
        model = make_model("NCHW", exits=["layer1", "layer2"], head_budget=1e-4)
    assert caught[0].filename == __file__
    assert widths(model) == [16, 16]
    with pytest.warns(UserWarning, match="No head fits"):
        assert len(make_model("NCHW", exits=2, head_budget=1e-4).points) == 2


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, math.nan, math.inf, True, "0.1"])
def test_a_budget_must_be_a_share(budget):
    with pytest.raises(ValueError, match=r"head_budget is .*; allowed is a finite number above 0, up to 1"):
        make_model("NCHW", head_budget=budget)


@pytest.mark.parametrize(
    "arguments", [{"head": "bottleneck"}, {"head": "published"}, {"head_kwargs": {"width": 8}}, {"head": "token"}]
)
def test_a_budget_beside_what_says_the_width_is_refused(arguments):
    with pytest.raises(ValueError, match=r"head_budget is 0.2 for the head .*; allowed is None"):
        make_model("NCHW", head_budget=0.2, **arguments)


def test_widths_can_be_given_for_all_exits_or_for_each():
    assert widths(make_model("NCHW", head_kwargs={"width": 24})) == [24] * 3
    model = make_model("NCHW", head="bottleneck", head_kwargs=[{"width": 8}, {}, {"width": 16}])
    assert [head.body.reduce.conv.out_channels for head in model.heads] == [8, 32, 16]
    with pytest.raises(
        ValueError, match=r"head_kwargs is \[\{\}\]; allowed is a mapping, or a list of one for each of the 3"
    ):
        make_model("NCHW", head_kwargs=[{}])


@every_layout
def test_heads_of_a_budget_change_classes_are_copied_and_take_another_size(layout):
    model = make_model(layout, head_budget=0.05)
    before = widths(model)
    model.reset_classifier(9)
    assert [head.classifier.weight.shape for head in model.heads] == [(9, width) for width in before]
    copied = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        expected = model(images(layout), return_exits=True)
        assert all(map(torch.equal, copied(images(layout), return_exits=True).logits, expected.logits))
        if layout == "NCHW":
            for size in (33, 96):
                out = model(torch.randn(2, 3, size, size), return_exits=True)
                assert all(logits.shape == (2, 9) and logits.isfinite().all() for logits in out.logits)


def test_a_head_of_a_budget_compiles_to_one_graph():
    model = make_model("NCHW", head_budget=0.05).eval()
    taps = {}
    model.heads[0].register_forward_pre_hook(lambda module, args: taps.update(x=args[0]))
    model(images("NCHW"), return_exits=True)
    head = copy.deepcopy(model.heads[0])
    head._forward_pre_hooks.clear()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(compiled(taps["x"]), head(taps["x"]), strict=True):
            torch.testing.assert_close(found, expected)


def test_layers_for_hints_are_not_trained_without_hints():
    model = make_model("NCHW", head_budget=0.05)
    adapters = {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert adapters
    for preset, frozen in (("deep-supervision", adapters), ("byot-iccv2019", set())):
        task = sd.SelfDistillationTask(model, sd.SelfDistillationLoss.from_preset(preset), verbose=False)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
        model.zero_grad()
        task(images("NCHW"), torch.tensor([0, 1]))["loss"].backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == frozen


# In recipes.

MODEL = {"model": {"name": "resnet18"}, "data": {"path": "digits"}}


def test_a_recipe_has_a_budget():
    assert load_recipe(MODEL).exits.head_budget is None
    assert load_recipe(MODEL, ["exits.head_budget=0.05"]).exits.head_budget == 0.05
    with pytest.raises(RecipeError, match=r"exits.head_budget: must be .* 1"):
        load_recipe(MODEL, ["exits.head_budget=2"])
    for override in ("exits.head=bottleneck", "exits.head_kwargs={width: 8}"):
        with pytest.raises(RecipeError, match=r"head_budget: must be null unless exits.head is auto or proportional"):
            load_recipe(MODEL, ["exits.head_budget=0.05", override])


def test_a_whole_recipe_from_before_there_were_budgets_keeps_its_heads():
    whole = load_recipe(MODEL).model_dump(mode="json")
    assert load_recipe(whole).exits.head == "auto"
    del whole["exits"]["head_budget"]
    assert load_recipe(whole).exits.head == "published"
    assert load_recipe({**MODEL, "exits": {"head": "auto"}}).exits.head == "auto"


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("cifar100-*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_reproduce_a_paper_have_its_heads(recipe):
    exits = load_recipe(recipe).exits
    assert exits.head == ("sepconv_attention" if "tpami" in recipe.stem else "bottleneck")
    assert exits.head_budget is None
