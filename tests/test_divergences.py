"""Divergences and teachers against their papers' formulas, sample by sample, in every combination."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.losses import Needs, TrainingTime, divergences, teachers
from timm_selfdistill.model import ExitOutput

EXITS, BATCH, CLASSES = 3, 6, 5
DIVERGENCES = ["dkd", "jensen-shannon", "kl", "mse", "nkd"]
TEACHERS = ["all-deeper", "deepest", "ema", "ema-same-exit", "ensemble", "next-deeper"]
COMBINATIONS = list(itertools.product(DIVERGENCES, TEACHERS))


def make_output(seed: int = 0, classes: int = CLASSES) -> ExitOutput:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(EXITS + 1, BATCH, classes, generator=generator, dtype=torch.float64)
    return ExitOutput(tuple(entry.clone().requires_grad_() for entry in logits), ())


def make_target(classes: int = CLASSES) -> Tensor:
    return torch.arange(BATCH) * 7 % classes


def make_loss(**settings) -> sd.SelfDistillationLoss:
    """Return a loss of divergences only."""
    return sd.SelfDistillationLoss.from_preset(
        "byot-iccv2019", **{"ce_weight": 0, "deepest_ce_weight": 0, "hint_weight": 0, "kd_weight": 1.0} | settings
    )


# The reference: the papers' formulas, with plain sums over probabilities.


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return sum(t * (t / s).log() for t, s in zip(teacher, student, strict=True))


def others(values: Tensor, label: int) -> Tensor:
    return torch.stack([value for index, value in enumerate(values) if index != label])


def reference(name: str, s: Tensor, t: Tensor, label: int, temperature: float, scale: float, **settings) -> Tensor:
    """Return the divergence of one sample's logits [C]."""
    student, teacher = softmax(s / temperature), softmax(t / temperature)
    if name == "kl":
        return scale * kl(teacher, student)
    if name == "jensen-shannon":
        mean = (student + teacher) / 2
        return scale * (kl(teacher, mean) + kl(student, mean)) / 2
    if name == "dkd":
        alpha, beta = settings.get("alpha", 1.0), settings.get("beta", 8.0)
        tckd = kl(torch.stack([teacher[label], 1 - teacher[label]]), torch.stack([student[label], 1 - student[label]]))
        nckd = kl(others(teacher, label) / (1 - teacher[label]), others(student, label) / (1 - student[label]))
        return scale * (alpha * tckd + beta * nckd)
    if name == "nkd":
        gamma = settings.get("gamma", 1.5)
        non_target = (
            -(others(teacher, label) / (1 - teacher[label])) * (others(student, label) / (1 - student[label])).log()
        )
        return -softmax(t)[label] * softmax(s)[label].log() + gamma * scale * non_target.sum()
    return ((s - t) ** 2).mean()


def reference_teachers(name: str, logits: tuple[Tensor, ...], ema: tuple[Tensor, ...], exit: int) -> list[Tensor]:
    return {
        "deepest": [logits[-1]],
        "ensemble": [sum(logits) / len(logits)],
        "next-deeper": [logits[exit + 1]],
        "all-deeper": list(logits[exit + 1 :]),
        "ema": [ema[-1]],
        "ema-same-exit": [ema[exit]],
    }[name]


def reference_exit(
    divergence: str, teacher: str, out: ExitOutput, ema: ExitOutput, exit: int, standardize: bool, *args, **settings
) -> Tensor:
    """Return the divergence of one exit: a mean over the batch and the exit's teachers."""

    def prepared(logits: Tensor) -> Tensor:
        if not standardize:
            return logits
        variance = ((logits - logits.mean()) ** 2).sum() / (len(logits) - 1)
        return (logits - logits.mean()) / (variance.sqrt() + 1e-7)

    chosen = [found.detach() for found in reference_teachers(teacher, out.logits, ema.logits, exit)]
    values = [
        reference(divergence, prepared(s), prepared(t), label, *args, **settings)
        for found in chosen
        for s, t, label in zip(out.logits[exit], found, make_target().tolist(), strict=True)
    ]
    return torch.stack(values).mean()


