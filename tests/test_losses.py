import copy
import math

import pytest
import torch
from torch import Tensor, nn

from timm_selfdistill.losses import (
    CSKD,
    DLB,
    PRESETS,
    PSKD,
    Needs,
    SelfDistillationConfig,
    SelfDistillationLoss,
    TrainingTime,
    divergences,
    get_loss,
    list_divergences,
    list_losses,
    list_presets,
    list_teachers,
    needs_of,
    protocol,
    register_divergence,
    register_loss,
    register_teacher,
    teachers,
)
from timm_selfdistill.losses.protocol import cross_entropy
from timm_selfdistill.model import Ensemble, ExitOutput, wrap
from timm_selfdistill.task import SelfDistillationTask

BATCH, CLASSES, WIDTH = 6, 5, 7


def make_output(exits=3, dtype=torch.float64, scale=2.0, seed=0, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)

    def entries(width):
        tensors = [
            scale * torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(exits + 1)
        ]
        return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)

    return ExitOutput(entries(CLASSES), entries(WIDTH))


def make_target(batch=BATCH, seed=1):
    return torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


def make_soft_target(seed=2):
    return torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


# The reference: the formulas of the papers, sample by sample, in float64.


def log_softmax(x: Tensor) -> Tensor:
    return x - x.exp().sum().log()


def reference_ce(logits, target, smoothing=0.0):
    total = 0.0
    for row, label in zip(logits, target, strict=True):
        wanted = label if label.ndim else torch.eye(CLASSES, dtype=torch.float64)[label]
        wanted = (1 - smoothing) * wanted + smoothing / CLASSES
        total = total - (wanted * log_softmax(row)).sum()
    return total / len(logits)


def reference_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher.detach(), strict=True):
        log_s, log_t = log_softmax(s / temperature), log_softmax(t / temperature)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total / len(student)


def reference_mse(student, teacher):
    return ((student - teacher.detach()) ** 2).sum() / student.numel()


def reference_hint(feature, teacher, squared):
    total = 0.0
    for f, t in zip(feature, teacher.detach(), strict=True):
        distance = ((f - t) ** 2).sum()
        total = total + (distance if squared else distance.sqrt())
    return total / len(feature)


def reference_terms(preset, out, target):
    """What each preset's paper adds up, as published numbers, not as the package's."""
    exits = range(len(out.logits) - 1)
    ce = {f"ce/{i}": reference_ce(logits, target) for i, logits in enumerate(out.logits)}
    kl = {f"kd/{i}": reference_kl(out.logits[i], out.logits[-1], 3.0) for i in exits}
    hint = {
        f"hint/{i}": reference_hint(out.features[i], out.features[-1], squared=preset == "byot-iccv2019") for i in exits
    }
    if preset == "byot-iccv2019":
        kl = {name: 9.0 * value for name, value in kl.items()}
        weights = {"ce": 0.9, "kd": 0.1, "hint": 1.28e-4}
    elif preset == "byot-tpami2021":
        weights = {"ce": 0.7, "kd": 0.3, "hint": 0.03 * math.sqrt(128)}
    elif preset == "deep-supervision":
        kl, hint, weights = {}, {}, {"ce": 1.0}
    elif preset == "ensemble-distillation":
        mean = sum(out.logits) / len(out.logits)
        kl = {f"kd/{i}": 9.0 * reference_kl(logits, mean, 3.0) for i, logits in enumerate(out.logits)}
        hint, weights = {}, {"ce": 1.0, "kd": 0.3}
    else:
        last = ce[f"ce/{len(exits)}"]
        return {"loss": last, "ce/0": last}
    terms = {**ce, **kl, **hint}
    deepest = f"ce/{len(exits)}"
    loss = sum(value * (1.0 if name == deepest else weights[name.split("/")[0]]) for name, value in terms.items())
    return {"loss": loss, **terms}


def gradients(loss, out):
    tensors = [*out.logits, *out.features]
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_gives_the_published_terms_and_gradients(preset, exits, soft):
    out, target = make_output(exits), make_soft_target() if soft else make_target()
    terms = SelfDistillationLoss.from_preset(preset)(out, target)
    expected = reference_terms(preset, out, target)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            terms[name], value, msg=lambda text, name=name: f"{name}: {text}", check_device=False
        )
    for ours, theirs in zip(gradients(terms["loss"], out), gradients(expected["loss"], out), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"none"}))
