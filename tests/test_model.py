import copy
import threading
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from torch import nn

from timm_selfdistill.exits import find_exit_points
from timm_selfdistill.heads import list_heads
from timm_selfdistill.hub import class_names, from_pretrained, save_pretrained
from timm_selfdistill.model import ExitOutput, SelfDistillModel, wrap

CROSSVIT = {"embed_dim": [16, 32], "num_heads": [2, 2], "depth": [[1, 2, 0], [1, 2, 0]]}
LAYOUTS = ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
SIZE = 64


def run_seeded(model, x, **kwargs):
    """Run a model whose dropout or stochastic depth draws: Swin has some by default."""
    torch.manual_seed(3)
    return model(x, **kwargs)


def loss_over_all(out):
    """A loss that reaches every logit and feature."""
    target = torch.arange(len(out.logits[0])) % out.logits[0].shape[1]
    return sum(F.cross_entropy(z, target) for z in out.logits) + sum(f.square().mean() for f in out.features)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one, other, **tolerance):
    for a, b in zip((*one.logits, *one.features), (*other.logits, *other.features), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def count_hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# The backbone's own answer.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_is_the_backbones_bit_for_bit(make_backbone, family, images, training):
    random = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    bare = make_backbone(family, **random).train(training)
    model = wrap(make_backbone(family, **random), image_size=SIZE).train(training)
    for return_exits in (False, True):  # in train mode, also the second step with the statistics that the first moved
        answer = run_seeded(model, images, return_exits=return_exits)
        logits = answer.logits[-1] if return_exits else answer
        assert torch.equal(logits, run_seeded(bare, images))
    assert_same_state(model.backbone.state_dict(), bare.state_dict())


def test_return_type_does_not_depend_on_the_mode(make_backbone, images):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    for training in (True, False):
        model.train(training)
        assert isinstance(model(images), torch.Tensor)
        assert isinstance(model(images, return_exits=True), ExitOutput)


@torch.no_grad()
def test_return_exits_gives_logits_and_features_shallow_to_deep(make_backbone, family, images):
    model = wrap(make_backbone(family), image_size=SIZE).eval()
    backbone = model.backbone
    out = model(images, return_exits=True)
    feature = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    assert [z.shape for z in out.logits] == [(4, 5)] * 4
    assert [f.shape for f in out.features] == [feature.shape] * 4
    assert torch.equal(out.logits[-1], model(images))
    torch.testing.assert_close(out.features[-1], feature)
    for k, (head, point) in enumerate(zip(model.heads, model.points, strict=True)):
        taps = []
        handle = backbone.get_submodule(point.module).register_forward_hook(lambda m, a, o, taps=taps: taps.append(o))
        backbone(images)
        handle.remove()
        logits, hint = head(taps[0])
        assert torch.equal(out.logits[k], logits)
        assert torch.equal(out.features[k], hint)


@torch.no_grad()
def test_forward_exit_runs_nothing_after_the_exit(make_backbone, family, images):
    model = wrap(make_backbone(family), image_size=SIZE).eval()
    ran = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    out = model(images, return_exits=True)
    of_backbone = [name for name in ran if name.startswith("backbone.")]
    for k, point in enumerate(model.points):
        ran.clear()
        logits = model.forward_exit(images, k)
        assert torch.equal(logits, out.logits[k])
        tap = f"backbone.{point.module}"
        last = max(n for n, name in enumerate(of_backbone) if name == tap or name.startswith(f"{tap}."))
        assert [name for name in ran if name.startswith("backbone.")] == of_backbone[: last + 1]
        assert {name.split(".")[1] for name in ran if name.startswith("heads.")} == {str(k)}
    ran.clear()
    assert torch.equal(model.forward_exit(images, model.num_exits), out.logits[-1])
    assert ran == of_backbone


@pytest.mark.parametrize("exit", [-1, 4])
def test_forward_exit_refuses_an_exit_that_does_not_exist(make_backbone, images, exit):
    with pytest.raises(ValueError, match=rf"no exit {exit}; allowed are 0 to 3"):
        wrap(make_backbone("resnet18"), image_size=SIZE).forward_exit(images, exit)


def test_member_of_a_tuple_is_what_the_head_reads(make_backbone):
    model = wrap(make_backbone("pit_ti_224", depth=[1, 1, 1]), exits=2).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        out = model(x, return_exits=True)
        assert torch.equal(model.forward_exit(x, 0), out.logits[0])
    assert [z.shape for z in out.logits] == [(1, 5)] * 3


# Copies, precision, memory formats, compilers.


def test_copy_made_after_a_forward_is_independent(make_backbone, images, family):
    model = wrap(make_backbone(family), image_size=SIZE).eval()
    with torch.no_grad():
        before = model(images, return_exits=True)
    assert model(images, return_exits=True).logits[0].requires_grad  # nothing of this graph may stay in the model
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
        twin = wrap(make_backbone(family, seed=9), image_size=SIZE).eval()
        twin.load_state_dict(clone.state_dict())
        assert_close(clone(images, return_exits=True), twin(images, return_exits=True), rtol=0, atol=0)
        assert torch.equal(clone.forward_exit(images, 0), twin.forward_exit(images, 0))
        assert_close(model(images, return_exits=True), before, rtol=0, atol=0)
        del model.heads
        assert_close(clone(images, return_exits=True), twin(images, return_exits=True), rtol=0, atol=0)


def test_forward_that_fails_leaves_the_model_usable(make_backbone, images):
    model = wrap(make_backbone("vit_tiny_patch16_224")).eval()
    before = model(images, return_exits=True)
    for fail in (lambda x: model(x, return_exits=True), lambda x: model.forward_exit(x, 0)):
        with pytest.raises(AssertionError):
            fail(images[..., :32])
    assert_close(copy.deepcopy(model)(images, return_exits=True), before)


def test_state_dict_round_trip_keeps_timms_keys(make_backbone, family, images, tmp_path):
    model = wrap(make_backbone(family), image_size=SIZE).eval()
    state = model.state_dict()
    bare = make_backbone(family).state_dict()
    assert {name.removeprefix("backbone.") for name in state if not name.startswith("heads.")} == set(bare)
    assert all(name.split(".")[0] in ("backbone", "heads") for name in state)
    torch.save(state, tmp_path / "state.pt")
    twin = wrap(make_backbone(family, seed=9), image_size=SIZE).eval()
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert_close(twin(images, return_exits=True), model(images, return_exits=True), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_precision_and_memory_format_change_with_the_model(make_backbone, images, name):
    model = wrap(make_backbone(name), image_size=SIZE).eval()
    with torch.no_grad():
        expected = model(images, return_exits=True)
        last = model.to(memory_format=torch.channels_last)(
            images.contiguous(memory_format=torch.channels_last), return_exits=True
        )
        assert_close(last, expected)
        double = model.to(torch.float64)(images.double(), return_exits=True)
    assert {tensor.dtype for tensor in (*double.logits, *double.features)} == {torch.float64}
    assert_close(ExitOutput(*([t.float() for t in part] for part in double)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_take_the_backbones_precision(make_backbone, dtype):
    model = wrap(make_backbone("resnet18").to(dtype), image_size=SIZE)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_heads_take_the_backbones_mode(make_backbone, training):
    model = wrap(make_backbone("resnet18").train(training), image_size=SIZE)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("name", LAYOUTS)
def test_autocast_trains_every_exit_in_bf16(make_backbone, images, name):
    model = wrap(make_backbone(name), image_size=SIZE)
    expected = run_seeded(copy.deepcopy(model), images, return_exits=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = run_seeded(model, images, return_exits=True)
    assert out.logits[0].dtype is torch.bfloat16
    for a, b in zip(out.logits, expected.logits, strict=True):
        assert (a.float() - b).norm() < 0.1 * b.norm()
    loss_over_all(ExitOutput(*([t.float() for t in part] for part in out))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, {}) for name in LAYOUTS),
        ("hrnet_w18_small", {}),
        ("tnt_s_legacy_patch16_224", {"img_size": 64, "depth": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_model_equals_the_eager_one(make_backbone, images, name, kwargs):
    torch._dynamo.reset()
    model = wrap(make_backbone(name, **kwargs), image_size=SIZE).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(images, return_exits=True), model(images, return_exits=True))
        torch.testing.assert_close(compiled(images), model(images))
    torch._dynamo.reset()


def test_the_first_forward_of_a_thread_may_be_compiled(make_backbone, images):
    found = []
    for return_exits in (True, False):  # torch notices in the second
        torch._dynamo.reset()
        model = wrap(make_backbone("resnet18"), image_size=SIZE)
        run = torch.compile(model, fullgraph=True, backend="eager")
        thread = threading.Thread(target=lambda run=run, exits=return_exits: found.append(run(images, exits)))
        thread.start()
        thread.join()
    torch._dynamo.reset()
    assert len(found) == 2


def test_compiled_training_step_equals_the_eager_one(make_backbone, images):
    torch._dynamo.reset()
    eager = wrap(make_backbone("resnet18"), image_size=SIZE)
    compiled = copy.deepcopy(eager)
    loss_over_all(eager(images, return_exits=True)).backward()
    loss_over_all(torch.compile(compiled, fullgraph=True, backend="aot_eager")(images, return_exits=True)).backward()
    torch._dynamo.reset()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"), reason="torch is too old for it"
)
def test_compiled_training_step_under_gradient_checkpointing_equals_the_eager_one(make_backbone, images, monkeypatch):
    # As the documentation says: without this, torch refuses the hooks inside the checkpointed part.
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    torch._dynamo.reset()
    eager = wrap(make_backbone("vit_tiny_patch16_224"), image_size=SIZE)
    compiled = copy.deepcopy(eager)
    compiled.set_grad_checkpointing()
    loss_over_all(eager(images, return_exits=True)).backward()
    loss_over_all(torch.compile(compiled, fullgraph=True, backend="aot_eager")(images, return_exits=True)).backward()
    torch._dynamo.reset()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, rtol=1e-4, atol=1e-5)


# Training.


def test_gradient_checkpointing_changes_no_gradient_and_runs_the_heads_once(make_backbone, family, images):
    plain = wrap(make_backbone(family), image_size=SIZE)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    calls = {}
    for model in (plain, saving):
        calls[model] = []
        for module in model.backbone.modules():
            module.register_forward_pre_hook(lambda m, a, calls=calls[model]: calls.append(m))
        loss_over_all(run_seeded(model, images, return_exits=True)).backward()
    assert len(calls[saving]) > len(calls[plain])  # recomputed: gradient checkpointing was at work
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert_same_state(saving.heads.state_dict(), plain.heads.state_dict())
    counters = [value for name, value in saving.heads.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(value == 1 for value in counters)
    assert_same_state(dict(saving.backbone.named_buffers()), dict(plain.backbone.named_buffers()))


def test_set_grad_checkpointing_can_be_switched_off(make_backbone):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.backbone.grad_checkpointing


def test_heads_do_not_run_where_they_are_not_asked_for(make_backbone, images):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    before = {name: value.clone() for name, value in model.heads.state_dict().items()}
    model(images)
    assert_same_state(model.heads.state_dict(), before)
    model(images, return_exits=True)
    assert all(v == 1 for name, v in model.heads.state_dict().items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("head", list_heads())
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_gets_a_gradient(make_backbone, images, name, head):
    model = wrap(make_backbone(name), head=head, hint_adapter=True, image_size=SIZE)
    loss_over_all(model(images, return_exits=True)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [name for name, p in model.heads.named_parameters() if not p.grad.any()] == []


def test_exit_gradients_reach_the_layers_before_the_tap_only(make_backbone, images):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    model(images, return_exits=True).logits[1].square().sum().backward()
    stages = {
        stage: any(p.grad is not None and p.grad.any() for p in model.backbone.get_submodule(stage).parameters())
        for stage in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc")
    }
    assert stages == {"conv1": True, "layer1": True, "layer2": True, "layer3": False, "layer4": False, "fc": False}


# Wrapping.


def test_wrap_creates_a_timm_model_from_its_name():
    model = wrap(
        "resnet18",
        num_classes=7,
        exits=[2],
        model_kwargs={"channels": [16, 32, 64, 128], "in_chans": 1},
        image_size=(32, 48),
        small_stem=True,
    )
    assert isinstance(model, SelfDistillModel)
    assert model.points[0].taps[0].grid == (16, 24)
    assert [z.shape for z in model(torch.randn(2, 1, 32, 48), return_exits=True).logits] == [(2, 7)] * 2


def test_same_backbone_wrapped_twice_serves_both(make_backbone, images):
    backbone = make_backbone("resnet18").eval()
    one, two = wrap(backbone, image_size=SIZE), wrap(backbone, exits=[3], head="linear", image_size=SIZE)
    with torch.no_grad():
        first = one(images, return_exits=True)
        second = two(images, return_exits=True)
        assert_close(one(images, return_exits=True), first, rtol=0, atol=0)
        assert (len(first.logits), len(second.logits)) == (4, 2)
        assert torch.equal(one.forward_exit(images, 2), first.logits[2])
        assert torch.equal(two.forward_exit(images, 0), second.logits[0])


def test_backbone_that_is_not_timms_can_be_wrapped(tiny_net):
    model = wrap(tiny_net(), exits=2, image_size=32)
    x = torch.randn(4, 3, 32, 32)
    out = model(x, return_exits=True)
    assert model.exit_names == ("stage0", "stage1", "fc")
    assert torch.equal(out.logits[-1], model.backbone(x))
    torch.testing.assert_close(out.features[-1] @ model.backbone.fc.weight.T + model.backbone.fc.bias, out.logits[-1])
    assert torch.equal(model.eval().forward_exit(x, 1), model(x, return_exits=True).logits[1])
    model.reset_classifier(3)  # at the 32 px of the dry run, the only size that this backbone takes
    assert [z.shape for z in model(x, return_exits=True).logits] == [(4, 3)] * 3


def test_model_has_what_timm_reads_from_a_model(make_backbone, images):
    model = wrap(make_backbone("resnet18"), image_size=SIZE).eval()
    backbone = model.backbone
    assert (model.num_exits, model.exit_names) == (3, ("layer1", "layer2", "layer3", "fc"))
    assert (model.num_classes, model.num_features) == (5, 128)
    assert model.pretrained_cfg == backbone.pretrained_cfg
    assert model.feature_info is backbone.feature_info
    assert model.get_classifier() is backbone.fc
    features = model.forward_features(images)
    assert torch.equal(features, backbone.forward_features(images))
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"head": "nonsense"},
            r"Unknown head 'nonsense'; known are bottleneck, linear, proportional, sepconv_attention, token",
        ),
        ({"head_kwargs": {"widht": 3}}, r"takes no argument widht; allowed are width"),
        ({"exits": [99]}, r"no module at index 99; allowed are 0 \(act1\)"),
        ({"num_classes": 3}, r"for the ResNet given, call its reset_classifier\(num_classes\) first"),
        ({"pretrained": True}, r"create a backbone from its name; for the ResNet given"),
        ({"model_kwargs": {"in_chans": 1}}, r"create a backbone from its name; for the ResNet given"),
    ],
    ids=str,
)
def test_wrong_argument_is_refused_and_leaves_the_backbone_alone(make_backbone, kwargs, message):
    backbone = make_backbone("resnet18")
    with pytest.raises(ValueError, match=message):
        wrap(backbone, image_size=SIZE, **kwargs)
    assert count_hooks(backbone) == 0
    assert backbone.num_classes == 5


def test_wrapped_model_is_not_wrapped_again(make_backbone):
    with pytest.raises(ValueError, match=r"wrapped already; wrap its \.backbone"):
        wrap(wrap(make_backbone("resnet18"), image_size=SIZE))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnt18", {}, r"timm cannot create 'resnt18'.*did you mean .*'resnet18'"),
        ("resnt18.a1_in1k", {}, r"did you mean .*'resnet18'"),
        ("qqqqqqqqqq", {}, r"Unknown model \(qqqqqqqqqq\)\.$"),
        ("resnet18", {"bogus": 1}, r"cannot create 'resnet18' with \{'bogus': 1\}: .*unexpected.*'bogus'\.$"),
    ],
)
def test_unknown_name_or_argument_of_timm_is_explained(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        wrap(name, model_kwargs=kwargs)


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"),
        OfflineModeIsEnabled("offline mode is enabled"),
        URLError("no route to host"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_named_with_the_ways_on(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("timm.create_model", fail)
    message = r"^The pretrained weights of 'resnet18' cannot be downloaded \(.+\): .*network.*cache.*pretrained=false"
    with pytest.raises(ValueError, match=message):
        wrap("resnet18", pretrained=True)


def test_a_file_of_weights_that_is_missing_is_no_matter_of_the_network(tmp_path):
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    with pytest.raises(ValueError, match=r"timm cannot create 'resnet18' with .*weights\.safetensors"):
        wrap("resnet18", pretrained=True, model_kwargs=overlay)


def test_a_place_without_a_model_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"local-dir:.* must be a folder with the config\.json of a timm model\.$"):
        wrap(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"must be a folder with the config\.json of a timm model\.$"):
        wrap(f"local-dir:{tmp_path}")

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ValueError, match=r"there must be such a repository of a timm model on the Hub"):
        wrap("hf-hub:a/b")


def test_a_backbone_of_one_size_is_to_be_built_for_another(make_backbone):
    backbone = make_backbone("vit_tiny_patch16_224")
    with pytest.raises(
        ValueError, match=r"Its own image_size is 64 x 64\. .*model\.kwargs\.img_size=32\), or .*dynamic"
    ):
        wrap(backbone, image_size=32)
    with pytest.raises(ValueError, match=r"model\.kwargs\.img_size=\[32,48\]"):
        wrap(backbone, image_size=(32, 48))
    kwargs = {**FAMILIES["vit_tiny_patch16_224"], "img_size": 32}
    assert wrap("vit_tiny_patch16_224", num_classes=3, image_size=32, model_kwargs=kwargs).num_exits == 3


def test_out_of_memory_is_not_blamed_on_the_model(monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("timm_selfdistill.exits.probe._forward", fail)
    with pytest.raises(MemoryError):
        wrap("test_resnet")


# Several branches, several classifiers.


def test_branches_have_a_body_each_and_their_mean_is_the_feature(make_backbone):
    model = wrap(make_backbone("crossvit_tiny_240", **CROSSVIT)).eval()
    x = torch.randn(2, 3, 240, 240)
    taps = []
    handle = model.backbone.blocks[0].register_forward_hook(lambda m, a, out: taps.extend(out))
    with torch.no_grad():
        out = model(x, return_exits=True)
        handle.remove()
        head = model.heads[0]
        feature = (head.body[0](taps[0]) + head.body[1](taps[1])) / 2
        torch.testing.assert_close(out.features[0], feature)
        torch.testing.assert_close(out.logits[0], head.classifier(feature))
    assert [tap.channels for tap in model.points[0].taps] == [16, 32]
    assert out.features[0].shape == (2, 48)


def test_feature_of_a_classifier_for_each_branch_is_all_that_they_read(make_backbone):
    model = wrap(make_backbone("crossvit_tiny_240", **CROSSVIT)).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, 240, 240), return_exits=True)
    first, second = out.features[-1].split([16, 32], 1)
    logits = (model.backbone.head[0](first) + model.backbone.head[1](second)) / 2
    torch.testing.assert_close(out.logits[-1], logits)
    assert model.exit_names[-1] == "head"


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "efficientvim_m1_dist"])
def test_distilled_training_answers_with_the_mean_of_both_classifiers(make_backbone, name):
    size = {"deit_tiny_distilled_patch16_224": 64, "levit_128s": 224, "efficientvim_m1_dist": 128}[name]
    x = torch.randn(4, 3, size, size)
    backbone = make_backbone(name)
    backbone.set_distilled_training(True)
    model = wrap(backbone, image_size=size).train()
    torch.manual_seed(3)
    first, second = copy.deepcopy(backbone)(x)
    out = run_seeded(model, x, return_exits=True)
    assert torch.equal(out.logits[-1], (first + second) / 2)
    assert out.features[-1].shape == (4, model.taps.feature_dim)
    loss_over_all(out).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    backbone.set_distilled_training(False)
    torch.testing.assert_close(run_seeded(model, x), (first + second) / 2)


