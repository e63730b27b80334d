from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.heads import HEADS, ExitHead, as_map, as_tokens, choose_head, list_heads, register_head
from timm_selfdistill.heads.bodies import DepthwiseConv2d
from timm_selfdistill.model import wrap

CHANNELS, WIDTH, CLASSES = 12, 20, 5
LAYOUTS = [("NCHW", 0), ("NHWC", 0), ("NLC", 0), ("NLC", 1), ("NLC", 3), ("NCL", 0), ("NCL", 2)]
NAMES = ("bottleneck", "linear", "proportional", "sepconv_attention", "token")


def make_tap(layout="NCHW", prefix=0, grid=(6, 6), channels=CHANNELS, downsample=4):
    return Tap("stage", layout, channels, grid, prefix, downsample, None)


def make_point(*args, **kwargs):
    return ExitPoint("stage", "stage", 0.5, (make_tap(*args, **kwargs),))


def make_tensor(layout="NCHW", prefix=0, grid=(6, 6), channels=CHANNELS, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *grid, generator=generator)
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        return x.permute(0, 2, 3, 1)
    tokens = torch.randn(batch, prefix, channels, generator=generator)
    x = torch.cat([tokens, x.flatten(2).transpose(1, 2)], 1)
    return x.transpose(1, 2) if layout == "NCL" else x