def test_the_loss_is_the_weighted_sum_of_its_terms_to_the_bit(preset):
    loss = SelfDistillationLoss(preset)
    config, terms = loss.config, loss(make_output(dtype=torch.float32), make_target())
    rows = [[terms.get(f"{kind}/{index}", torch.zeros(())) for index in range(4)] for kind in ("ce", "kd", "hint")]
    ce, kd, hint = (torch.stack(row) for row in rows)
    expected = config.ce_weight * ce[:3].sum() + config.deepest_ce_weight * ce[3]
    expected = expected + config.kd_weight * kd[:3].sum() + config.hint_weight * hint[:3].sum()
    assert torch.equal(terms["loss"].detach(), expected + config.deepest_kd_weight * kd[3])


def test_three_exits_give_the_ten_terms_of_the_paper():
    terms = SelfDistillationLoss("byot-iccv2019")(make_output(3), make_target())
    names = [f"ce/{i}" for i in range(4)] + [f"kd/{i}" for i in range(3)] + [f"hint/{i}" for i in range(3)]
    assert list(terms) == ["loss", *names]
    assert all(value.ndim == 0 for value in terms.values())


def test_only_the_loss_carries_a_gradient():
    terms = SelfDistillationLoss("byot-iccv2019")(make_output(), make_target())
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]


def test_default_is_the_conference_preset():
    assert SelfDistillationLoss().config == SelfDistillationLoss.from_preset("ensemble-distillation").config
    assert (
        list_presets()
        == sorted(PRESETS)
        == [
            "byot-iccv2019",
            "byot-tpami2021",
            "deep-supervision",
            "ensemble-distillation",
            "none",
        ]
    )


def test_a_preset_may_be_given_by_its_name():
    loss = SelfDistillationLoss("byot-tpami2021")
    assert loss.config == SelfDistillationLoss.from_preset("byot-tpami2021").config
    with pytest.raises(ValueError, match=r"Unknown preset 'byot'; known are byot-iccv2019, .*, none\."):
        SelfDistillationLoss("byot")


def test_logits_in_place_of_the_outputs_of_all_exits_are_refused():
    with pytest.raises(ValueError, match=r"one tensor \[4, 7\]; .* return_exits=True"):
        SelfDistillationLoss("byot-iccv2019")(torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64))


def test_iccv_hint_weight_is_the_published_weight_on_sums_at_batch_128():
    out = make_output(batch=128)
    loss = SelfDistillationLoss.from_preset("byot-iccv2019", ce_weight=0, deepest_ce_weight=0, kd_weight=0)
    terms = loss(out, make_target(128))
    published = sum(1e-6 * ((feature - out.features[-1]) ** 2).sum() for feature in out.features[:-1])
    torch.testing.assert_close(terms["loss"], published)


def test_tpami_hint_weight_is_the_published_weight_on_the_batch_norm_for_equally_far_samples():
    directions = nn.functional.normalize(make_output(batch=128).features[0].detach(), dim=-1)
    teacher = make_output(batch=128, seed=5).features[-1].detach()
    feature = (teacher + 3.0 * directions).requires_grad_()
    logits = make_output(1, batch=128).logits
    loss = SelfDistillationLoss.from_preset("byot-tpami2021", ce_weight=0, deepest_ce_weight=0, kd_weight=0)
    ours = loss(ExitOutput(logits, (feature, teacher)), make_target(128))["loss"]
    published = 0.03 * torch.dist(feature, teacher)
    torch.testing.assert_close(ours, published)
    torch.testing.assert_close(torch.autograd.grad(ours, feature), torch.autograd.grad(published, feature))


