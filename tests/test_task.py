import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, unwrap_model
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.losses import PRESETS, get_loss
from timm_selfdistill.model import ExitOutput, SelfDistillModel
from timm_selfdistill.task import unwrapped_model

CLASSES = 4
TERMS = {"ce/0", "ce/1", "ce/2", "ce/3", "kd/0", "kd/1", "kd/2", "hint/0", "hint/1", "hint/2"}


def make_resnet(seed: int = 0, **kwargs: Any) -> SelfDistillModel:
    """Return a narrow wrapped ResNet-18, the same weights every time."""
    torch.manual_seed(seed)
    options = {"small_stem": True, "image_size": 16, "model_kwargs": {"channels": (8, 16, 24, 32)}} | kwargs
    return sd.wrap("resnet18", num_classes=CLASSES, exits=["layer1", "layer2", "layer3"], **options)


def make_vit(seed: int = 0, **kwargs: Any) -> SelfDistillModel:
    """Return a small wrapped ViT, which has no batch norm, the same weights every time."""
    torch.manual_seed(seed)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return sd.wrap("vit_tiny_patch16_224", num_classes=CLASSES, exits=[0, 1, 2], model_kwargs=size, **kwargs)


def make_batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return images [size, 3, 16, 16] whose brightness tells their class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(size) % CLASSES
    return torch.randn(size, 3, 16, 16, generator=generator) + target[:, None, None, None], target


def make_task(model: SelfDistillModel, preset: str = "byot-iccv2019", **kwargs: Any) -> sd.SelfDistillationTask:
    """Return a task with the loss of a preset, or another registered loss."""
    named = preset in PRESETS
    loss = sd.SelfDistillationLoss.from_preset(preset) if named else get_loss(preset)()
    return sd.SelfDistillationTask(model, loss, verbose=False, **kwargs)