def test_classifier_that_reads_maps_with_channels_last_is_averaged_over_rows_and_columns(make_backbone):
    model = wrap(make_backbone("sequencer2d_s", img_size=64)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        feature = model(x, return_exits=True).features[-1]
        torch.testing.assert_close(feature, model.forward_head(model.forward_features(x), pre_logits=True))
    assert model.taps.feature_dim == model.num_features


# What goes in.


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_input_channels(make_backbone, family, channels):
    model = wrap(make_backbone(family, in_chans=channels), image_size=SIZE).train()
    out = model(torch.randn(2, channels, SIZE, SIZE), return_exits=True)
    assert {z.shape for z in out.logits} == {(2, 5)}
    loss_over_all(out).backward()


@pytest.mark.parametrize("size", [37, (64, 48), (33, 65)])
@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "convnext_atto"])
def test_odd_sizes_where_the_backbone_takes_them(make_backbone, name, size):
    size = (size, size) if isinstance(size, int) else size
    here, elsewhere = (wrap(make_backbone(name), image_size=s).train() for s in (size, SIZE))
    for model in (here, elsewhere):
        out = model(torch.randn(2, 3, *size), return_exits=True)
        assert {z.shape for z in out.logits} == {(2, 5)}
        loss_over_all(out).backward()