@pytest.mark.parametrize("teacher", ["deepest", "ensemble", "next-deeper"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("t_squared", [False, True])
def test_divergence_and_teacher_by_name(teacher, divergence, t_squared):
    out, target = make_output(), make_target()
    loss = SelfDistillationLoss(
        SelfDistillationConfig(teacher=teacher, divergence=divergence, t_squared=t_squared, temperature=2.0)
    )
    terms = loss(out, target)
    chosen = {
        "deepest": [out.logits[3]] * 3,
        "ensemble": [(out.logits[0] + out.logits[1] + out.logits[2] + out.logits[3]) / 4] * 3,
        "next-deeper": [out.logits[1], out.logits[2], out.logits[3]],
    }[teacher]
    for i in range(3):
        if divergence == "kl":
            expected = reference_kl(out.logits[i], chosen[i], 2.0) * (4.0 if t_squared else 1.0)
        else:
            expected = reference_mse(out.logits[i], chosen[i])
        torch.testing.assert_close(terms[f"kd/{i}"], expected.detach())


@pytest.mark.parametrize("kd_weight", [0.0, 0.4])
@pytest.mark.parametrize("teacher", ["ensemble", "ema", "ema-same-exit"])
def test_the_backbone_is_taught_too(teacher, kd_weight):
    out, target, average = make_output(), make_target(), make_output(seed=9)
    loss = SelfDistillationLoss.from_preset(
        "deep-supervision", teacher=teacher, kd_weight=kd_weight, deepest_kd_weight=0.7, temperature=2.0
    )
    terms = loss(out, target, ema=average if teacher.startswith("ema") else None)
    taught = sum(out.logits) / 4 if teacher == "ensemble" else average.logits[3]
    of_backbone = 4 * reference_kl(out.logits[3], taught, 2.0)
    torch.testing.assert_close(terms["kd/3"], of_backbone.detach())
    assert ("kd/0" in terms) == bool(kd_weight)
    expected = sum(terms[f"ce/{k}"] for k in range(4)) + 0.7 * of_backbone
    if kd_weight:
        expected = expected + 0.4 * sum(terms[f"kd/{k}"] for k in range(3))
    torch.testing.assert_close(terms["loss"].detach(), expected.detach())
    terms["loss"].backward()
    entropy = nn.functional.cross_entropy(out.logits[3], target)
    torch.testing.assert_close(out.logits[3].grad, torch.autograd.grad(entropy + 0.7 * of_backbone, out.logits[3])[0])


@pytest.mark.parametrize("teacher", ["deepest", "next-deeper", "all-deeper"])
def test_a_teacher_that_knows_no_more_than_the_backbone_cannot_teach_it(teacher):
    with pytest.raises(
        ValueError, match=rf"deepest_kd_weight is 0\.5, but the teacher '{teacher}' has nothing to teach"
    ):
        SelfDistillationLoss.from_preset("byot-iccv2019", teacher=teacher, deepest_kd_weight=0.5)


def test_the_teacher_ensemble_takes_the_weights_that_the_model_has_when_training_begins():
    out, target = make_output(), make_target()
    loss = SelfDistillationLoss.from_preset("byot-iccv2019", teacher="ensemble", temperature=2.0, t_squared=False)
    fitted = Ensemble((0.1, 0.0, 0.3, 0.5), images=9)
    taught = 0.1 * out.logits[0] + 0.3 * out.logits[2] + 0.5 * out.logits[3]
    terms = loss(out, target, ensemble=fitted)
    for i in range(3):
        torch.testing.assert_close(terms[f"kd/{i}"], reference_kl(out.logits[i], taught, 2.0).detach())
    mean = loss(out, target, ensemble=Ensemble.mean(4))
    assert torch.equal(loss(out, target)["loss"], mean["loss"])
    assert not torch.equal(mean["loss"], terms["loss"])

    model = wrap("test_resnet", num_classes=5, image_size=32).eval()
    model.ensemble = Ensemble((0.5, *(0.25,) * model.num_exits), images=9)
    task, images = SelfDistillationTask(model, loss).eval(), torch.randn(2, 3, 32, 32)
    labels = torch.tensor([0, 1])
    expected = loss(model(images, return_exits=True), labels, ensemble=model.ensemble)["loss"]
    model.ensemble = Ensemble.mean(model.num_exits + 1)
    torch.testing.assert_close(task(images, labels)["loss"], expected)
    assert not SelfDistillationLoss("byot-iccv2019").needs.ensemble


@pytest.mark.parametrize("teacher", ["deepest", "ensemble", "next-deeper"])
def test_teachers_get_no_gradient(teacher):
    out = make_output()
    loss = SelfDistillationLoss.from_preset("byot-iccv2019", ce_weight=0, deepest_ce_weight=0, teacher=teacher)
    loss(out, make_target())["loss"].backward()
    assert out.features[-1].grad is None
    assert not out.logits[-1].grad.any()
    assert all(entry.grad.abs().sum() > 0 for entry in (*out.logits[:-1], *out.features[:-1]))
    if teacher == "next-deeper":  # an exit that also teaches learns only from its own teacher
        expected = reference_kl(out.logits[1], out.logits[2], 3.0) * 9 * 0.1
        torch.testing.assert_close(out.logits[1].grad, torch.autograd.grad(expected, out.logits[1])[0])


@pytest.mark.parametrize("preset", ["byot-iccv2019", "byot-tpami2021"])
def test_order_of_the_batch_does_not_matter(preset):
    out, target, loss = make_output(), make_target(), SelfDistillationLoss.from_preset(preset)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = ExitOutput(tuple(x[order] for x in out.logits), tuple(x[order] for x in out.features))
    torch.testing.assert_close(loss(permuted, target[order]), loss(out, target))


@pytest.mark.parametrize("preset", ["byot-iccv2019", "byot-tpami2021"])
def test_loss_does_not_depend_on_the_batch_size(preset):
    out, target, loss = make_output(), make_target(), SelfDistillationLoss.from_preset(preset)
    twice = ExitOutput(tuple(torch.cat([x, x]) for x in out.logits), tuple(torch.cat([x, x]) for x in out.features))
    torch.testing.assert_close(loss(twice, torch.cat([target, target])), loss(out, target))


@pytest.mark.parametrize(
    ("weight", "gone"),
    [
        ("ce_weight", {"ce/0", "ce/1", "ce/2"}),
        ("deepest_ce_weight", {"ce/3"}),
        ("kd_weight", {"kd/0", "kd/1", "kd/2"}),
        ("hint_weight", {"hint/0", "hint/1", "hint/2"}),
    ],
)
def test_zero_weight_removes_its_terms_and_nothing_else(weight, gone):
    out, target = make_output(), make_target()
    full = SelfDistillationLoss("byot-iccv2019")(out, target)
    terms = SelfDistillationLoss.from_preset("byot-iccv2019", **{weight: 0.0})(out, target)
    assert set(full) - set(terms) == gone
    contribution = getattr(PRESETS["byot-iccv2019"], weight) * sum(full[name] for name in gone)
    torch.testing.assert_close(terms["loss"], full["loss"] - contribution)
    for name in set(terms) - {"loss"}:
        torch.testing.assert_close(terms[name], full[name])


def test_zero_weight_does_not_run_its_computation(monkeypatch):
    monkeypatch.setitem(divergences.HINT_DISTANCES, "l2", lambda difference: pytest.fail("computed"))
    loss = SelfDistillationLoss.from_preset("deep-supervision", hint_distance="l2")
    monkeypatch.setattr(loss, "_distill", lambda logits, target: pytest.fail("computed"))
    loss(ExitOutput(make_output().logits, ()), make_target())


def test_none_needs_only_the_backbones_logits():
    loss, out, target = SelfDistillationLoss.from_preset("none"), make_output(), make_target()
    assert not loss.needs_exits
    expected = loss(out, target)
    assert list(expected) == ["loss", "ce/0"]
    for features in ((), out.features[-1:]):
        torch.testing.assert_close(loss(ExitOutput(out.logits[-1:], features), target), expected)
    for preset in ("byot-iccv2019", "byot-tpami2021", "deep-supervision"):
        assert SelfDistillationLoss.from_preset(preset).needs_exits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_target_equals_class_indices(smoothing):
    out, target = make_output(), make_target()
    loss = SelfDistillationLoss.from_preset("byot-iccv2019", label_smoothing=smoothing)
    one_hot = nn.functional.one_hot(target, CLASSES).to(torch.bfloat16)
    torch.testing.assert_close(loss(out, one_hot), loss(out, target))


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_is_torchs(soft):
    out, target = make_output(), make_soft_target() if soft else make_target()
    terms = SelfDistillationLoss.from_preset("byot-iccv2019", label_smoothing=0.2)(out, target)
    plain = SelfDistillationLoss("byot-iccv2019")(out, target)
    for i, logits in enumerate(out.logits):
        theirs = nn.functional.cross_entropy(logits, target, label_smoothing=0.2)
        torch.testing.assert_close(terms[f"ce/{i}"], theirs.detach())
        torch.testing.assert_close(terms[f"ce/{i}"], reference_ce(logits, target, 0.2).detach())
    torch.testing.assert_close(terms["kd/0"], plain["kd/0"])


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_weigh_the_cross_entropy_of_every_exit_and_the_backbone(soft):
    out, target = make_output(), make_soft_target() if soft else make_target()
    weights = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5], dtype=torch.float64)
    settings = {"class_weights": tuple(weights.tolist()), "label_smoothing": 0.1}
    terms = SelfDistillationLoss.from_preset("byot-iccv2019", **settings)(out, target)
    plain = SelfDistillationLoss.from_preset("byot-iccv2019", label_smoothing=0.1)(out, target)
    expected = plain["loss"]
    for index, logits in enumerate(out.logits):
        total = 0.0
        for row, label in zip(logits, target, strict=True):
            wanted = label if soft else torch.eye(CLASSES, dtype=torch.float64)[label]
            total = total - (weights * (0.9 * wanted + 0.1 / CLASSES) * log_softmax(row)).sum()
        ce = total / BATCH
        torch.testing.assert_close(terms[f"ce/{index}"], ce.detach())
        expected = expected + (0.9 if index < 3 else 1.0) * (ce - plain[f"ce/{index}"])
    torch.testing.assert_close(terms["loss"], expected)
    with pytest.raises(ValueError, match="class_weights has 1 values for 5 classes; allowed is one each"):
        SelfDistillationLoss.from_preset("none", class_weights=(1.0,))(out, target)


