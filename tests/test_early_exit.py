"""Early exit against choosing afterwards, written out; the families of timm are in test_timm_families."""

import copy
import math

import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill.early_exit import Rule, replay
from timm_selfdistill.early_exit.rules import _RULES

K = 3


@pytest.fixture
def model(make_backbone):
    return sd.wrap(make_backbone("resnet18")).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 64, 64, generator=generator) * torch.linspace(0.1, 3, 8).view(-1, 1, 1, 1)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def chosen_afterwards(every, confidences, thresholds, last):
    """For each image, the logits of the first exit whose confidence reaches its threshold."""
    logits, index = [], []
    for image in range(len(last)):
        exits = [k for k in range(K) if confidences[k][image] >= thresholds[k]]
        index.append(exits[0] if exits else K)
        logits.append(every[exits[0]][image] if exits else last[image])
    return torch.stack(logits), index


def medians(confidences):
    """Thresholds between two images, that let half of them leave at each exit."""
    return [float(c.sort().values[len(c) // 2 - 1 : len(c) // 2 + 1].mean()) for c in confidences]


CONFIDENCE = {
    "max-softmax": lambda p: p.max(-1).values,
    "margin": lambda p: p.sort(-1).values[:, -1] - p.sort(-1).values[:, -2],
    "entropy": lambda p: 1 + (p * p.log()).sum(-1) / math.log(p.shape[-1]),
}


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("rule", CONFIDENCE)
def test_answers_are_those_chosen_afterwards(model, batch, rule, temperatures):
    every = model(batch, return_exits=True).logits
    confidences = [CONFIDENCE[rule]((z / t).softmax(-1)) for z, t in zip(every, temperatures or [1] * K, strict=False)]
    thresholds = medians(confidences)
    out = sd.EarlyExit(model, thresholds, rule=rule, temperatures=temperatures)(batch)
    logits, index = chosen_afterwards(every, confidences, thresholds, every[-1])
    assert out.exit_index.tolist() == index
    assert len(set(index)) > 1
    torch.testing.assert_close(out.logits, logits)


@pytest.mark.parametrize("fallback", ["last", "ensemble"])
def test_in_a_running_ensemble_exits_answer_with_those_before_them(model, batch, fallback):
    weights = [0.0, 0.2, 0.1, 0.5]
    model.ensemble = sd.Ensemble(tuple(weights), images=9)
    own = model(batch, return_exits=True).logits
    # Exit 0 has no weight, and so answers for itself; the pools weigh 0.8 each, as all four do.
    every = [0.8 * own[0], 0.8 * own[1], 0.8 * (0.2 * own[1] + 0.1 * own[2]) / 0.3]
    last = 0.2 * own[1] + 0.1 * own[2] + 0.5 * own[3] if fallback == "ensemble" else own[3]
    temperatures = [0.5, 1.0, 2.0]
    confidences = [(z / t).softmax(-1).amax(-1) for z, t in zip(every, temperatures, strict=True)]
    found = set()
    for thresholds in (medians(confidences), [math.inf, math.inf, medians(confidences)[2]]):
        fast = sd.EarlyExit(model, thresholds, temperatures=temperatures, fallback=fallback, running_ensemble=True)
        out = fast(batch)
        logits, index = chosen_afterwards(every, confidences, thresholds, last)
        assert out.exit_index.tolist() == index
        torch.testing.assert_close(out.logits, logits)
        found |= set(index)
        again = replay(fast.config, torch.stack(own), model.ensemble)
        assert again.exit_index.tolist() == index
        torch.testing.assert_close(again.logits, logits)
    assert len(found) > 2


def test_heads_run_where_a_running_ensemble_needs_them():
    config = sd.EarlyExitConfig((math.inf, 0.5, math.inf), running_ensemble=True)
    assert [config.runs_head(exit) for exit in range(3)] == [True, True, False]
    assert not any(sd.EarlyExitConfig((math.inf,) * 3, running_ensemble=True).runs_head(exit) for exit in range(3))


def test_settings_that_were_saved_before_there_was_a_running_ensemble_load():
    config = sd.EarlyExitConfig((0.5, math.inf), "margin", (1.0, 2.0), "ensemble")
    saved = config.to_json()
    assert saved.pop("running_ensemble") is False
    assert sd.EarlyExitConfig.from_json(saved) == config
    running = sd.EarlyExitConfig((0.5, math.inf), running_ensemble=True)
    assert sd.EarlyExitConfig.from_json(running.to_json()) == running


def test_patience_counts_exits_that_agree(model, batch):
    for head, logits in zip(model.heads, model(batch, return_exits=True).logits, strict=False):
        head.classifier.bias -= logits.mean(0)  # else an untrained head gives all images one class
    every = model(batch, return_exits=True).logits
    classes = torch.stack(every).argmax(-1)
    counts = [torch.zeros(len(batch))]
    for k in range(1, K):
        counts.append(torch.where(classes[k] == classes[k - 1], counts[-1] + 1, 0))
    out = sd.EarlyExit(model, 1, rule="patience")(batch)
    logits, index = chosen_afterwards(every, counts, [1] * K, every[-1])
    assert out.exit_index.tolist() == index
    assert len(set(index)) > 1
    torch.testing.assert_close(out.logits, logits)


@pytest.mark.parametrize("rule", ["max-softmax", "patience"])
def test_the_ensemble_answers_when_nobody_is_sure(model, batch, rule):
    every = model(batch, return_exits=True).logits
    confidence = every[0].softmax(-1).amax(-1)
    thresholds = [*medians([confidence]), math.inf, math.inf] if rule == "max-softmax" else math.inf
    out = sd.EarlyExit(model, thresholds, rule=rule, fallback="ensemble")(batch)
    late = out.exit_index == K
    assert 0 < late.sum() <= len(batch)
    torch.testing.assert_close(out.logits[late], torch.stack(every).mean(0)[late])


def record_sizes(model):
    """Return a list that takes the batch size of each stage that runs from now on."""
    sizes = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        module = model.backbone.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_images_that_left_are_not_run(model, batch):
    sizes = record_sizes(model)
    confidences = [z.softmax(-1).amax(-1) for z in model(batch, return_exits=True).logits[:K]]
    fast = sd.EarlyExit(model, medians(confidences))
    sizes.clear()
    index = fast(batch).exit_index
    assert sizes == [int((index >= k).sum()) for k in range(K + 1) if (index >= k).any()]
    assert sizes[0] == 8 > sizes[1]
    sizes.clear()
    assert sd.EarlyExit(model, 0.0)(batch).exit_index.tolist() == [0] * 8
    assert sizes[-1] == 8
    assert sizes.count(8) + sizes.count(4) + sizes.count(2) == len(sizes)


@pytest.mark.parametrize(("rule", "fallback"), [("max-softmax", "last"), ("patience", "ensemble")])
@pytest.mark.parametrize("buckets", [[2, 3, 6, 16], [5, 1], [4]])
def test_buckets_bound_the_sizes_and_change_no_answer(model, batch, buckets, rule, fallback):
    every = model(batch, return_exits=True).logits
    for head, logits in zip(model.heads, every, strict=False):
        head.classifier.bias -= logits.mean(0)
    every = model(batch, return_exits=True).logits
    thresholds = medians([z.softmax(-1).amax(-1) for z in every[:K]]) if rule == "max-softmax" else 1
    expected = sd.EarlyExit(model, thresholds, rule=rule, fallback=fallback)(batch)
    assert len(expected.exit_index.unique()) > 1
    fast = sd.EarlyExit(model, thresholds, rule=rule, fallback=fallback, buckets=buckets)
    assert fast.buckets == tuple(sorted(buckets))
    sizes = record_sizes(model)
    for part in (batch, batch[:5], batch[:1]):
        out = fast(part)
        assert out.exit_index.tolist() == expected.exit_index[: len(part)].tolist()
        torch.testing.assert_close(out.logits, expected.logits[: len(part)])
    assert set(sizes) <= set(buckets)
    assert len(set(sizes)) > 1 or len(buckets) == 1


def test_without_an_exit_buckets_hold_too(model, batch):
    sizes = record_sizes(model)
    out = sd.EarlyExit(model, math.inf, buckets=[6])(batch)
    assert set(sizes[-8:]) == {6}
    torch.testing.assert_close(out.logits, model(batch))
    assert out.exit_index.tolist() == [K] * 8


@pytest.mark.parametrize("settings", [{}, {"running_ensemble": True}, {"rule": "patience", "fallback": "ensemble"}])
@pytest.mark.parametrize("buckets", [None, [3, 8]])
def test_an_image_goes_no_deeper_than_it_may(model, batch, settings, buckets):
    thresholds = (
        math.inf if "rule" in settings else [*medians([model.forward_exit(batch, 0).softmax(-1).amax(-1)]), 1, 1]
    )
    fast = sd.EarlyExit(model, thresholds, buckets=buckets, **settings)
    free = fast(batch)
    assert "rule" in settings or 0 < (free.exit_index == 0).sum() < 8
    own = torch.stack(model(batch, return_exits=True).logits)
    running = torch.stack([own[: k + 1].mean(0) for k in range(K + 1)])
    every = running if settings.get("running_ensemble") else own
    limits = torch.tensor([3, 0, 1, 2, 3, 1, 2, 0])
    out = fast(batch, max_exit=limits)
    assert torch.equal(out.exit_index, free.exit_index.minimum(limits))
    for image, exit in enumerate(out.exit_index):
        answer = free.logits[image] if exit == K else every[exit, image]
        torch.testing.assert_close(out.logits[image], answer)
    for exit in range(K + 1):
        assert torch.equal(fast(batch, max_exit=exit).exit_index, free.exit_index.clamp(max=exit))


def test_nothing_runs_after_the_deepest_exit_allowed(model, batch):
    sizes = record_sizes(model)
    fast = sd.EarlyExit(model, math.inf)
    sizes.clear()
    limits = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert torch.equal(fast(batch, max_exit=limits).exit_index, limits)
    assert sizes == [8, 5]


@pytest.mark.parametrize(
    ("max_exit", "message"),
    [
        (4, "max_exit is 4 to 4; allowed are 0 to 3"),
        (torch.tensor([0, 1, 2, 3, -1, 0, 0, 0]), "max_exit is -1 to 3; allowed are 0 to 3"),
        (torch.tensor([0, 1]), r"max_exit has the shape \[2\]; allowed are one number, or \[8\] of them"),
        (1.0, "max_exit is 1.0; allowed are whole numbers"),
        (True, "max_exit is True; allowed are whole numbers"),
    ],
)
def test_wrong_limits(model, batch, max_exit, message):
    with pytest.raises(ValueError, match=message):
        sd.EarlyExit(model, 0.5)(batch, max_exit=max_exit)


def test_nothing_behind_the_exit_runs_when_all_are_sure(model, batch):
    fast = sd.EarlyExit(model, [math.inf, 0, math.inf])
    ran = []
    for name in ("layer2", "layer3", "fc"):
        model.backbone.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    heads = []
    for index, head in enumerate(model.heads):
        head.body.register_forward_hook(lambda *_, index=index: heads.append(index))
    assert fast(batch).exit_index.tolist() == [1] * 8
    assert ran == ["layer2"]
    assert heads == [1]


def test_without_a_sure_exit_it_is_the_plain_backbone(model, batch):
    out = sd.EarlyExit(model, math.inf)(batch)
    assert torch.equal(out.logits, model(batch))
    assert out.exit_index.tolist() == [K] * 8


def test_a_backbone_that_needs_its_whole_batch_gives_the_same_answers(make_backbone):
    model = sd.wrap(make_backbone("twins_svt_small", img_size=64, depths=(1, 1, 1, 1))).eval()
    batch = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with pytest.warns(UserWarning, match="Twins cannot run on with a part of its batch after blocks.0, blocks.1"):
        fast = sd.EarlyExit(model, math.inf)
    assert fast.shrinks == (False,) * K
    every = model(batch, return_exits=True).logits
    confidences = [z.softmax(-1).amax(-1) for z in every[:K]]
    for fallback, last in (("last", every[-1]), ("ensemble", torch.stack(every).mean(0))):
        with pytest.warns(UserWarning, match="part of its batch"):
            out = sd.EarlyExit(model, medians(confidences), fallback=fallback)(batch)
        logits, index = chosen_afterwards(every, confidences, medians(confidences), last)
        assert out.exit_index.tolist() == index
        assert len(set(index)) > 1
        torch.testing.assert_close(out.logits, logits)


@pytest.mark.parametrize("rule", ["max-softmax", "margin", "entropy", "patience", "logit-margin"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_sure(model, batch, rule, bad, monkeypatch):
    class LogitMargin(Rule):
        highest = math.inf

        def confidence(self, logits, state):
            first, second = logits.topk(2).values.unbind(-1)
            return first - second, ()

    monkeypatch.setattr(_RULES, "_entries", {**_RULES._entries, "logit-margin": LogitMargin})
    for head in model.heads:
        head.classifier.bias.fill_(bad)
    out = sd.EarlyExit(model, 0, rule=rule)(batch)
    assert out.exit_index.tolist() == [K] * 8
    assert torch.equal(out.logits, model(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, batch, dtype):
    fast = sd.EarlyExit(model.to(dtype), 0.3)
    assert fast.shrinks == (True,) * K
    out = fast(batch.to(dtype))
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()


def test_autocast(model, batch):
    fast = sd.EarlyExit(model, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fast(batch)
    assert out.logits.shape == (8, 5)


def test_an_empty_batch(model, batch):
    out = sd.EarlyExit(model, 0.5)(batch[:0])
    assert out.logits.shape == (0, 5)
    assert out.exit_index.shape == (0,)
    assert out.exit_index.dtype == torch.int64


def test_a_batch_of_one(model, batch):
    fast = sd.EarlyExit(model, 0.3)
    whole = fast(batch)
    for i in range(8):
        out = fast(batch[i : i + 1])
        assert out.exit_index.item() == whole.exit_index[i]
        torch.testing.assert_close(out.logits[0], whole.logits[i])


def test_train_mode_is_refused(model, batch):
    model.train()
    fast = sd.EarlyExit(model, 0.5)
    assert model.training
    assert model.backbone.bn1.training
    with pytest.raises(RuntimeError, match="call eval"):
        fast(batch)
    fast.eval()
    assert len(fast(batch).logits) == 8


def test_making_it_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    sd.EarlyExit(model.train(), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_is_its_own(model, batch):
    fast = sd.EarlyExit(model, 0.3)
    clone = copy.deepcopy(fast)
    for parameter in model.parameters():
        parameter.zero_()
    assert clone(batch).logits.any()
    assert not fast(batch).logits.any()


def test_a_failing_forward_leaves_no_trace(model, batch):
    fast = sd.EarlyExit(model, 0.3)
    expected = fast(batch)
    with pytest.raises(RuntimeError):
        fast(batch[:, :2])
    assert torch.equal(fast(batch).logits, expected.logits)
    assert len(model(batch, return_exits=True).logits) == K + 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot compile early exit")
def test_compiled(tiny_net):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), image_size=32, head="linear").eval()
    batch = torch.randn(8, 3, 32, 32)
    K = model.num_exits
    fast = sd.EarlyExit(model, medians([z.softmax(-1).amax(-1) for z in model(batch, return_exits=True).logits[:K]]))
    expected = fast(batch)
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="eager")
    for part in (batch, batch[:5], batch[:1]):
        out = compiled(part)
        assert torch.equal(out.exit_index, expected.exit_index[: len(part)])
        torch.testing.assert_close(out.logits, expected.logits[: len(part)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, r"2 thresholds for 3 exits \(layer1, layer2, layer3\): give one for each"),
        ({"thresholds": [0.5, 0.5, math.nan]}, "thresholds are .*nan.*; allowed are numbers, infinity for never"),
        ({"thresholds": [0.5, 0.5, "0.5"]}, "allowed are numbers"),
        (
            {"thresholds": [0.5, 0.5, 1.5]},
            "with the rule max-softmax allowed are numbers from 0",
        ),
        ({"thresholds": [0.5, 0.5, -1]}, "with the rule max-softmax allowed are numbers from 0"),
        ({"thresholds": 90, "rule": "margin"}, "with the rule margin allowed are numbers from 0"),
        ({"thresholds": [1, 1, -1], "rule": "patience"}, "with the rule patience allowed are numbers 0 or more"),
        ({"rule": "softmax"}, "Unknown rule 'softmax'; known are .*entropy, .*margin, max-softmax, patience"),
        ({"rule": ["margin"]}, r"rule is \['margin'\]; allowed are .*entropy"),
        ({"fallback": "mean"}, "fallback is 'mean'; allowed are last, ensemble"),
        ({"buckets": []}, r"buckets are \[\]; allowed are whole numbers, 1 or more, at least one"),
        ({"buckets": [0, 4]}, r"buckets are \[0, 4\]; allowed are whole numbers, 1 or more"),
        ({"buckets": [True]}, r"buckets are \[True\]; allowed are whole numbers"),
        ({"temperatures": [1.0]}, "3 thresholds, but 1 temperatures"),
        ({"temperatures": [1.0, 0.0, 1.0]}, "allowed are finite numbers above 0"),
        ({"temperatures": [1.0, math.inf, 1.0]}, "allowed are finite numbers above 0"),
    ],
)
def test_wrong_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        sd.EarlyExit(model, **{"thresholds": 0.5, **settings})


def test_a_single_class_is_no_choice(make_backbone):
    with pytest.raises(ValueError, match="has 1 class"):
        sd.EarlyExit(sd.wrap(make_backbone("resnet18", num_classes=1)), 0.5)