@pytest.mark.parametrize(("divergence", "teacher"), COMBINATIONS)
def test_every_combination_is_the_formula_of_its_papers(divergence: str, teacher: str) -> None:
    ema = make_output(seed=9)
    for standardize, t_squared in ((False, True), (True, False)):
        out = make_output()
        settings = {"divergence": divergence, "teacher": teacher, "standardize_logits": standardize}
        loss = make_loss(**settings, t_squared=t_squared, temperature=2.0)
        assert loss.needs == Needs(ema=teacher.startswith("ema"), ensemble=teacher == "ensemble")
        terms = loss(out, make_target(), ema=ema)
        scale = 4.0 if t_squared else 1.0
        expected = [
            reference_exit(divergence, teacher, out, ema, exit, standardize, 2.0, scale) for exit in range(EXITS)
        ]
        for exit, value in enumerate(expected):
            torch.testing.assert_close(terms[f"kd/{exit}"], value.detach())
        inputs = (*out.logits, *ema.logits)
        ours, theirs = (
            torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
            for total in (terms["loss"], sum(expected))
        )
        torch.testing.assert_close(ours, theirs)
        assert not any(gradient.any() for gradient in ours[EXITS:]), "the teachers get a gradient"
        assert all(gradient.any() for gradient in ours[:EXITS])


@pytest.mark.parametrize(
    ("divergence", "settings"), [("dkd", {"alpha": 0.5, "beta": 2}), ("dkd", {"beta": 0.0}), ("nkd", {"gamma": 3.5})]
)
def test_settings_of_a_divergence(divergence: str, settings: dict[str, float]) -> None:
    out = make_output()
    loss = make_loss(divergence=divergence, divergence_kwargs=settings, temperature=3.0)
    terms = loss(out, make_target())
    for exit in range(EXITS):
        value = reference_exit(divergence, "deepest", out, out, exit, False, 3.0, 9.0, **settings)
        torch.testing.assert_close(terms[f"kd/{exit}"], value.detach())


def test_dkd_puts_kl_together_again() -> None:
    """The paper's equation 7: KL = TCKD + (1 - p of the teacher) NCKD, here for one sample."""
    out = ExitOutput(tuple(entry.detach()[:1] for entry in make_output().logits), ())
    target = make_target()[:1]
    weight = 1 - softmax(out.logits[-1][0] / 3)[target[0]]
    parts = make_loss(divergence="dkd", divergence_kwargs={"beta": weight.item()})(out, target)
    torch.testing.assert_close(parts, make_loss(divergence="kl")(out, target))


@pytest.mark.parametrize("divergence", ["dkd", "jensen-shannon", "kl", "mse"])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_divergence_of_equal_logits_is_zero_and_of_others_is_not(divergence: str, standardize: bool) -> None:
    same = make_output().logits[0].detach()
    loss = make_loss(divergence=divergence, standardize_logits=standardize)
    assert loss(ExitOutput((same,) * 3, ()), make_target())["loss"].abs() < 1e-12
    assert loss(make_output(), make_target())["loss"] > 0.1


def test_jensen_shannon_is_symmetric_and_at_most_log_two() -> None:
    first, second = (50 * entry.detach() for entry in make_output().logits[:2])
    loss = make_loss(divergence="jensen-shannon", t_squared=False)
    forwards, backwards = (
        loss(ExitOutput(pair, ()), make_target())["loss"] for pair in ((first, second), (second, first))
    )
    torch.testing.assert_close(forwards, backwards)
    assert 0 < forwards < math.log(2)