def test_equal_exits_have_zero_divergence_and_hint_and_a_finite_gradient():
    out = make_output(0)
    feature = out.features[0]
    same = ExitOutput(
        tuple(out.logits[0].detach().clone().requires_grad_() for _ in range(3)),
        tuple(feature.detach().clone().requires_grad_() for _ in range(3)),
    )
    for distance in ("l2", "squared_l2"):
        terms = SelfDistillationLoss.from_preset("byot-tpami2021", hint_distance=distance)(same, make_target())
        assert terms["kd/0"] == terms["hint/0"] == terms["hint/1"] == 0
        assert all(gradient.isfinite().all() for gradient in gradients(terms["loss"], same))


def extreme_output(dtype):
    huge = 3e38 if dtype != torch.float16 else 65504.0
    rows = torch.tensor(
        [
            [huge, -huge, 0, 1, 2],
            [-huge, huge, huge, 0, -1],
            [-huge, -huge, -huge, -huge, huge],
            [huge, huge, huge, huge, huge],
            [-huge, 0, 0, 0, -huge],
            [1e4, -1e4, 1e4, 0, 3],
        ]
    )
    logits = tuple(rows.roll(shift, 0).roll(-shift, 1).to(dtype).requires_grad_() for shift in range(4))
    features = tuple(entry.detach().clone().requires_grad_() for entry in logits)
    assert all(entry.isfinite().all() for entry in logits)
    return ExitOutput(logits, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("teacher", ["deepest", "ensemble", "next-deeper"])
@pytest.mark.parametrize("temperature", [1e-6, 0.5, 3.0, 1e3])
def test_huge_logits_and_features_give_finite_values_and_gradients(dtype, divergence, teacher, temperature):
    for distance in ("l2", "squared_l2"):
        for target in (make_target(), make_soft_target(), nn.functional.one_hot(make_target(), CLASSES).float()):
            for smoothing in (0.0, 0.1):
                out = extreme_output(dtype)
                loss = SelfDistillationLoss.from_preset(
                    "byot-iccv2019",
                    divergence=divergence,
                    teacher=teacher,
                    temperature=temperature,
                    hint_distance=distance,
                    label_smoothing=smoothing,
                )
                terms = loss(out, target)
                assert all(value.isfinite() for value in terms.values()), terms
                for gradient in gradients(terms["loss"], out):
                    assert not gradient.isnan().any()
                    assert gradient.dtype == dtype
                    assert dtype == torch.float16 or gradient.isfinite().all()


def test_a_diverged_network_is_not_hidden():
    out = make_output()
    logits = (torch.full_like(out.logits[0], math.nan), *out.logits[1:])
    assert SelfDistillationLoss("byot-iccv2019")(ExitOutput(logits, out.features), make_target())["loss"].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_inputs_and_autocast_are_computed_in_float32(dtype):
    out = make_output(dtype=dtype, scale=8.0)
    exact = SelfDistillationLoss("byot-iccv2019")(
        ExitOutput(tuple(x.double() for x in out.logits), tuple(x.double() for x in out.features)), make_target()
    )
    plain = SelfDistillationLoss("byot-iccv2019")(out, make_target())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SelfDistillationLoss("byot-iccv2019")(out, make_target())
    for name, value in exact.items():
        assert plain[name].dtype == inside[name].dtype == torch.float32
        torch.testing.assert_close(plain[name], inside[name], rtol=0, atol=0)
        torch.testing.assert_close(plain[name].double(), value, rtol=1e-5, atol=1e-6)


def test_exits_may_differ_in_precision():
    out = make_output(dtype=torch.bfloat16)
    mixed = ExitOutput((*out.logits[:-1], out.logits[-1].float()), (*out.features[:-1], out.features[-1].float()))
    torch.testing.assert_close(
        SelfDistillationLoss("byot-iccv2019")(mixed, make_target()),
        SelfDistillationLoss("byot-iccv2019")(out, make_target()),
    )


@pytest.mark.parametrize("preset", ["byot-iccv2019", "byot-tpami2021", "none"])
def test_compiles_as_one_graph(preset):
    loss, target = SelfDistillationLoss.from_preset(preset, label_smoothing=0.1), make_target()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out = make_output(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = compiled(out, target), loss(out, target)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(gradients(ours["loss"], out), gradients(eager["loss"], out))


def test_loss_has_no_state_and_can_be_copied():
    loss = SelfDistillationLoss.from_preset("byot-tpami2021")
    assert not loss.state_dict()
    assert not list(loss.parameters())
    out, target = make_output(), make_target()
    torch.testing.assert_close(copy.deepcopy(loss)(out, target), loss(out, target))
    assert "kd_weight=0.3" in repr(loss)


def test_preset_overrides_change_only_what_they_name():
    config = SelfDistillationLoss.from_preset("byot-tpami2021", temperature=4, kd_weight=0.5).config
    assert (config.temperature, config.kd_weight) == (4, 0.5)
    assert (config.ce_weight, config.t_squared, config.hint_distance) == (0.7, False, "l2")
    assert PRESETS["byot-tpami2021"].temperature == 3.0


def test_unknown_preset_and_setting_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'byot'; known are byot-iccv2019, .*ensemble-distillation, none"):
        SelfDistillationLoss.from_preset("byot")
    with pytest.raises(ValueError, match=r"temprature; known are ce_weight, .*temperature"):
        SelfDistillationLoss.from_preset("none", temprature=3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_weight", -0.1),
        ("kd_weight", math.nan),
        ("hint_weight", math.inf),
        ("deepest_ce_weight", "1"),
        ("kd_weight", True),
        ("kd_weight", None),
        ("temperature", 0.0),
        ("temperature", -3.0),
        ("temperature", math.inf),
        ("label_smoothing", 1.1),
        ("label_smoothing", -0.1),
        ("t_squared", 1),
        ("hint_distance", "cosine"),
    ],
)
def test_config_refuses_bad_values(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; allowed"):
        SelfDistillationConfig(**{name: value})


def test_config_refuses_a_loss_without_terms():
    with pytest.raises(ValueError, match="All weights are 0"):
        SelfDistillationLoss.from_preset("none", deepest_ce_weight=0)


def test_unknown_divergence_and_teacher_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Unknown divergence 'kll'; known are dkd, jensen-shannon, kl, mse, nkd; did you mean 'kl'"
    ):
        SelfDistillationLoss.from_preset("byot-iccv2019", divergence="kll")
    with pytest.raises(ValueError, match="Unknown teacher 'deeper'; known are all-deeper, deepest, ema"):
        SelfDistillationLoss.from_preset("byot-iccv2019", teacher="deeper")


def bad_calls():
    out, target = make_output(), make_target()
    logits, features = out
    yield "no logits", ExitOutput((), ()), target, "holds logits nothing"
    yield "only the backbone", ExitOutput(logits[-1:], features[-1:]), target, "return_exits=True"
    yield "not [B, C]", ExitOutput(tuple(x[0] for x in logits), features), target, r"one shape \[B, C\]"
    yield "other classes", ExitOutput((logits[0][:, :2], *logits[1:]), features), target, r"\[6, 2\]"
    yield "integer logits", ExitOutput(tuple(x.long() for x in logits), features), target, "allowed are floating"
    yield "empty batch", ExitOutput(tuple(x[:0] for x in logits), features), target[:0], "none of them empty"
    yield "no features", ExitOutput(logits, ()), target, "holds features nothing"
    yield "fewer features", ExitOutput(logits, features[1:]), target, r"one \[B, D\] for each \[B, C\]"
    yield "another batch", ExitOutput(logits, tuple(x[:2] for x in features)), target, r"one \[B, D\] for each"
    yield "other width", ExitOutput(logits, (features[0][:, :3], *features[1:])), target, r"one shape \[B, D\]"
    yield (
        "int32 target",
        out,
        target.int(),
        r"target is torch.int32 \[6\]; allowed are class indices, torch.int64 \[6\]",
    )
    yield "short target", out, target[:3], r"target is torch.int64 \[3\]"
    yield "integer one-hot", out, nn.functional.one_hot(target, CLASSES), r"floating \[6, 5\]"
    yield "float indices", out, target.float(), r"target is torch.float32 \[6\]"
    yield "wrong classes", out, torch.rand(BATCH, CLASSES + 1), r"target is torch.float32 \[6, 6\]"


@pytest.mark.parametrize(("out", "target", "message"), [pytest.param(*case, id=name) for name, *case in bad_calls()])
def test_wrong_shapes_and_dtypes_are_refused(out, target, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillationLoss("byot-iccv2019")(out, target)


@pytest.fixture
def scratch_registries(monkeypatch):
    for registry in (divergences._DIVERGENCES, teachers._TEACHERS, protocol._LOSSES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_registries_list_what_is_shipped():
    assert {"kl", "mse"} <= set(list_divergences())
    assert {"deepest", "ensemble", "next-deeper"} <= set(list_teachers())
    assert get_loss("self-distillation") is SelfDistillationLoss


@pytest.mark.usefixtures("scratch_registries")
def test_registered_divergence_and_teacher_are_used_by_name():
    seen = {}

    @register_divergence("needs-target")
    def needs_target(student, teacher, target, *, temperature, scale):
        seen.update(target=target, temperature=temperature, scale=scale, teacher=teacher)
        return scale * (student - teacher).gather(-1, target.expand(len(student), -1)[..., None]).square().mean((1, 2))

    @register_teacher("zero")
    def zero(logits):
        assert not logits.requires_grad
        return torch.zeros_like(logits[:-1])

    assert "needs-target" in list_divergences()
    assert "zero" in list_teachers()
    out, target = make_output(), make_target()
    loss = SelfDistillationLoss.from_preset("byot-iccv2019", divergence="needs-target", teacher="zero", temperature=2.0)
    terms = loss(out, target)
    assert seen["target"] is target
    assert (seen["temperature"], seen["scale"]) == (2.0, 4.0)
    for i in range(3):
        expected = 4 * sum(out.logits[i][b, target[b]] ** 2 for b in range(BATCH)) / BATCH
        torch.testing.assert_close(terms[f"kd/{i}"], expected.detach())
    for register, name in ((register_divergence, "kl"), (register_teacher, "zero")):
        with pytest.raises(ValueError, match="already registered"):
            register(name)(lambda *args: None)


@pytest.mark.usefixtures("scratch_registries")
def test_registered_functions_with_a_wrong_result_are_named():
    register_divergence("scalar")(lambda student, *args, **kwargs: student.mean())
    register_teacher("too-many")(lambda logits: logits)
    with pytest.raises(ValueError, match=r"Divergence 'scalar' returned \[\]; .* per exit, \[3\]"):
        SelfDistillationLoss.from_preset("byot-iccv2019", divergence="scalar")(make_output(), make_target())
    with pytest.raises(ValueError, match=r"Teacher 'too-many' returned \[4, 6, 5\]; .* \[3, 6, 5\]"):
        SelfDistillationLoss.from_preset("byot-iccv2019", teacher="too-many")(make_output(), make_target())


@pytest.mark.usefixtures("scratch_registries")
def test_loss_classes_are_registered():
    @register_loss("mine")
    class Mine(nn.Module):
        needs_exits = False

    assert get_loss("mine") is Mine
    assert "mine" in list_losses()
    with pytest.raises(ValueError, match="already registered"):
        register_loss("self-distillation")(Mine)
    with pytest.raises(ValueError, match=r"Unknown loss 'selfdistillation'.*did you mean 'self-distillation'"):
        get_loss("selfdistillation")


@pytest.mark.parametrize(
    ("attributes", "needs"),
    [
        ({}, Needs()),
        ({"needs_exits": False}, Needs(exits=False)),
        ({"needs": Needs(time=True)}, Needs(exits=True, time=True)),
        ({"needs": Needs(time=True), "needs_exits": False}, Needs(exits=False, time=True)),
    ],
)
def test_the_short_form_of_what_a_loss_needs_is_read(attributes, needs):
    assert needs_of(type("Theirs", (nn.Module,), attributes)()) == needs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda target: target.fill_(-100), "the class index -100; allowed are 0 to 4"),
        (lambda target: target.fill_(-1), "the class index -1; allowed are 0 to 4"),
        (lambda target: target.fill_(CLASSES), "the class index 5; allowed are 0 to 4"),
    ],
)
def test_a_class_index_out_of_range_is_refused(change, message):
    for loss in (SelfDistillationLoss("byot-iccv2019"), SelfDistillationLoss.from_preset("none"), CSKD(), PSKD()):
        out, target = make_output(), make_target()
        change(target[:1])
        further = {"partners": out} if isinstance(loss, CSKD) else {}
        if isinstance(loss, PSKD):
            further = {"past": None, "time": TrainingTime(0, 1)}
        with pytest.raises(ValueError, match=message):
            loss(out, target, **further)


