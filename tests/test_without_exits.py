"""The losses without exits, against their papers' formulas, alone and in the task."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.losses import CSKD, DLB, PSKD, Needs, TrainingTime, get_loss
from timm_selfdistill.model import ExitOutput, SelfDistillModel

BATCH, CLASSES = 4, 5


def make_output(seed: int = 0, batch: int = BATCH) -> ExitOutput:
    generator = torch.Generator().manual_seed(seed)
    return ExitOutput(
        (torch.randn(batch, CLASSES, generator=generator, dtype=torch.float64).mul(2).requires_grad_(),), ()
    )


def make_model() -> SelfDistillModel:
    torch.manual_seed(0)
    kwargs = {"channels": (8, 8, 16, 16), "drop_rate": 0.5}
    return sd.wrap("resnet18", num_classes=CLASSES, head="linear", small_stem=True, image_size=16, model_kwargs=kwargs)


def make_images(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_target(batch: int = BATCH) -> Tensor:
    return torch.arange(batch) % CLASSES


# The reference: the papers' formulas, sample by sample.


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum().log()


def reference_ce(logits: Tensor, target: Tensor) -> Tensor:
    rows = zip(logits, target, strict=True)
    return sum(-(log_softmax(z) * y).sum() if y.ndim else -log_softmax(z)[y] for z, y in rows) / len(logits)


def reference_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for t, s in zip(teacher.detach() / temperature, student / temperature, strict=True):
        total = total + (log_softmax(t).exp() * (log_softmax(t) - log_softmax(s))).sum()
    return total / len(student)


def assert_equal(terms: dict[str, Tensor], expected: Tensor, *inputs: Tensor) -> None:
    """Compare the loss and its gradients; only the loss may have one."""
    torch.testing.assert_close(terms["loss"], expected)
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (terms["loss"], expected))
    torch.testing.assert_close(ours, theirs)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]


def test_cs_kd_is_the_formula_of_its_paper() -> None:
    out, partners, target = make_output(), make_output(1), make_target()
    terms = CSKD(weight=3.0)(out, target, partners=partners)
    ce, kd = reference_ce(out.logits[0], target), reference_kl(partners.logits[0], out.logits[0], 4.0)
    assert_equal(terms, ce + 3.0 * 16 * kd, out.logits[0])
    torch.testing.assert_close((terms["ce/0"], terms["kd/0"]), (ce.detach(), 16 * kd.detach()))
    assert torch.autograd.grad(terms["loss"], partners.logits, allow_unused=True) == (None,)


def test_dlb_is_the_formula_of_its_paper() -> None:
    loss, target = DLB(weight=2.0), make_target(2 * BATCH)
    first, second = make_output(0, 2 * BATCH), make_output(1, 2 * BATCH)
    terms = loss(first, target)
    assert_equal(terms, reference_ce(first.logits[0], target), first.logits[0])
    assert terms["kd/0"] == 0
    terms = loss(second, target)
    ce = reference_ce(second.logits[0], target)
    kd = reference_kl(first.logits[0][BATCH:], second.logits[0][:BATCH], 3.0)
    assert_equal(terms, ce + 2.0 * 9 * kd, second.logits[0])
    torch.testing.assert_close((terms["ce/0"], terms["kd/0"]), (ce.detach(), 9 * kd.detach()))


def test_dlb_goes_on_from_its_saved_state_and_remembers_nothing_when_it_is_evaluated() -> None:
    loss, target = DLB(), make_target(2 * BATCH)
    loss(make_output(0, 2 * BATCH), target)
    restored = DLB()
    restored.load_state_dict(loss.state_dict())
    loss.eval()(make_output(5, 2 * BATCH), target)
    assert loss(make_output(1, 2 * BATCH), target) == restored(make_output(1, 2 * BATCH), target)


def test_dlb_learns_nothing_from_a_step_that_was_not_finite() -> None:
    loss, target = DLB(), make_target(2 * BATCH)
    broken = make_output(0, 2 * BATCH).logits[0].detach().clone()
    broken[BATCH] = math.nan
    assert loss(ExitOutput((broken,), ()), target)["loss"].isnan()
    out = make_output(1, 2 * BATCH)
    kd = reference_kl(broken[BATCH + 1 :], out.logits[0][1:BATCH], 3.0) * 9 * (BATCH - 1) / BATCH
    assert_equal(loss(out, target), reference_ce(out.logits[0], target) + kd, out.logits[0])


@pytest.mark.parametrize("soft", [False, True])
def test_ps_kd_is_the_formula_of_its_paper(soft: bool) -> None:
    out, past, target = make_output(), make_output(1), make_target()
    one_hot = nn.functional.one_hot(target, CLASSES).double()
    target = 0.9 * one_hot + 0.1 / CLASSES if soft else target
    first = PSKD()(out, target, past=None, time=TrainingTime(0.5, 10))
    assert_equal(first, reference_ce(out.logits[0], target), out.logits[0])
    # In the fourth epoch of ten, at any step.
    terms = PSKD(alpha=0.5)(out, target, past=past, time=TrainingTime(3.7, 10))
    predicted = torch.stack([log_softmax(row).exp() for row in past.logits[0]]).detach()
    mixed = 0.8 * (target if soft else one_hot) + 0.2 * predicted
    assert_equal(terms, reference_ce(out.logits[0], mixed), out.logits[0])


@pytest.mark.parametrize("name", ["cs-kd", "dlb", "ps-kd"])
def test_losses_are_finite_for_huge_logits_and_computed_in_float32(name: str) -> None:
    huge = torch.tensor([[3e38, -3e38, 0, 1, 2], [3e38] * 5, [0, -3e38, 3e38, 0, 0], [-3e38] * 5])
    given: dict[str, Any] = {}
    if name == "cs-kd":
        given = {"partners": ExitOutput((huge.flip(0),), ())}
    if name == "ps-kd":
        given = {"past": ExitOutput((huge.flip(0),), ()), "time": TrainingTime(5, 6)}
    for dtype in (torch.float32, torch.bfloat16):
        loss = get_loss(name)()
        for rows in (huge, huge.flip(1)):
            logits = rows.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                terms = loss(ExitOutput((logits,), ()), make_target(), **given)
            assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values()), terms
            assert torch.autograd.grad(terms["loss"], logits)[0].isfinite().all()


def test_the_losses_are_registered_and_say_what_they_need() -> None:
    assert {"cs-kd", "dlb", "ps-kd"} <= set(sd.list_losses())
    needs = {name: get_loss(name).needs for name in ("cs-kd", "dlb", "ps-kd")}
    assert needs == {
        "cs-kd": Needs(exits=False, batches="paired"),
        "dlb": Needs(exits=False, batches="repeated"),
        "ps-kd": Needs(exits=False, past=True, time=True),
    }
    for name in needs:
        with pytest.raises(ValueError, match="nothing would train"):
            sd.SelfDistillationTask(make_model(), get_loss(name)(), regime="frozen")


# In the task.


def test_the_partners_of_cs_kd_run_apart_in_training_mode_and_without_a_gradient() -> None:
    model, images, target = make_model(), make_images(2 * BATCH), make_target().repeat(2)
    reference = copy.deepcopy(model)
    task = sd.SelfDistillationTask(model, CSKD(), verbose=False)
    torch.manual_seed(3)
    result = task(images, target)
    torch.manual_seed(3)
    logits = reference(images[:BATCH])
    with torch.no_grad():
        partners = reference(images[BATCH:])
    expected = CSKD()(ExitOutput((logits,), ()), target[:BATCH], partners=ExitOutput((partners,), ()))
    torch.testing.assert_close(result, expected | {"output": logits})
    result["loss"].backward()
    expected["loss"].backward()
    for ours, theirs in zip(model.backbone.parameters(), reference.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))
    with pytest.raises(ValueError, match="batches of pairs, but this one holds 3; allowed is 2B"):
        task(images[:3], target[:3])


def test_gradients_reach_every_weight_where_partners_run_under_autocast() -> None:
    task = sd.SelfDistillationTask(make_model(), CSKD(), verbose=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(make_images(2 * BATCH), make_target().repeat(2))["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)


def test_the_past_model_of_ps_kd_is_that_of_the_begin_of_the_epoch() -> None:
    model, images, target = make_model(), make_images(), make_target()
    task = sd.SelfDistillationTask(model, PSKD(), verbose=False).train()
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"call task\.set_time\(\) before each step"):
        task(images, target)
    at_begin = None
    for step in range(6):
        if step % 2 == 0:
            at_begin = copy.deepcopy(model).eval()
        task.set_time(step / 2, 3)
        generator = torch.get_rng_state()
        result = task(images, target)
        past = None if step < 2 else ExitOutput((at_begin(images),), ())
        expected = PSKD()(ExitOutput((result["output"],), ()), target, past=past, time=TrainingTime(step / 2, 3))
        torch.testing.assert_close(result["loss"], expected["loss"])
        torch.set_rng_state(generator)
        plain = model.eval()(images)
        assert not torch.equal(plain, result["output"]), "the network itself is in training mode"
        task.train()
        assert not task.past.model.training
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in task.past.parameters())


@pytest.mark.parametrize("loss", [PSKD, DLB])
def test_timms_checkpoints_hold_the_past_model_and_the_state_of_the_loss(loss: type[nn.Module]) -> None:
    first, second = (sd.SelfDistillationTask(make_model(), loss(), verbose=False) for _ in range(2))
    x, target = make_images(), make_target()
    first.set_time(1.0, 3)
    first(x, target)
    for parameter in first.trainable_module.parameters():
        parameter.data.mul_(2)
    state = first.get_checkpoint_state()
    assert first.get_checkpoint_state(ema=True) == {}
    second.load_checkpoint_state(state["state_dict"], state["task_state"])
    for task in (first, second):
        task.set_time(1.5, 3)
    assert torch.equal(first.eval()(x, target)["loss"], second.eval()(x, target)["loss"])
    fresh = sd.SelfDistillationTask(make_model(), loss(), verbose=False)
    fresh.load_checkpoint_state(state["state_dict"])
    fresh.set_time(1.5, 3)
    assert not torch.equal(fresh.eval()(x, target)["loss"], second(x, target)["loss"])


# What is refused.


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (CSKD, {"weight": -1}, "weight is -1; allowed is a finite number, 0 or more"),
        (CSKD, {"temperature": "4"}, "temperature is '4'; allowed is a finite number"),
        (DLB, {"temperature": 0}, "temperature is 0; allowed is a finite number, from 1e-06"),
        (DLB, {"weight": math.nan}, "weight is nan; allowed"),
        (PSKD, {"alpha": 1.5}, "alpha is 1.5; allowed is a finite number, from 0 to 1"),
    ],
)
def test_wrong_settings_are_refused(loss: type[nn.Module], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**settings)


def test_wrong_batches_are_refused() -> None:
    loss = DLB()
    with pytest.raises(ValueError, match="2 images of the batch are those of the batch before and 1 are new"):
        loss(make_output(0, 3), make_target(3))
    loss(make_output(0, 8), make_target(8))
    with pytest.raises(ValueError, match="but the batch before had 4 new ones"):
        loss(make_output(0, 6), make_target(6))
    for wrong in (make_target(3), make_target().float()):
        with pytest.raises(ValueError, match="The target is"):
            CSKD()(make_output(), wrong, partners=make_output())