@pytest.mark.parametrize("head", list_heads())
def test_vits_with_a_dynamic_image_size_take_any(make_backbone, head):
    kwargs = {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = wrap(make_backbone("vit_tiny_patch16_224", **kwargs), head=head, image_size=SIZE).eval()
    assert model.points[0].taps[0].grid == (4, 4)
    for size in (64, 96, 100):
        assert model(torch.randn(2, 3, size, size), return_exits=True).logits[0].shape == (2, 5)
    x = torch.randn(2, 3, 48, 80)
    if head in ("bottleneck", "sepconv_attention"):
        with pytest.raises(ValueError, match=r"The 15 tokens of 'blocks\.0' form no grid of the aspect 4:4"):
            model(x, return_exits=True)
        model = wrap(make_backbone("vit_tiny_patch16_224", **kwargs), head=head, image_size=(48, 80)).eval()
    assert model(x, return_exits=True).logits[0].shape == (2, 5)


def test_fixed_size_that_is_not_met_is_explained(make_backbone):
    with pytest.raises(ValueError, match=r"VisionTransformer fails on an input of shape \(1, 3, 96, 96\).*image_size"):
        wrap(make_backbone("vit_tiny_patch16_224"), image_size=96)


@pytest.mark.parametrize("head", list_heads())
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_image_trains_or_is_refused_with_the_reason(make_backbone, name, head):
    # Without batch norm of its own, a backbone takes one image; it is the heads that may not.
    kwargs = {"norm_layer": "groupnorm1"} if name == "resnet18" else {}
    model = wrap(make_backbone(name, **kwargs), head=head, image_size=SIZE).train()
    loss_over_all(model(torch.randn(1, 3, SIZE, SIZE), return_exits=True)).backward()
    if name != "resnet18" or head in ("linear", "token"):
        return
    tiny = torch.randn(1, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"head at 'layer1' cannot train on a batch of one image of this size.*two images"
    ):
        model(tiny, return_exits=True)
    assert model(tiny.repeat(2, 1, 1, 1), return_exits=True).logits[0].shape == (2, 5)
    assert model.eval()(tiny, return_exits=True).logits[0].shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("resnet18", "max"),
        ("resnet18", "avgmax"),
        ("resnet18", "catavgmax"),
        ("vit_tiny_patch16_224", "avg"),
        ("vit_tiny_patch16_224", "max"),
        ("vit_tiny_patch16_224", "map"),
        ("swin_tiny_patch4_window7_224", "max"),
    ],
)
def test_any_global_pool(make_backbone, images, name, pool):
    model = wrap(make_backbone(name, global_pool=pool), image_size=SIZE).eval()
    backbone = model.backbone
    with torch.no_grad():
        out = model(images, return_exits=True)
        feature = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    torch.testing.assert_close(out.features[-1], feature)
    assert {f.shape for f in out.features} == {feature.shape}