@pytest.mark.parametrize("values", [[0.5, 0.6, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [0, 0, 0, 0, 0], [math.nan, 1, 0, 0, 0]])
def test_probabilities_that_are_none_are_refused(values):
    target = make_soft_target()
    target[1] = torch.tensor(values)
    with pytest.raises(ValueError, match="allowed are numbers of 0 or more with the sum 1"):
        SelfDistillationLoss("byot-iccv2019")(make_output(), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_rounded_to_half_precision_are_taken(dtype):
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    out = ExitOutput((logits, logits), (logits, logits))
    smoothed = torch.full((4, 1000), 0.1 / 1000, dtype=torch.float32)
    smoothed[:, 0] += 0.9
    assert SelfDistillationLoss("byot-iccv2019")(out, smoothed.to(dtype))["loss"].isfinite()


def test_torch_leaves_no_sample_out_under_compile_either():
    """Inside `torch.compile`, values are not looked at; torch itself must not take -100 for a sample to be left out."""
    losses = cross_entropy(torch.zeros(1, 2, CLASSES), torch.tensor([0, 1]))
    assert losses == pytest.approx(math.log(CLASSES))
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(1, 2, CLASSES), torch.tensor([0, -100]))


@pytest.mark.parametrize("temperature", [1001, 1e4, 1e6, 1e-7])
def test_temperatures_at_which_the_divergence_is_rounding_are_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature is .* from 1e-06 to 1000"):
        SelfDistillationConfig(temperature=temperature)
    for loss in (CSKD, DLB):
        with pytest.raises(ValueError, match=r"temperature is .* from 1e-06 to 1000"):
            loss(temperature=temperature)


def test_the_greatest_temperature_gives_a_divergence_that_is_right():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 64, 100, generator=generator).unbind()
    arguments = {"temperature": 1e3, "scale": 1e6}
    exact = divergences.kl(student.double(), teacher.double(), make_target(), **arguments)
    assert float(divergences.kl(student, teacher, make_target(), **arguments)) == pytest.approx(float(exact), rel=0.1)