def num_params(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_heads_are_listed():
    assert list_heads() == sorted(NAMES)


@pytest.mark.parametrize("head", NAMES)
@pytest.mark.parametrize(("layout", "prefix"), LAYOUTS)
def test_every_head_reads_every_layout_at_any_size(head, layout, prefix):
    network = ExitHead(make_point(layout, prefix), WIDTH, CLASSES, head)
    sizes = [(6, 6), (5, 5), (1, 1), (13, 13)] + ([] if layout in ("NLC", "NCL") else [(37, 37), (7, 3)])
    for size in sizes:
        logits, feature = network(make_tensor(layout, prefix, size))
        assert logits.shape == (3, CLASSES)
        assert feature.shape == (3, WIDTH)
        assert logits.isfinite().all()


@pytest.mark.parametrize("head", NAMES)
@pytest.mark.parametrize("channels", [1, 3, 37, 100])
def test_every_head_takes_any_number_of_channels(head, channels):
    for width in (1, 64):
        network = ExitHead(make_point(channels=channels, downsample=8), width, CLASSES, head)
        assert network(make_tensor(channels=channels))[1].shape == (3, width)


@pytest.mark.parametrize("head", NAMES)
@pytest.mark.parametrize(("layout", "prefix"), LAYOUTS)
def test_every_parameter_and_every_position_is_used(head, layout, prefix):
    torch.manual_seed(0)
    network = ExitHead(make_point(layout, prefix), WIDTH, CLASSES, head, hint_adapter=True)
    tap = make_tensor(layout, prefix, (7, 7), batch=8).requires_grad_()
    logits, feature = network(tap)
    (logits.square().sum() + feature.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    gradient = tap.grad.transpose(1, 2) if layout == "NCL" else tap.grad
    grid = gradient[:, prefix:] if layout in ("NLC", "NCL") else gradient
    channel = 1 if layout == "NCHW" else -1
    assert grid.abs().sum((0, channel)).all()


def test_published_chooses_by_layout():
    chosen = {layout: type(ExitHead(make_point(layout), WIDTH, CLASSES).body) for layout, _ in LAYOUTS}
    token = HEADS.get("token")
    assert chosen == {"NCHW": HEADS.get("bottleneck"), "NHWC": token, "NLC": token, "NCL": token}


@pytest.mark.parametrize(("layout", "head"), [("NCHW", "linear"), ("NHWC", "token"), ("NLC", "token")])
def test_published_chooses_a_light_head_for_each_of_several_branches(layout, head):
    point = ExitPoint("stage", "stage", 0.5, (make_tap(layout), make_tap(layout, channels=7)))
    assert choose_head(point) == head
    network = ExitHead(point, WIDTH, CLASSES)
    assert [type(body) for body in network.body] == [HEADS.get(head)] * 2


@pytest.mark.parametrize("head", NAMES)
def test_every_head_reads_branches_of_different_sizes_and_layouts(head):
    taps = (make_tap(), make_tap(grid=(3, 3), channels=7, downsample=2), make_tap("NLC", 1, (4, 4)))
    network = ExitHead(ExitPoint("stage", "stage", 0.5, taps), WIDTH, CLASSES, head).eval()
    tensors = [make_tensor(), make_tensor(grid=(3, 3), channels=7), make_tensor("NLC", 1, (4, 4))]
    logits, feature = network(*tensors)
    mean = sum(body(x) for body, x in zip(network.body, tensors, strict=True)) / 3
    torch.testing.assert_close(feature, mean)
    assert torch.equal(logits, network.classify(*tensors))
    (logits.square().sum() + feature.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("head", ["bottleneck", "sepconv_attention"])
def test_batch_norm_refuses_a_single_value_a_channel(head):
    network = ExitHead(make_point(), WIDTH, CLASSES, head)
    for grid in [(4, 4), (1, 1), (3, 2)]:
        with pytest.raises(ValueError, match=r"head at 'stage' cannot train on a batch of one image of this size"):
            network(make_tensor(grid=grid, batch=1))
        assert network(make_tensor(grid=grid, batch=2))[0].shape == (2, CLASSES)
    assert network(make_tensor(grid=(5, 4), batch=1))[0].shape == (1, CLASSES)
    assert network.eval()(make_tensor(grid=(1, 1), batch=1))[0].shape == (1, CLASSES)


@pytest.mark.parametrize("grid", [(6, 6), (4, 8)])
def test_layouts_are_read_as_the_same_map_and_tokens(grid):
    nchw = make_tensor(grid=grid)
    for layout, prefix in LAYOUTS:
        x, tap = make_tensor(layout, prefix, grid), make_tap(layout, prefix, grid)
        assert torch.equal(as_map(x, tap), nchw)
        assert torch.equal(as_tokens(x, tap)[:, prefix:], nchw.flatten(2).transpose(1, 2))


def test_tokens_at_another_size_keep_the_dry_runs_aspect():
    x = make_tensor("NLC", 1, (6, 12))
    assert torch.equal(as_map(x, make_tap("NLC", 1, (4, 8))), make_tensor(grid=(6, 12)))
    with pytest.raises(ValueError, match=r"The 15 tokens of 'stage' form no grid of the aspect 6:6"):
        as_map(make_tensor("NLC", 0, (3, 5)), make_tap("NLC"))


@pytest.mark.parametrize("head", ["bottleneck", "sepconv_attention"])
def test_convolutional_head_refuses_tokens_without_a_grid(head):
    point = make_point("NLC", grid=None)
    with pytest.raises(ValueError, match=r"tokens of 'stage' form no grid: choose the head token or linear"):
        ExitHead(point, WIDTH, CLASSES, head)
    for other in ("token", "linear"):
        assert ExitHead(point, WIDTH, CLASSES, other)(make_tensor("NLC"))[0].shape == (3, CLASSES)


# The published forms.


def test_bottlenecks_of_a_resnet_shrink_by_8_4_and_2(make_backbone):
    model = wrap(make_backbone("resnet18"), head="bottleneck", image_size=64)
    shrinks = [head.body.shrink.conv for head in model.heads]
    assert [conv.kernel_size for conv in shrinks] == [(8, 8), (4, 4), (2, 2)]
    assert [conv.stride for conv in shrinks] == [(8, 8), (4, 4), (2, 2)]
    for head, channels in zip(model.heads, (16, 32, 64), strict=True):
        assert head.body(torch.randn(2, channels, 16, 16)).shape == (2, 128)


def test_sepconv_chains_of_a_resnet_have_3_2_and_1_links(make_backbone):
    model = wrap(make_backbone("resnet18"), head="sepconv_attention", image_size=64)
    assert [len(head.body.chain) for head in model.heads] == [3, 2, 1]
    widths = [[link[-1].conv.out_channels for link in head.body.chain] for head in model.heads]
    assert widths == [[32, 64, 128], [64, 128], [128]]


def test_bottleneck_has_the_parameters_of_its_layout():
    c, k, w, d = CHANNELS, 4, WIDTH // 4, WIDTH
    body = ExitHead(make_point(downsample=k), d, CLASSES, "bottleneck").body
    assert num_params(body) == (c * w + 2 * w) + (w * w * k * k + 2 * w) + (w * d + 2 * d)
    w = 7
    body = ExitHead(make_point(downsample=k), d, CLASSES, "bottleneck", {"width": w}).body
    assert num_params(body) == (c * w + 2 * w) + (w * w * k * k + 2 * w) + (w * d + 2 * d)


def test_sepconv_has_the_parameters_of_its_layout():
    def separable(a, b):
        return 9 * a + (a * a + 2 * a) + 9 * a + (a * b + 2 * b)

    point = make_point(channels=16, downsample=4)
    body = ExitHead(point, 64, CLASSES, "sepconv_attention").body
    chain = separable(16, 32) + separable(32, 64)
    assert num_params(body) == separable(16, 16) + chain
    assert num_params(ExitHead(point, 64, CLASSES, "sepconv_attention", {"attention": False}).body) == chain


def test_attention_multiplies_the_tap():
    body = ExitHead(make_point(), WIDTH, CLASSES, "sepconv_attention").body.eval()
    tap = make_tensor()
    weight = torch.sigmoid(nn.functional.interpolate(body.attention(tap), size=(6, 6), mode="bilinear"))
    assert weight.shape == tap.shape
    torch.testing.assert_close(body(tap), body.chain(tap * weight).mean((2, 3)))


def test_bottleneck_pads_borders_with_zeros():
    body = ExitHead(make_point(downsample=4), WIDTH, CLASSES, "bottleneck").body.eval()
    inner = body.reduce(make_tensor(grid=(5, 6)))
    padded = torch.zeros(*inner.shape[:2], 8, 8)
    padded[:, :, :5, :6] = inner
    torch.testing.assert_close(body(make_tensor(grid=(5, 6))), body.expand(body.shrink(padded)).mean((2, 3)))


def test_linear_head_is_mean_norm_and_one_layer():
    head = ExitHead(make_point("NHWC"), WIDTH, CLASSES, "linear")
    mean = make_tensor("NHWC").mean((1, 2))
    normed = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head.body(make_tensor("NHWC")), normed @ head.body.proj.weight.T + head.body.proj.bias)


def test_token_head_weighs_prefix_tokens_as_much_as_the_grid():
    body = ExitHead(make_point("NLC", 2), WIDTH, CLASSES, "token").body
    tap = make_tensor("NLC", 2)
    each = torch.stack([body.mlp(body.norm(tap[:, n])) for n in range(tap.shape[1])])
    torch.testing.assert_close(body(tap), (each[:2].mean(0) + each[2:].mean(0)) / 2)


def test_classifier_reads_the_body_and_the_adapter_only_the_hint():
    head = ExitHead(make_point(), WIDTH, CLASSES, "linear", hint_adapter=True)
    logits, feature = head(make_tensor())
    embedded = head.body(make_tensor())
    assert torch.equal(logits, head.classifier(embedded))
    assert torch.equal(feature, head.adapter(embedded))
    assert num_params(head.adapter) == WIDTH * WIDTH + WIDTH
    plain = ExitHead(make_point(), WIDTH, CLASSES, "linear")
    assert torch.equal(plain(make_tensor())[1], plain.body(make_tensor()))


def test_reset_classifier_changes_the_logits_only():
    head = ExitHead(make_point(), WIDTH, CLASSES, "linear").to(torch.bfloat16)
    body = [parameter.clone() for parameter in head.body.parameters()]
    head.reset_classifier(9)
    assert head(make_tensor().bfloat16())[0].shape == (3, 9)
    assert all(torch.equal(a, b) for a, b in zip(body, head.body.parameters(), strict=True))


# Names and arguments.


def test_unknown_head_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Unknown head 'botleneck'; known are bottleneck, linear, .*mean 'bottleneck'"
    ):
        ExitHead(make_point(), WIDTH, CLASSES, "botleneck")


def test_unknown_head_argument_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="Head 'bottleneck' takes no argument widht; allowed are width"):
        ExitHead(make_point(), WIDTH, CLASSES, "bottleneck", {"widht": 8})
    with pytest.raises(ValueError, match="Head 'linear' takes no argument tap; allowed are none"):
        ExitHead(make_point(), WIDTH, CLASSES, "linear", {"tap": 8})