def test_backbone_whose_pooling_is_switched_off_is_refused(make_backbone):
    with pytest.raises(ValueError, match=r"ResNet fails on an input of shape \(1, 3, 64, 64\): .*256x2 and 128x5"):
        wrap(make_backbone("resnet18", global_pool=""), image_size=SIZE)


def test_models_registered_by_the_user_work_by_name(tmp_path):
    @register_model
    def my_resnet(pretrained=False, **kwargs):
        kwargs = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (64, 64, 64, 64), **kwargs}
        return build_model_with_cfg(ResNet, "my_resnet", pretrained, **kwargs)

    model = wrap("my_resnet", num_classes=5, image_size=SIZE).eval()
    assert model.num_exits == 3
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        loaded = from_pretrained(save_pretrained(model, tmp_path))
        assert_close(loaded(x, return_exits=True), model(x, return_exits=True), rtol=0, atol=0)


# A new classifier.


def test_reset_classifier_resizes_every_logit_and_goes_on_training(make_backbone, family, images):
    model = wrap(make_backbone(family), image_size=SIZE)
    hooks = count_hooks(model)
    for num_classes in (9, 2):
        model.reset_classifier(num_classes)
        out = model(images, return_exits=True)
        assert model.num_classes == num_classes
        assert [z.shape for z in out.logits] == [(4, num_classes)] * 4
        classifier = model.get_classifier()
        if not isinstance(classifier, tuple):
            torch.testing.assert_close(classifier(out.features[-1]), out.logits[-1])
    assert count_hooks(model) == hooks
    loss_over_all(out).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_reset_classifier_drops_the_names_of_other_classes(make_backbone):
    backbone = make_backbone("resnet18")
    backbone.pretrained_cfg["label_names"] = [f"class {n}" for n in range(5)]
    backbone.pretrained_cfg["label_descriptions"] = {"class 0": "the first"}
    model = wrap(backbone, image_size=SIZE)
    twin = copy.copy(backbone.pretrained_cfg)
    model.reset_classifier(5)
    assert class_names(model) == tuple(twin["label_names"])
    model.reset_classifier(3)
    assert class_names(model) is None
    left = {key: value for key, value in twin.items() if not key.startswith("label_")}
    assert model.pretrained_cfg == backbone.default_cfg == left