def train(task: TrainingTask, steps: int, lr: float = 0.05) -> list[float]:
    """Take SGD steps on one batch and return the losses."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = task(*make_batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TimmRun:
    """A training run in which all but the task is timm's own."""

    epochs, steps = 4, 3

    def __init__(self, seed: int) -> None:
        self.task = make_task(make_resnet(seed, hint_adapter=True), "byot-tpami2021")
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), opt="adamw", lr=3e-3, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=self.epochs,
            warmup_epochs=1,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.task.setup_ema(decay=0.7)

    def train(self, epochs: range) -> list[float]:
        """Train some epochs and return each step's loss."""
        losses = []
        for step in range(epochs.start * self.steps, epochs.stop * self.steps):
            self.task.train()
            self.scheduler.step_update(step)
            loss = self.task(*make_batch(step))["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.task.update_ema(step=step)
            losses.append(loss.item())
        return losses

    def state(self, ema: bool = False) -> dict[str, Tensor]:
        """Return the weights or their average."""
        return state_of(unwrap_model(self.task.get_trainable_module(ema=ema)))


def test_timm_trains_saves_and_resumes_the_task(tmp_path: Path) -> None:
    run = TimmRun(seed=0)
    assert isinstance(run.task, TrainingTask)
    losses = run.train(range(2))
    saver = CheckpointSaver(
        run.task.get_trainable_module(),
        run.optimizer,
        task=run.task,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=1, metric=1.0)
    saved, saved_ema = run.state(), run.state(ema=True)
    losses += run.train(range(2, 4))
    assert losses[-1] < losses[0]

    resumed = TimmRun(seed=1)
    path = str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(resumed.task, path, optimizer=resumed.optimizer) == 2
    load_task_ema_checkpoint(resumed.task, path)
    assert same(resumed.state(), saved)
    assert same(resumed.state(ema=True), saved_ema)
    assert not same(saved, saved_ema)
    assert resumed.train(range(2, 4)) == losses[6:]
    assert same(resumed.state(), run.state())
    assert same(resumed.state(ema=True), run.state(ema=True))


def test_result_holds_loss_logits_and_every_term() -> None:
    model = make_resnet()
    task = make_task(model)
    backbone = copy.deepcopy(model.backbone)
    x, target = make_batch()
    for mode in (True, False):
        backbone.train(mode)
        result = task.train(mode)(x, target)
        assert set(result) == {"loss", "output"} | TERMS
        assert torch.equal(result["output"], backbone(x))
        torch.testing.assert_close(result["ce/3"], F.cross_entropy(result["output"], target))
    expected = task.criterion(model(x, return_exits=True), target)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_default_loss_is_that_of_the_first_paper() -> None:
    task = sd.SelfDistillationTask(make_vit())
    assert task.criterion.config == sd.SelfDistillationLoss.from_preset("ensemble-distillation").config


def test_targets_mixed_by_timm_are_taken() -> None:
    task = make_task(make_resnet())
    x, target = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)(*make_batch())
    assert target.shape == (8, CLASSES)
    result = task(x, target)
    torch.testing.assert_close(result["ce/3"], -(target * result["output"].log_softmax(-1)).sum(-1).mean())
    result["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


@pytest.mark.parametrize("make", [make_resnet, make_vit])
def test_loss_falls(make: Callable[[], SelfDistillModel]) -> None:
    losses = train(make_task(make()), steps=16)
    assert losses[-1] < 0.7 * losses[0]


def test_compiled_task_equals_the_eager_one() -> None:
    eager, compiled = make_task(make_resnet()), make_task(make_resnet())
    assert compiled.compile(backend="aot_eager", fullgraph=True) is compiled.get_eval_model()
    compiled.setup_ema(decay=0.5)
    torch.testing.assert_close(train(compiled, steps=3), train(eager, steps=3))
    compiled.update_ema()
    torch.testing.assert_close(
        compiled.get_checkpoint_state()["state_dict"], eager.get_checkpoint_state()["state_dict"]
    )
    x, _ = make_batch()
    ema = compiled.get_checkpoint_state(ema=True)["state_dict_ema"]
    averaged = make_resnet()
    averaged.load_state_dict(ema)
    torch.testing.assert_close(compiled.get_eval_model(ema=True)(x), averaged.eval()(x))
    # A frozen backbone is found inside the compiled model, too.
    frozen = make_task(make_vit(), regime="frozen")
    frozen.compile(backend="aot_eager")
    assert not unwrapped_model(frozen.train().trainable_module).backbone.training


def test_ema_copy_taken_after_a_forward_has_taps_of_its_own() -> None:
    task = make_task(make_resnet())
    x, target = make_batch()
    task(x, target)
    task.setup_ema(decay=0.5)
    train(task, steps=2)
    task.update_ema()
    ema = task.get_eval_model(ema=True)
    fresh = make_resnet()
    fresh.load_state_dict(task.get_checkpoint_state(ema=True)["state_dict_ema"])
    for ours, theirs in zip(ema(x, return_exits=True), fresh.eval()(x, return_exits=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ema(x), task.eval().get_eval_model()(x))


@pytest.mark.parametrize("ema", [False, True])
def test_timm_evaluates_the_model_it_trains(ema: bool) -> None:
    task = make_task(make_resnet())
    task.setup_ema(decay=0.0)
    train(task, steps=6)
    task.update_ema()
    x, target = make_batch(seed=3, size=10)
    evaluator = task.create_evaluator()
    model = task.eval().get_eval_model(ema=ema)
    for part in (slice(0, 8), slice(8, 10)):
        evaluator.update(model(x[part]), target[part])
    logits = model(x)
    result = evaluator.compute()
    assert result["top1"] == pytest.approx(100 * (logits.argmax(-1) == target).float().mean().item())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


@pytest.mark.parametrize("preset", ["byot-iccv2019", "byot-tpami2021", "deep-supervision"])
@pytest.mark.parametrize(
    ("make", "head"),
    [(make_resnet, "bottleneck"), (make_resnet, "sepconv_attention"), (make_resnet, "linear"), (make_vit, "token")],
)
@pytest.mark.parametrize("regime", ["joint", "frozen"])
def test_every_trained_parameter_gets_a_gradient(
    make: Callable[..., SelfDistillModel], head: str, preset: str, regime: Any
) -> None:
    model = make(head=head, hint_adapter=preset == "byot-tpami2021")
    task = make_task(model, preset, regime=regime)
    task(*make_batch())["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if regime == "joint" or name.startswith("heads.")}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    for name, parameter in model.heads.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_frozen_backbone_stays_as_it_is() -> None:
    model = make_resnet()
    task = make_task(model, regime="frozen")
    before, heads = state_of(model.backbone), state_of(model.heads)
    # timm's train.py sets the mode of the model, not of the task.
    for train_mode in (task.train, task.get_trainable_module().train, model.train):
        train_mode()
        assert not any(module.training for module in model.backbone.modules())
        assert all(module.training for module in model.heads.modules())
        losses = train(task, steps=4)
        task.eval()
        assert not any(module.training for module in model.modules())
    assert same(state_of(model.backbone), before)
    assert all(p.grad is None for p in model.backbone.parameters())
    after = state_of(model.heads)
    assert [name for name in heads if torch.equal(heads[name], after[name])] == []
    assert losses[-1] < losses[0]


def test_without_terms_for_the_exits_the_task_is_timms_own() -> None:
    model = make_resnet()
    plain = ClassificationTask(copy.deepcopy(model.backbone), nn.CrossEntropyLoss(), verbose=False)
    task = make_task(model, "none")
    runs = []
    for head in model.heads:
        head.register_forward_hook(lambda *_: runs.append(1))
    heads = state_of(model.heads)
    assert set(task(*make_batch())) == {"loss", "ce/0", "output"}
    plain(*make_batch())
    torch.testing.assert_close(train(task, steps=4), train(plain, steps=4))
    torch.testing.assert_close(state_of(model.backbone), state_of(plain.trainable_module))
    assert not runs
    assert same(state_of(model.heads), heads)
    assert not any(p.requires_grad for p in model.heads.parameters())


def test_a_later_task_on_the_same_model_trains_what_an_earlier_one_froze() -> None:
    model = make_vit()
    for preset, regime in (("none", "joint"), ("byot-iccv2019", "frozen"), ("byot-iccv2019", "joint")):
        task = make_task(model, preset, regime=regime)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in task.modules())


class LastExitLoss(nn.Module):
    """A third party's loss: the deepest added exit's cross-entropy, through a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, out: ExitOutput, target: Tensor) -> dict[str, Tensor]:
        return {"loss": self.scale * sum(F.cross_entropy(logits, target) for logits in out.logits)}


def test_a_loss_of_another_kind_is_taken_with_its_parameters() -> None:
    task = sd.SelfDistillationTask(make_vit(hint_adapter=True), LastExitLoss(), verbose=False)
    result = task(*make_batch())
    result["loss"].backward()
    assert set(result) == {"loss", "output"}
    assert task.criterion.scale.grad is not None
    assert any(parameter is task.criterion.scale for parameter in task.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": timm.create_model("test_resnet")}, r"made by wrap\(\), got ResNet"),
        ({"regime": "mixed"}, "'joint' or 'frozen', got 'mixed'"),
        ({"regime": "frozen", "loss": {"name": "none"}}, "nothing would train"),
        ({"model": {"hint_adapter": True}, "loss": {"name": "deep-supervision"}}, "hint_weight is 0"),
        ({"loss": {"name": "byot-iccv2019", "ce_weight": 0.0, "kd_weight": 0.0}}, "ce_weight and kd_weight are 0"),
        ({"loss": {"name": "byot-iccv2019", "deepest_ce_weight": 0.0}}, "deepest_ce_weight is 0.*regime='frozen'"),
    ],
)
def test_what_cannot_be_trained_is_refused(kwargs: dict[str, Any], message: str) -> None:
    model = kwargs.get("model", {})
    model = make_vit(**model) if isinstance(model, dict) else model
    loss = sd.SelfDistillationLoss.from_preset(**kwargs.get("loss", {"name": "byot-iccv2019"}))
    with pytest.raises(ValueError, match=message):
        sd.SelfDistillationTask(model, loss, regime=kwargs.get("regime", "joint"))


def test_what_can_be_trained_is_not_refused() -> None:
    make_task(make_vit(hint_adapter=True), "none")
    settings = {"deepest_ce_weight": 0.0, "deepest_kd_weight": 1.0, "teacher": "ensemble"}
    sd.SelfDistillationTask(make_vit(), sd.SelfDistillationLoss.from_preset("byot-iccv2019", **settings))
    loss = sd.SelfDistillationLoss.from_preset("byot-iccv2019", deepest_ce_weight=0.0)
    task = sd.SelfDistillationTask(make_vit(), loss, regime="frozen")
    task(*make_batch())["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_adaptive_clipping_leaves_out_exactly_the_classifiers() -> None:
    def names(task: sd.SelfDistillationTask, **kwargs: bool) -> set[str]:
        chosen = {id(p) for p in task.get_clip_parameters(**kwargs)}
        return {name for name, p in task.trainable_module.named_parameters() if id(p) in chosen}

    model = make_resnet(hint_adapter=True)
    task = make_task(model, "byot-tpami2021")
    everything = {name for name, _ in model.named_parameters()}
    exits = {f"heads.{index}.classifier.{kind}" for index in range(3) for kind in ("weight", "bias")}
    assert names(task) == everything
    assert everything - names(task, exclude_head=True) == exits | {"backbone.fc.weight", "backbone.fc.bias"}
    task = make_task(model, "byot-tpami2021", regime="frozen")
    assert names(task) == {name for name in everything if name.startswith("heads.")}
    assert names(task) - names(task, exclude_head=True) == exits


def test_loss_is_fp32_under_bf16_autocast() -> None:
    model = make_resnet()
    task = make_task(model)
    x, target = make_batch()
    exact = task(x, target)
    with torch.autocast("cpu", torch.bfloat16):
        result = task(x, target)
    assert result.pop("output").dtype == torch.bfloat16
    assert {value.dtype for value in result.values()} == {torch.float32}
    torch.testing.assert_close(result["loss"], exact["loss"], rtol=0.05, atol=0.05)
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# What two processes train: a model, its task's arguments, and the micro batches of each step.
DISTRIBUTED: dict[str, tuple[Callable[[], SelfDistillModel], dict[str, Any], int]] = {
    "byot-iccv2019": (make_resnet, {"preset": "byot-iccv2019"}, 1),
    "deep-supervision": (make_resnet, {"preset": "deep-supervision"}, 1),
    "none": (make_resnet, {"preset": "none"}, 1),
    # Runs the network twice a step.
    "cs-kd": (make_resnet, {"preset": "cs-kd"}, 1),
    "frozen": (make_resnet, {"preset": "byot-iccv2019", "regime": "frozen"}, 1),
    "vit byot-iccv2019": (make_vit, {"preset": "byot-iccv2019"}, 1),
    "vit byot-tpami2021": (lambda: make_vit(hint_adapter=True), {"preset": "byot-tpami2021"}, 1),
    "vit none": (make_vit, {"preset": "none"}, 1),
    "vit frozen": (make_vit, {"preset": "byot-iccv2019", "regime": "frozen"}, 1),
    "vit accumulation": (make_vit, {"preset": "byot-iccv2019"}, 2),
}
WORLD = 2
SHARE = 8


def train_case(case: str, rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """Train a case as one of some processes, and return the first gradients and the last state."""
    make, kwargs, micro_batches = DISTRIBUTED[case]
    model = make()
    task = make_task(model, **kwargs)
    if world > 1:
        task.prepare_distributed()
        assert isinstance(task.trainable_module, nn.parallel.DistributedDataParallel)
    task.train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    gradients = {}
    for step in range(4):
        x, target = make_batch(step, size=SHARE * WORLD)
        x, target = (tensor.chunk(world)[rank] for tensor in (x, target))
        parts = list(zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True))
        with task.no_sync():
            for part in parts[:-1]:
                (task(*part)["loss"] / micro_batches).backward()
        (task(*parts[-1])["loss"] / micro_batches).backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return {"gradients": gradients, "state": state_of(model), "saved": task.get_checkpoint_state()["state_dict"]}


def run_process(rank: int, folder: str) -> None:
    """Train every case as one of two processes and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for case in DISTRIBUTED:
        torch.save(train_case(case, rank, WORLD), f"{folder}/{case}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """A function that returns what both processes made of a case."""
    folder = str(tmp_path_factory.mktemp("distributed"))
    # Imported once for all processes.
    multiprocessing.set_forkserver_preload(["pytest", "timm", "timm_selfdistill.task", "timm_selfdistill.losses"])
    torch.multiprocessing.start_processes(run_process, args=(folder,), nprocs=WORLD, start_method="forkserver")
    return lambda case: [torch.load(f"{folder}/{case}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_processes_train_one_model(case: str, distributed: Callable[[str], list[dict[str, Any]]]) -> None:
    first, second = distributed(case)
    make = DISTRIBUTED[case][0]
    initial = state_of(make())
    parameters = [name for name, _ in make().named_parameters()]
    frozen = {"frozen": "backbone.", "none": "heads.", "cs-kd": "heads."}.get(case.split()[-1], "nothing")
    trained = {name for name in parameters if not name.startswith(frozen)}
    assert set(first["gradients"]) == trained
    assert same(first["gradients"], second["gradients"])
    for name in parameters:
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert torch.equal(first["state"][name], initial[name]) == (name not in trained), name
    if case == "frozen":
        unchanged = {n: v for n, v in initial.items() if n.startswith("backbone.")}
        assert same({n: v for n, v in first["state"].items() if n in unchanged}, unchanged)
    assert first["saved"].keys() == initial.keys()


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", [case for case in DISTRIBUTED if case.startswith("vit")])
def test_two_processes_equal_one_on_the_joint_batch(
    case: str, distributed: Callable[[str], list[dict[str, Any]]]
) -> None:
    alone = train_case(case, rank=0, world=1)
    together = distributed(case)[0]
    torch.testing.assert_close(together["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together["state"], alone["state"], rtol=1e-4, atol=1e-5)


# What a loss needs beyond output and target.


def test_the_average_of_the_weights_teaches_in_eval_mode_and_without_a_gradient() -> None:
    model, (x, target) = make_resnet(), make_batch()
    loss = sd.SelfDistillationLoss.from_preset("byot-iccv2019", teacher="ema", divergence="mse")
    task = sd.SelfDistillationTask(model, loss, verbose=False)
    with pytest.raises(ValueError, match=r"average of the weights: call task\.setup_ema\(\) first"):
        task(x, target)
    average = task.setup_ema(decay=0.5).module
    state = state_of(average)
    expected = average(x)
    task.train()
    assert model.training
    assert not average.training
    result = task(x, target)
    with torch.no_grad():
        # Batch norm answers for the batch as it did in the step.
        out = model(x, return_exits=True)
    for exit in range(3):
        torch.testing.assert_close(result[f"kd/{exit}"], (out.logits[exit] - expected).square().mean())
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in average.parameters())
    assert same(state_of(average), state)


def test_the_time_is_told_before_each_step() -> None:
    loss = sd.SelfDistillationLoss.from_preset("byot-iccv2019", kd_warmup_epochs=2)
    task, batch = sd.SelfDistillationTask(make_vit(), loss, verbose=False), make_batch()
    with pytest.raises(ValueError, match=r"call task\.set_time\(\) before each step"):
        task(*batch)
    losses = []
    for epoch in (0, 1, 2):
        task.set_time(epoch, 3)
        losses.append(task(*batch)["loss"].item())
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-2)


def test_needs_of_another_kind_are_refused() -> None:
    loss = sd.SelfDistillationLoss()
    loss.needs = {"ema"}
    with pytest.raises(ValueError, match=r"needs of SelfDistillationLoss is \{'ema'\}; allowed is a Needs"):
        sd.SelfDistillationTask(make_vit(), loss)