@pytest.mark.parametrize("head", ["bottleneck", "token"])
@pytest.mark.parametrize("width", [0, -4, 2.5, True, "8"])
def test_width_must_be_a_positive_number(head, width):
    with pytest.raises(ValueError, match="width of a head must be a positive number of channels, got"):
        ExitHead(make_point(), WIDTH, CLASSES, head, {"width": width})


@pytest.mark.parametrize("head", ["bottleneck", "token"])
@pytest.mark.parametrize("width", [10**6, 10**9, 10**15, 10**30])
def test_a_head_that_the_memory_cannot_hold_is_refused_before_it_is_made(head, width, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**24))
    message = rf"head_kwargs \{{'width': {width}\}}: head '{head}' at 'stage' would have (more )?parameters"
    with pytest.raises(ValueError, match=message):
        ExitHead(make_point(), 8, 3, head=head, head_kwargs={"width": width})


def test_attention_is_there_or_not():
    with pytest.raises(ValueError, match="attention of a head must be true or false, got 'no'"):
        ExitHead(make_point(), 8, 3, head="sepconv_attention", head_kwargs={"attention": "no"})


@pytest.fixture
def third_party():
    @register_head("third_party")
    class ThirdParty(nn.Module):
        def __init__(self, tap, feature_dim, scale=1.0):
            super().__init__()
            self.tap, self.scale = tap, scale
            self.proj = nn.Linear(tap.channels, feature_dim)

        def forward(self, x):
            return self.scale * self.proj(as_tokens(x, self.tap).amax(1))

    yield ThirdParty
    del HEADS._entries["third_party"]


