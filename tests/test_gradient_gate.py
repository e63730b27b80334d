"""The gate at the taps: what the backbone gets of the exits' gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import timm_selfdistill as sd
from timm_selfdistill.heads import HEADS
from timm_selfdistill.losses import Needs, SelfDistillationLoss
from timm_selfdistill.losses.protocol import TrainingTime
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import RecipeError, load_recipe
from timm_selfdistill.train import train, trainer


class DropoutHead(nn.Module):
    """A head that draws random numbers."""

    def __init__(self, tap: sd.Tap, feature_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(tap.channels, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.project(x.mean((2, 3))), 0.5, self.training)


@pytest.fixture
def _dropout_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS._entries, "test-dropout", DropoutHead)


@pytest.fixture
def make(tiny_net: type[nn.Module]) -> Any:
    """A function that returns a task, the same weights every time, with other settings of the loss."""

    def make_task(head: str = "linear", preset: str = "byot-iccv2019", **settings: Any) -> sd.SelfDistillationTask:
        torch.manual_seed(0)
        model = sd.wrap(tiny_net(), exits=["stage0", "stage1"], head=head, image_size=32)
        loss = SelfDistillationLoss.from_preset(preset, **settings)
        return sd.SelfDistillationTask(model, loss, verbose=False)

    return make_task


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5


def model_of(task: sd.SelfDistillationTask) -> SelfDistillModel:
    model = task.trainable_module
    assert isinstance(model, SelfDistillModel)
    return model


def gradients(task: sd.SelfDistillationTask) -> dict[str, Tensor]:
    """The gradient of every parameter after one batch."""
    task.zero_grad()
    task(*batch())["loss"].backward()
    return {name: p.grad.clone() for name, p in model_of(task).named_parameters() if p.grad is not None}


def of_each_term(task: sd.SelfDistillationTask) -> list[dict[str, Tensor]]:
    """The gradients of the backbone from exit 0, from exit 1, and from its own loss."""
    model, (images, target) = model_of(task), batch()
    names, parameters = zip(*model.backbone.named_parameters(prefix="backbone"), strict=True)
    found = []
    for index in range(3):
        logits = model(images, return_exits=True).logits[index]
        loss = nn.functional.cross_entropy(logits, target)
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, parts, strict=True)}
        )
    return found


@pytest.mark.parametrize(
    ("gate", "factors"),
    [(0.25, (0.25, 0.25)), ([0.5, 2.0], (0.5, 2.0)), ("equilibrium", (1 / 3, 1 / 2)), ([0.0, 1.0], (0.0, 1.0))],
)
def test_the_backbone_gets_the_share_of_each_exit(make: Any, gate: Any, factors: tuple[float, float]) -> None:
    parts = of_each_term(make(preset="deep-supervision"))
    whole = gradients(make(preset="deep-supervision"))
    gated = gradients(make(preset="deep-supervision", gate=gate))
    assert gated.keys() == whole.keys()
    for name, value in gated.items():
        if name.startswith("heads."):
            assert torch.equal(value, whole[name]), name
        else:
            expected = factors[0] * parts[0][name] + factors[1] * parts[1][name] + parts[2][name]
            torch.testing.assert_close(value, expected, msg=name)


def test_a_gate_of_one_adds_nothing_and_one_of_zero_cuts_the_exits_off(make: Any) -> None:
    graph = make(gate=1.0)(*batch())["loss"]
    assert "ScaledGradient" in _nodes(make(gate=0.5)(*batch())["loss"])
    assert "ScaledGradient" not in _nodes(graph)
    assert list(model_of(make(gate=0.5)).buffers()) == list(model_of(make()).buffers()) == []
    backbone = gradients(make(gate=0.0))
    plain = gradients(make(preset="none"))
    assert {name for name in backbone if not name.startswith("heads.")} == set(plain)
    assert all(torch.equal(backbone[name], value) for name, value in plain.items())


def _nodes(loss: Tensor) -> str:
    """The names of the nodes of a graph."""
    found, seen = [loss.grad_fn], set()
    for node in found:
        seen.add(node)
        found += [after for after, _ in node.next_functions if after is not None and after not in seen]
    return " ".join(node.name() for node in seen)


def test_inference_sees_no_gate(make: Any) -> None:
    task = make(gate=[0.0, 0.5], gate_fade=1.0).eval()
    model, x = model_of(task), batch()[0]
    free = model_of(make()).eval()
    out = model(x, return_exits=True)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, free(x, return_exits=True).logits, strict=True))
    assert "ScaledGradient" not in _nodes(out.logits[1].sum())
    out.logits[0].sum().backward()
    assert model.backbone.stage0.weight.grad.any()
    assert model.state_dict().keys() == free.state_dict().keys()
    assert torch.equal(sd.truncate(model, 1)(x), free.forward_exit(x, 1))


def test_the_gate_fades_over_the_last_part_of_the_training(make: Any) -> None:
    assert [Needs(gate_fade=0.4).gate_share(TrainingTime(epoch, 10)) for epoch in (0, 5.9, 6, 8, 9.5)] == pytest.approx(
        [1, 1, 1, 0.5, 0.125]
    )
    assert Needs().gate_share(TrainingTime(9, 10)) == 1
    task = make(preset="deep-supervision", gate=[0.5, 2.0], gate_fade=0.4)
    with pytest.raises(ValueError, match=r"fades .* call task\.set_time\(\) before each step"):
        task(*batch())
    task.set_time(8, 10)
    fixed = gradients(make(preset="deep-supervision", gate=[0.25, 1.0]))
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, fixed[name], msg=name)


def test_a_later_task_sets_the_gate_anew(make: Any) -> None:
    model = model_of(make(gate=0.0, gate_fade=0.5))
    assert model.gate.is_closed
    sd.SelfDistillationTask(model, SelfDistillationLoss(), verbose=False)
    assert not model.gate.is_closed
    sd.SelfDistillationTask(model, SelfDistillationLoss.from_preset("none", gate=0.0, gate_fade=0.5), verbose=False)
    assert not model.gate.is_closed


def test_a_compiler_makes_one_program_for_all_shares(make: Any) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    settings = {"preset": "deep-supervision", "gate": [0.0, 0.5], "gate_fade": 1.0}
    eager, compiled = make(**settings), make(**settings)
    compiled.compile(backend=counter, fullgraph=True)
    for epoch in (0, 3, 9):
        for task in (eager, compiled):
            task.set_time(epoch, 10)
            task.zero_grad()
            task(*batch(epoch))["loss"].backward()
        for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad, ours.grad)
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_copies_and_average_have_a_gate_of_their_own(make: Any) -> None:
    task = make(gate=0.5, gate_fade=1.0)
    task.setup_ema(decay=0.5)
    other = copy.deepcopy(model_of(task))
    task.set_time(5, 10)
    assert float(model_of(task).gate.share) == 0.5
    assert float(other.gate.share) == 1


@pytest.mark.usefixtures("_dropout_head")
def test_heads_behind_a_closed_gate_draw_numbers_of_their_own(make: Any) -> None:
    task = make("test-dropout", gate=0.0)
    losses, states = [], []
    for _ in range(3):
        losses.append(task(*batch())["ce/0"].item())
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (-1.0, r"gate is -1\.0; allowed is a number of 0 or more, a sequence with one for each exit, or"),
        ([0.5, True], "gate is .*; allowed is a number"),
        ("even", "gate is 'even'; allowed is a number"),
        ([], r"gate is \[\]; allowed is a number"),
        ([0.5], "gate has 1 values for 2 added exits; allowed is one each"),
    ],
)
def test_other_gates_are_refused(make: Any, gate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(gate=gate)


# In the training loop.

SMALL = (
    *("epochs=1", "batch_size=16", "data.max_train=64", "data.max_eval=20", "data.image_size=16", "data.validation=0"),
    "model.kwargs={in_chans: 1, channels: [8, 8, 16, 16], drop_rate: 0.2, drop_path_rate: 0.2}",
    *(
        "optimizer.clip_grad=0.5",
        "precision='no'",
        "exits.head=test-dropout",
        "exits.points=3",
        "loss.label_smoothing=0.1",
    ),
)


class Trained(Exception):
    """Ends a run when its networks are trained."""


@pytest.mark.usefixtures("_dropout_head")
@pytest.mark.parametrize("gate", ["0", "[0,0,0]"])
def test_the_backbone_behind_a_closed_gate_trains_as_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    networks = {}
    train_network = trainer.Trainer.run

    def remember(self: Any) -> Any:
        start = self.model.heads[0].classifier.weight.clone()
        networks[self.name] = train_network(self)
        if self.name == "self-distilled":
            assert not torch.equal(networks[self.name].heads[0].classifier.weight, start)
            raise Trained
        return networks[self.name]

    monkeypatch.setattr(trainer.Trainer, "run", remember)
    loss = ["loss.preset=byot-iccv2019", f"loss.gate={gate}"]
    recipe = load_recipe("digits", [*SMALL, f"output_dir={tmp_path}", "baseline=true", *loss])
    with pytest.raises(Trained):
        train(recipe)
    plain, gated = (network.backbone.state_dict() for network in networks.values())
    assert [name for name in plain if not torch.equal(plain[name], gated[name])] == []


def test_the_loop_tells_the_gate_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, step = [], trainer.Trainer._step

    def remember(self: Any, stepper: Any, *args: Any) -> Any:
        result = step(self, stepper, *args)
        shares.append(float(stepper.model.gate.share))
        if len(shares) == 4:
            raise Trained
        return result

    monkeypatch.setattr(trainer.Trainer, "_step", remember)
    settings = ("exits.head=linear", "baseline=false", "loss.gate=0.5", "loss.gate_fade=0.75")
    with pytest.raises(Trained):
        train(load_recipe("digits", [*SMALL, f"output_dir={tmp_path}", *settings]))
    assert shares == pytest.approx([1, 1, 2 / 3, 1 / 3])


def test_recipes_say_what_a_gate_may_be() -> None:
    assert load_recipe("digits", ["loss.gate=equilibrium"]).loss.changes == {"gate": "equilibrium"}
    assert load_recipe("digits", ["loss.gate=[0, 0.5, 1]"]).loss.changes == {"gate": (0, 0.5, 1)}
    message = "loss.gate: must be a number of 0 or more, a list with one for each exit, or equilibrium, received 'half'"
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", ["loss.gate=half"])
