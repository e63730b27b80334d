"""A teacher from outside: what it sees, what it teaches, and that it leaves no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.losses import OutsideTeacher, OutsideTeacherConfig, SelfDistillationLoss
from timm_selfdistill.recipe import Recipe, RecipeError, load_recipe
from timm_selfdistill.train import run as train_run
from timm_selfdistill.train import train
from timm_selfdistill.train.builders import build_teacher
from timm_selfdistill.train.checkpoint import load_checkpoint

STATISTICS = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


class Recorder(nn.Module):
    """A teacher that keeps what it is given, and answers by a linear layer, with batch norm and dropout."""

    def __init__(self, num_classes: int = 5, **config: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"input_size": (3, 24, 24), "interpolation": "bilinear", **STATISTICS, **config}
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, num_classes)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.fc(F.dropout(self.norm(x).mean((2, 3)), 0.5, self.training))


@pytest.fixture
def student(tiny_net: type[nn.Module]) -> sd.SelfDistillModel:
    torch.manual_seed(0)
    net = tiny_net()
    net.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.4,) * 3, "std": (0.2,) * 3}
    return sd.wrap(net, exits=["stage0", "stage1"], head="linear", image_size=32)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def make_task(student: sd.SelfDistillModel, teacher: nn.Module, preset: str = "byot-iccv2019", **settings: Any) -> Any:
    outside = OutsideTeacher(teacher, OutsideTeacherConfig(**settings))
    return sd.SelfDistillationTask(student, SelfDistillationLoss.from_preset(preset), teacher=outside, verbose=False)


def test_it_sees_the_students_images_as_its_own_configuration_wants_them(student: sd.SelfDistillModel) -> None:
    teacher = Recorder()
    images, target = batch()
    make_task(student, teacher)(images, target)
    plain = F.interpolate(images * 0.2 + 0.4, (24, 24), mode="bilinear", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    assert len(teacher.seen) == 1
    torch.testing.assert_close(teacher.seen[0], (plain - mean) / std)


def test_grey_images_are_seen_in_grey_and_equal_ones_as_they_are() -> None:
    grey = OutsideTeacher(Recorder(input_size=(3, 8, 8)), mean=(0.5,), std=(0.25,))
    images = torch.rand(2, 1, 8, 8)
    seen = grey.prepare(images)
    back = seen * torch.tensor(STATISTICS["std"]).view(1, 3, 1, 1) + torch.tensor(STATISTICS["mean"]).view(1, 3, 1, 1)
    torch.testing.assert_close(back, (images * 0.25 + 0.5).expand(-1, 3, -1, -1))
    same = OutsideTeacher(Recorder(input_size=(3, 8, 8)), **STATISTICS)
    assert same.prepare(seen) is seen
    with pytest.raises(ValueError, match=r"3 numbers of a mean .* do not fit images of 1 channels"):
        same.prepare(images)
    with pytest.raises(ValueError, match=r"give mean and std, or call expect\(\)"):
        OutsideTeacher(Recorder()).prepare(images)


@pytest.mark.parametrize(("teaches", "taught"), [("both", (0, 1, 2)), ("exits", (0, 1)), ("backbone", (2,))])
def test_it_adds_a_divergence_for_each_that_it_teaches(
    student: sd.SelfDistillModel, teaches: str, taught: tuple[int, ...]
) -> None:
    task = make_task(student, Recorder(), teaches=teaches, weight=0.3, temperature=2.0)
    images, target = batch()
    result = task(images, target)
    own = SelfDistillationLoss("byot-iccv2019")(student(images, return_exits=True), target)
    logits = student(images, return_exits=True).logits
    wanted = F.log_softmax(task.teacher.answer(images) / 2, -1)
    terms = {
        index: 4 * F.kl_div(F.log_softmax(logits[index] / 2, -1), wanted, reduction="batchmean", log_target=True)
        for index in taught
    }
    assert {name for name in result if name.startswith("teacher")} == {f"teacher/{index}" for index in taught}
    for index, term in terms.items():
        torch.testing.assert_close(result[f"teacher/{index}"], term.detach())
    torch.testing.assert_close(result["loss"], own["loss"] + 0.3 * sum(terms.values()))


def test_it_is_frozen_and_no_part_of_the_task(student: sd.SelfDistillModel) -> None:
    teacher = Recorder()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = make_task(student, teacher)
    task.setup_ema(decay=0.5)
    task.train()
    teacher.train()
    task(*batch())["loss"].backward()
    assert not teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher not in list(task.modules())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in task.parameters()}
    assert not any("teacher" in name or "fc" in name.split(".")[:1] for name in task.state_dict())
    assert "teacher" not in task.get_task_state()


def test_it_runs_under_the_autocast_of_the_step(student: sd.SelfDistillModel) -> None:
    task = make_task(student, Recorder())
    dtypes = []
    task.teacher.model.fc.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert task(*batch())["teacher/0"].dtype == torch.float32
    assert dtypes == [torch.bfloat16]


def test_it_teaches_a_plain_network(student: sd.SelfDistillModel) -> None:
    task = make_task(student, Recorder(), preset="none", teaches="backbone")
    result = task(*batch())
    assert set(result) == {"loss", "ce/0", "teacher/0", "output"}


@pytest.mark.parametrize(
    ("teacher", "settings", "kwargs", "message"),
    [
        (Recorder(7), {}, {}, "The teacher has 7 classes and the student 5: it must be a model of the same classes"),
        (Recorder(), {}, {"preset": "none"}, "teaches exits, which this loss does not run; allowed is teaches='back"),
        (Recorder(), {"teaches": "all"}, {}, "teaches is 'all'; allowed is 'exits', 'backbone' or 'both'"),
        (Recorder(), {"divergence": "l1"}, {}, "Unknown divergence 'l1'"),
        (Recorder(), {"weight": 0.0}, {}, "weight is 0.0; allowed is a finite number above 0"),
    ],
)
def test_what_cannot_teach_is_refused(
    student: sd.SelfDistillModel, teacher: nn.Module, settings: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(student, teacher, **settings, **kwargs)


def test_other_names_of_classes_the_student_itself_and_a_frozen_backbone_are_refused(
    student: sd.SelfDistillModel,
) -> None:
    named = OutsideTeacher(Recorder(label_names=["ant", "bee", "cow", "dog", "elk"]))
    named.check_classes(5)
    named.check_classes(5, ("ant", "bee", "cow", "dog", "elk"))
    with pytest.raises(ValueError, match="Class 1 is 'bee' for the teacher and 'bat' for the student"):
        named.check_classes(5, ("ant", "bat", "cow", "dog", "elk"))
    with pytest.raises(ValueError, match="The teacher is the student itself"):
        make_task(student, student)
    loss = SelfDistillationLoss()
    with pytest.raises(ValueError, match="teaches the backbone, which is frozen; allowed is teaches='exits'"):
        sd.SelfDistillationTask(student, loss, regime="frozen", teacher=OutsideTeacher(Recorder()), verbose=False)


# In a recipe.

SMALL = (
    *("epochs=1", "batch_size=16", "data.max_train=32", "data.max_eval=20", "data.image_size=16", "data.validation=0"),
    "model.kwargs={in_chans: 1, channels: [8, 8, 16, 16]}",
    *("precision='no'", "baseline=false", "exits.head=linear"),
)


def small(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of timm's test_resnet for ten classes, of images of any size."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(3)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return path


def test_a_run_learns_from_a_timm_model_with_weights_in_a_file(tmp_path: Path, weights: Path) -> None:
    cfg = f"{{file: {weights}, num_classes: 10, input_size: [3, 24, 24]}}"
    teacher = f"{{name: test_resnet, weight: 0.5, kwargs: {{pretrained_cfg_overlay: {cfg}}}}}"
    recipe = small(tmp_path / "run", f"teacher={teacher}")
    built = build_teacher(recipe)
    assert built is not None
    own = safetensors.torch.load_file(weights)
    assert all(torch.equal(own[name], value) for name, value in built.model.state_dict().items())
    assert built.data_config["input_size"] == (3, 24, 24)
    train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {f"self-distilled/train/teacher/{index}" for index in range(3)} <= set(lines[0])
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert str(weights.parent) not in (tmp_path / "run" / "recipe.yaml").read_text()
    sd.from_pretrained(tmp_path / "run" / "model")
    checkpoint = load_checkpoint(next((tmp_path / "run" / "checkpoints" / "self-distilled").iterdir()))
    assert {name.split(".")[0] for name in checkpoint["model"]} == {"backbone", "heads"}
    assert "teacher" not in checkpoint


def test_a_folder_of_this_library_and_one_of_timms_are_teachers(tmp_path: Path, make_backbone: Any) -> None:
    ours = sd.wrap(make_backbone("resnet18", num_classes=10), image_size=32).eval()
    sd.save_pretrained(ours, tmp_path / "ours", label_names=[f"digit {n}" for n in range(10)])
    teacher = build_teacher(small(tmp_path, f"teacher={{name: {tmp_path / 'ours'}, teaches: exits}}"))
    assert teacher is not None
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher.model(x), ours(x).detach())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    del config["timm_selfdistill"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    plain = build_teacher(small(tmp_path, f"teacher={{name: {tmp_path / 'ours'}}}"))
    assert plain is not None
    assert not isinstance(plain.model, sd.SelfDistillModel)
    assert torch.equal(plain.model(x), ours(x).detach())
    with pytest.raises(ValueError, match="Class 0 is 'digit 0' for the teacher and '0' for the student"):
        train(small(tmp_path / "run", f"teacher={{name: {tmp_path / 'ours'}}}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.num_classes=12",), "teacher: The teacher has 10 classes and the student 12"),
        (("loss.preset=none",), "teacher.teaches: must be backbone for this loss, which does not run the exits"),
        (("schedule.regime=frozen",), "teacher.teaches: must be exits where the backbone is frozen"),
        (("teacher.divergence=l1",), "teacher.divergence: unknown, received 'l1'"),
        (("teacher.name=no_such_net",), "teacher.name: must be the name of a timm model, received 'no_such_net'"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_data_is_opened(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(train_run, "open_dataset", lambda *args: pytest.fail("opened"))
    teacher = f"{{name: test_resnet, kwargs: {{pretrained_cfg_overlay: {{file: {weights}, num_classes: 10}}}}}}"
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path, f"teacher={teacher}", *overrides))


def test_its_section_is_checked_as_the_others_are() -> None:
    assert load_recipe("digits").teacher is None
    with pytest.raises(RecipeError, match=r"teacher\.name: is required\n  teacher\.temperature: must be gr"):
        load_recipe("digits", ["teacher={temperature: 0}"])