def test_third_partys_head_works_by_name(make_backbone, images, third_party):
    assert "third_party" in list_heads()
    model = wrap(make_backbone("resnet18"), head="third_party", head_kwargs={"scale": 2.0}, image_size=64)
    assert [type(head.body) for head in model.heads] == [third_party] * 3
    assert {head.body.scale for head in model.heads} == {2.0}
    assert model(images, return_exits=True).logits[0].shape == (4, 5)


def test_taken_head_name_is_refused(third_party):
    with pytest.raises(ValueError, match="head named 'third_party' is already registered"):
        register_head("third_party")(nn.Identity)


@pytest.mark.parametrize("size", [(7, 8), (1, 2)])
def test_a_strided_depthwise_convolution_trains_the_same_in_bfloat16(size):
    torch.manual_seed(0)
    conv = DepthwiseConv2d(6, stride=2)
    x = torch.randn(2, 6, *size, requires_grad=True)
    expected = F.conv2d(x, conv.weight, stride=2, padding=1, groups=6)
    assert torch.equal(conv(x), expected)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (x, conv.weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    for value, reference in zip(torch.autograd.grad((found * weight).sum(), (x, conv.weight)), gradients, strict=True):
        torch.testing.assert_close(value, reference, rtol=0.05, atol=0.1)


# The state dict of one exit in the order in which its tensors are made, by what `wrap` is given.
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BLOCK = ["conv.weight", *(f"bn.{name}" for name in BATCH_NORM)]
LAYERS = {
    "bottleneck": [f"body.{part}.{name}" for part in ("reduce", "shrink", "expand") for name in BLOCK],
    "linear": ["body.norm.weight", "body.norm.bias", "body.proj.weight", "body.proj.bias"],
    "token": ["body.norm.weight", "body.norm.bias", *(f"body.mlp.{n}.{p}" for n in (0, 2) for p in ("weight", "bias"))],
}


@pytest.mark.parametrize("hint_adapter", [False, True])
@pytest.mark.parametrize("head", LAYERS)
def test_a_seed_gives_the_same_exits_to_the_bit(head, hint_adapter):
    """After the backbone, each exit draws its body, classifier and adapter, shallow to deep, and nothing else does."""
    torch.manual_seed(0)
    model = wrap("test_resnet", num_classes=CLASSES, image_size=32, head=head, hint_adapter=hint_adapter)
    after = torch.rand(1)
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=CLASSES)
    width = model.taps.feature_dim
    expected = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for index, point in enumerate(model.points):
        (tap,) = point.taps
        parts = {"body": HEADS.get(head)(tap, width), "classifier": nn.Linear(width, CLASSES)}
        if hint_adapter:
            parts["adapter"] = nn.Linear(width, width)
        state = nn.ModuleDict(parts).state_dict()
        linears = [f"{part}.{name}" for part in list(parts)[1:] for name in ("weight", "bias")]
        assert list(state) == [*LAYERS[head], *linears]
        expected |= {f"heads.{index}.{name}": tensor for name, tensor in state.items()}
    assert torch.equal(after, torch.rand(1))
    state = model.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