def test_standardized_logits_do_not_depend_on_scale_and_shift() -> None:
    out = make_output()
    moved = ExitOutput(tuple(5 * entry + 3 for entry in out.logits), ())
    loss = make_loss(standardize_logits=True)
    torch.testing.assert_close(loss(moved, make_target()), loss(out, make_target()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["dkd", "nkd"])
def test_probabilities_count_as_their_likeliest_class(divergence: str) -> None:
    out, target = make_output(), make_target()
    soft = 0.6 * torch.nn.functional.one_hot(target, CLASSES) + 0.4 / CLASSES
    loss = make_loss(divergence=divergence)
    torch.testing.assert_close(loss(out, soft), loss(out, target))


@pytest.mark.parametrize(("divergence", "teacher"), COMBINATIONS)
def test_huge_logits_give_finite_values_and_gradients(divergence: str, teacher: str) -> None:
    huge = 3e38
    rows = [
        [huge, -huge, 0, 1, 2],
        [huge] * 5,
        [-huge] * 4 + [huge],
        [0] * 5,
        [-huge, 0, 0, 0, -huge],
        [1e4, 0, 3, 0, 0],
    ]
    entries = [torch.tensor(rows).roll(shift, 0).roll(-shift, 1) for shift in range(EXITS + 1)]
    for temperature, standardize, classes in itertools.product((1e-6, 3.0, 1e3), (False, True), (2, CLASSES)):
        out = ExitOutput(tuple(entry[:, :classes].clone().requires_grad_() for entry in entries), ())
        ema = ExitOutput(tuple(entry.detach().flip(0) for entry in out.logits), ())
        settings = {"divergence": divergence, "teacher": teacher, "standardize_logits": standardize}
        for target in (make_target(classes), torch.full((BATCH, classes), 1 / classes)):
            terms = make_loss(**settings, temperature=temperature)(out, target, ema=ema)
            assert all(value.isfinite() for value in terms.values()), (temperature, standardize, classes)
            gradients = torch.autograd.grad(terms["loss"], out.logits[:EXITS])
            assert all(gradient.isfinite().all() for gradient in gradients), (temperature, standardize, classes)


@pytest.mark.parametrize("teacher", ["all-deeper", "ema"])
def test_losses_with_these_teachers_compile_as_one_graph(teacher: str) -> None:
    settings = {"divergence": "dkd", "standardize_logits": True, "exit_weights": [1, 2, 3]}
    loss, out, ema = make_loss(teacher=teacher, **settings), make_output(), make_output(seed=4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(out, make_target(), ema=ema), loss(out, make_target(), ema=ema))


def test_all_lists_are_those_of_this_test() -> None:
    assert sd.list_divergences() == DIVERGENCES
    assert sd.list_teachers() == TEACHERS


# Weights that follow the time or differ between exits.


def test_the_weight_of_the_divergences_rises_linearly() -> None:
    out, target = make_output(), make_target()
    loss = sd.SelfDistillationLoss.from_preset("byot-iccv2019", hint_weight=0, kd_weight=0.5, kd_warmup_epochs=4)
    assert loss.needs == Needs(time=True)
    terms = [loss(out, target, time=TrainingTime(epoch, 10)) for epoch in (0, 1, 2.5, 4, 9)]
    label = 0.9 * sum(terms[0][f"ce/{exit}"] for exit in range(EXITS)) + terms[0][f"ce/{EXITS}"]
    distilled = sum(terms[0][f"kd/{exit}"] for exit in range(EXITS))
    for found, share in zip(terms, (0, 0.25, 0.625, 1, 1), strict=True):
        torch.testing.assert_close(found["loss"].detach(), label + 0.5 * share * distilled)
        assert found["kd/0"] == terms[0]["kd/0"], "terms are told without their weights"


def test_weights_of_exits_multiply_all_their_terms() -> None:
    logits, target, weights = make_output().logits, make_target(), (0.5, 2.0, 3)
    features = tuple(entry.detach() for entry in make_output(seed=5).logits)
    config = sd.SelfDistillationConfig(exit_weights=weights, hint_weight=0.1, kd_weight=0.2)
    terms = sd.SelfDistillationLoss(config)(ExitOutput(logits, features), target)
    expected = terms[f"ce/{EXITS}"] + sum(
        weight * (0.9 * terms[f"ce/{exit}"] + 0.2 * terms[f"kd/{exit}"] + 0.1 * terms[f"hint/{exit}"])
        for exit, weight in enumerate(weights)
    )
    torch.testing.assert_close(terms["loss"].detach(), expected)
    without = sd.SelfDistillationLoss.from_preset("byot-iccv2019", exit_weights=weights, ce_weight=0, hint_weight=0)
    terms = without(ExitOutput(logits, ()), target)
    expected = terms[f"ce/{EXITS}"] + 0.1 * sum(w * terms[f"kd/{exit}"] for exit, w in enumerate(weights))
    torch.testing.assert_close(terms["loss"].detach(), expected)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "dkd", "divergence_kwargs": {"betta": 8}}, "'dkd' has no setting betta; it has alpha, beta"),
        ({"divergence": "kl", "divergence_kwargs": {"gamma": 1}}, "'kl' has no setting gamma; it has none"),
        ({"divergence": "dkd", "divergence_kwargs": {"temperature": 1}}, "no setting temperature; it has alpha, beta"),
        ({"divergence": "dkd", "divergence_kwargs": {"beta": "8"}}, "beta is '8'; allowed is a finite number"),
        (
            {"divergence": "nkd", "divergence_kwargs": {"gamma": math.inf}},
            "'gamma': inf}; allowed is .*finite",
        ),
        ({"divergence": "dkd", "divergence_kwargs": 8}, "divergence_kwargs is 8; allowed is a mapping"),
        ({"standardize_logits": 1}, "standardize_logits is 1; allowed is a valid boolean"),
        ({"kd_warmup_epochs": -1}, "kd_warmup_epochs is -1; allowed"),
        ({"exit_weights": []}, r"exit_weights is \[\]; allowed is None or a list of numbers above 0"),
        ({"exit_weights": [1, 0.0, 1]}, r"exit_weights is \[1, 0.0, 1\]; allowed"),
        ({"exit_weights": 2.0}, r"exit_weights is 2.0; allowed"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(**settings)


def test_calls_without_what_is_needed_are_refused() -> None:
    out, target = make_output(), make_target()
    with pytest.raises(ValueError, match=r"teacher 'ema' is the average of the weights.*setup_ema"):
        make_loss(teacher="ema")(out, target)
    with pytest.raises(ValueError, match=r"average's output holds logits .*; allowed is what the model's own has"):
        make_loss(teacher="ema")(out, target, ema=ExitOutput(out.logits[1:], ()))
    with pytest.raises(ValueError, match=r"kd_warmup_epochs needs the time.*set_time"):
        make_loss(kd_warmup_epochs=1)(out, target)
    with pytest.raises(ValueError, match="exit_weights has 2 values for 3 added exits"):
        make_loss(exit_weights=[1, 2])(out, target)
    one_class = ExitOutput(tuple(entry[:, :1] for entry in out.logits), ())
    for settings in ({"divergence": "dkd"}, {"divergence": "nkd"}, {"standardize_logits": True}):
        with pytest.raises(ValueError, match=r"one class only|one only"):
            make_loss(**settings)(one_class, torch.zeros(BATCH, dtype=torch.int64))


def test_a_teacher_with_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers._TEACHERS, "_entries", dict(teachers._TEACHERS._entries))
    sd.register_teacher("none-for-one")(lambda logits: [logits[1:], logits[:0], logits])
    with pytest.raises(ValueError, match=r"'none-for-one' returned \[\[3, 6, 5\], \[0, 6, 5\], \[4, 6, 5\]\]; allowed"):
        make_loss(teacher="none-for-one")(make_output(), make_target())