def test_reset_classifier_with_the_same_pooling_keeps_the_heads(make_backbone):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    bodies = [head.body for head in model.heads]
    model.reset_classifier(9, global_pool="max")
    assert [head.body for head in model.heads] == bodies
    assert model.backbone.global_pool.pool_type == "max"


@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier_that_changes_the_width_builds_the_heads_anew(make_backbone, images, training):
    model = wrap(make_backbone("resnet18").double(), head="linear", hint_adapter=True, image_size=SIZE)
    model.train(training).reset_classifier(9, global_pool="catavgmax")
    assert {module.training for module in model.modules()} == {training}
    out = model(images.double(), return_exits=True)
    assert [z.shape for z in out.logits] == [(4, 9)] * 4
    assert [f.shape for f in out.features] == [(4, 256)] * 4
    assert out.logits[0].dtype is torch.float64
    assert [type(head.adapter) for head in model.heads] == [nn.Linear] * 3


def test_reset_classifier_keeps_precision_where_the_backbone_forgets_it(tiny_net):
    model = wrap(tiny_net().double(), exits=2, image_size=32)
    model.reset_classifier(3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_classifier_that_is_resized_in_place_is_read_once(tiny_net):
    class InPlace(tiny_net):
        def reset_classifier(self, num_classes):
            self.num_classes = num_classes
            self.fc.weight = nn.Parameter(torch.randn(num_classes, 32))
            self.fc.bias = nn.Parameter(torch.zeros(num_classes))

    model = wrap(InPlace(), exits=2, image_size=32)
    hooks = count_hooks(model)
    model.reset_classifier(3)
    assert count_hooks(model) == hooks


@pytest.mark.parametrize("num_classes", [0, -1])
def test_reset_classifier_refuses_to_leave_none(make_backbone, num_classes):
    model = wrap(make_backbone("resnet18"), image_size=SIZE)
    with pytest.raises(ValueError, match=f"num_classes must be at least 1, got {num_classes}"):
        model.reset_classifier(num_classes)
    assert model.num_classes == 5


# timm's optimizer helpers.


def param_groups(model):
    """Learning-rate scale and weight decay of every parameter, by name."""
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=0.75)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layer_decay_scales_the_backbone_as_timm_does_and_the_heads_not(make_backbone, name):
    bare = param_groups(make_backbone(name))
    model = wrap(make_backbone(name), image_size=SIZE)
    groups = param_groups(model)
    assert {n.removeprefix("backbone."): g for n, g in groups.items() if n.startswith("backbone.")} == bare
    assert len({scale for scale, _ in bare.values()}) > 2
    assert {scale for n, (scale, _) in groups.items() if n.startswith("heads.")} == {1.0}
    assert set(groups) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_no_weight_decay_names_parameters_of_the_model(make_backbone, name):
    model = wrap(make_backbone(name))
    names = {n for n, _ in model.named_parameters()}
    exempt = {n.removeprefix("backbone.") for n in model.no_weight_decay() & names}
    assert exempt == set(model.backbone.no_weight_decay()) & {n for n, _ in model.backbone.named_parameters()}
    assert "pos_embed" in exempt


def test_no_weight_decay_is_empty_where_timm_exempts_nothing(make_backbone):
    assert wrap(make_backbone("resnet18"), image_size=SIZE).no_weight_decay() == set()


def test_exits_found_and_exits_added_are_the_same(make_backbone, family):
    backbone = make_backbone(family)
    assert find_exit_points(backbone, 2, SIZE).points == wrap(backbone, exits=2, image_size=SIZE).points


def test_a_classifier_replaced_on_the_backbone_is_an_error(make_backbone, images):
    model = wrap(make_backbone("resnet18"), image_size=64)
    model.backbone.reset_classifier(3)
    with pytest.raises(RuntimeError, match=r"replace it by model\.reset_classifier"):
        model(images, return_exits=True)


def test_a_named_backbone_of_one_size_is_built_for_the_image_size(tmp_path):
    model = wrap("vit_tiny_patch16_224", num_classes=5, image_size=64, model_kwargs={"depth": 4}).eval()
    images = torch.randn(2, 3, 64, 64)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    for ours, theirs in zip(
        model(images, return_exits=True).logits, loaded(images, return_exits=True).logits, strict=True
    ):
        assert torch.equal(ours, theirs)
    # What is given outranks it, and what takes any size needs none.
    assert wrap("vit_tiny_patch16_224", image_size=96, model_kwargs={"depth": 4, "img_size": 96}).num_exits == 3
    assert wrap("test_resnet", image_size=96).num_exits == 3
    # Neither an unknown tag nor a network of absurd depth is tried before it is refused.
    with pytest.raises(ValueError, match=r"timm cannot create 'vit_tiny_patch16_224\.nonsense'"):
        wrap("vit_tiny_patch16_224.nonsense", image_size=64)
    with pytest.raises(ValueError, match="has more than"):
        wrap("vit_tiny_patch16_224", image_size=64, model_kwargs={"depth": 10**5})