def test_a_registered_divergence_and_teacher_take_settings_and_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (divergences._DIVERGENCES, teachers._TEACHERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @sd.register_divergence("power")
    def power(student, teacher, target, *, temperature, scale, exponent=2):
        return (student - teacher).abs().pow(exponent).mean((1, 2))

    @sd.register_teacher("both")
    def both(logits, *, ema):
        return [torch.stack([logits[-1], ema[-1]])] * (len(logits) - 1)

    out, ema = make_output(), make_output(seed=3)
    loss = make_loss(divergence="power", divergence_kwargs={"exponent": 3}, teacher="both")
    terms = loss(out, make_target(), ema=ema)
    expected = [(out.logits[0] - other).abs().pow(3).mean() for other in (out.logits[-1], ema.logits[-1])]
    torch.testing.assert_close(terms["kd/0"], (sum(expected) / 2).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1000.3, 6e4])
def test_equal_logits_have_a_finite_gradient_when_standardized(dtype: torch.dtype, value: float) -> None:
    logits = torch.stack((torch.full((10,), value), torch.arange(10.0))).to(dtype).requires_grad_()
    standardized = divergences.standardize(logits.to(torch.promote_types(dtype, torch.float32)))
    assert (standardized[0] == 0).all()
    # As under the scaling of gradients in mixed precision.
    (torch.log_softmax(standardized, -1)[:, 0].sum() * 1000).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1].any()


def test_the_loss_of_an_untrained_classifier_has_a_finite_gradient_under_autocast() -> None:
    """A classifier that begins with zeros gives equal logits."""
    features, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for dtype in (torch.bfloat16, torch.float16):
        heads = [nn.Linear(8, CLASSES) for _ in range(2)]
        nn.init.zeros_(heads[0].weight)
        nn.init.zeros_(heads[0].bias)
        with torch.autocast("cpu", dtype):
            out = ExitOutput(tuple(head(features) for head in heads), (features, features))
            loss = sd.SelfDistillationLoss.from_preset("byot-iccv2019", standardize_logits=True, hint_weight=0.0)
            loss(out, target)["loss"].backward()
        for head in heads:
            assert head.weight.grad is not None
            assert head.weight.grad.isfinite().all()
