"""torchdistill trains wrapped models from the shipped configurations, by its own boxes, losses and loaders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.datasets
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.data.transforms import InputConfig, eval_transform
from timm_selfdistill.metrics import ExitMetrics
from timm_selfdistill.recipe import load_recipe

pytest.importorskip("torchdistill")
import torchdistill_run as run
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_mid_level_loss
from torchdistill.models.registry import MODEL_DICT

from timm_selfdistill.plugins import torchdistill as plugin

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = sorted(path.stem for path in run.RECIPES.iterdir())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def digits_run(tmp_path, monkeypatch):
    """A working directory in which `timm-selfdistill train digits` has run, as far as the configurations see."""
    settings = load_recipe("digits").model
    model = sd.wrap(settings.name, num_classes=10, image_size=32, model_kwargs=settings.kwargs)
    sd.save_pretrained(model, tmp_path / "runs" / "digits" / "model")
    monkeypatch.chdir(tmp_path)
    return model.eval()


def loss(**kwargs):
    return get_mid_level_loss({"key": "timm_selfdistill.loss", "kwargs": kwargs})


def first_batch(box):
    images, targets, _ = next(iter(box.train_data_loader))
    return images, targets


def test_a_shipped_configuration_trains_and_is_evaluated_by_torchdistill():
    config = run.load_config("digits")
    box = run.build_box(config)
    before = run.parameters_of(box.model)
    losses = run.train(box, 20)
    after = run.parameters_of(box.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert {name.split(".")[1] for name in after if name.startswith("heads.")} == {"0", "1", "2"}
    assert len(losses) == 20
    assert torch.tensor(losses).isfinite().all()
    assert max(losses[-3:]) < 0.7 * min(losses[:3])

    top1, count = run.evaluate(box.model, config)
    metrics = ExitMetrics(4)
    data = config["datasets"]["digits/test"]
    with torch.inference_mode():
        for first in range(0, len(data), 60):
            images, targets = zip(*(data[index] for index in range(first, first + 60)), strict=True)
            metrics.update(box.model(torch.stack(images), return_exits=True), torch.tensor(targets))
    assert count == len(data) == 360
    assert top1 == pytest.approx(metrics.compute()["exits"][-1]["top1"], abs=1e-3)


def test_the_loss_is_this_librarys():
    box = run.build_box(run.load_config("digits"))
    images, targets = first_batch(box)
    box.pre_epoch_process(epoch=0)
    out = box.org_model(images, return_exits=True)
    assert torch.equal(box.forward_process(images, targets), sd.SelfDistillationLoss()(out, targets)["loss"])

    io = {".": {"output": out}}
    changed = sd.SelfDistillationLoss.from_preset("byot-tpami2021", kd_weight=0.5)(out, targets)["loss"]
    assert torch.equal(loss(preset="byot-tpami2021", kd_weight=0.5)(io, {}, targets), changed)
    # The baseline does not need the exits: torchdistill's own forward process will do.
    plain = F.cross_entropy(out.logits[-1], targets)
    assert torch.allclose(loss(preset="none")({".": {"output": out.logits[-1]}}, {}, targets), plain)


@pytest.mark.multiprocess
def test_two_processes_under_accelerate_end_with_the_same_weights(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", run.__file__, "digits", "3", str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(result["wrapped"] == "DistributedDataParallel" and result["still"] == [] for result in results)
    assert results[0]["losses"] != results[1]["losses"], "both processes saw the same images"
    assert [result["count"] for result in results] == [360, 360]
    assert results[0]["top1"] == results[1]["top1"]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert any(name.startswith("heads.") for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_an_exit_is_taught_by_a_plain_timm_model(digits_run):
    box = run.build_box(run.load_config("digits-exit-taught"))
    assert type(box.teacher_model) is timm.models.ResNet
    images, targets = first_batch(box)
    box.pre_epoch_process(epoch=0)
    with torch.no_grad():
        teacher = digits_run(images)
    out = box.org_student_model(images, return_exits=True)
    taught = 16 * F.kl_div(F.log_softmax(out.logits[0] / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    expected = sd.SelfDistillationLoss()(out, targets)["loss"] + 0.1 * taught
    assert torch.allclose(box.forward_process(images, targets), expected)

    before, frozen = run.parameters_of(box.student_model), digits_run.backbone.state_dict()
    run.train(box, 3)
    after = run.parameters_of(box.student_model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(torch.equal(value, frozen[name]) for name, value in box.teacher_model.state_dict().items())


def test_an_exit_teaches_a_plain_timm_model(digits_run):
    box = run.build_box(run.load_config("digits-exit-teaches"))
    assert type(box.student_model) is timm.models.ResNet
    images, targets = first_batch(box)
    box.pre_epoch_process(epoch=0)
    with torch.no_grad():
        teacher = digits_run.forward_exit(images, 2)
    logits = box.org_student_model(images)
    taught = 16 * F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(logits, targets) + 0.5 * taught
    assert torch.allclose(box.forward_process(images, targets), expected)

    before, frozen = run.parameters_of(box.student_model), digits_run.state_dict()
    run.train(box, 3)
    after = run.parameters_of(box.student_model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(torch.equal(value, frozen[name]) for name, value in box.teacher_model.state_dict().items())


@pytest.mark.usefixtures("digits_run")
def test_a_frozen_teacher_under_accelerate_needs_the_line_of_the_page():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    try:
        with pytest.raises(AttributeError, match="use_fp16"):
            run.build_box(run.load_config("digits-exit-taught"), accelerator)
        accelerator.state.use_fp16 = False
        box = run.build_box(run.load_config("digits-exit-taught"), accelerator)
        assert torch.tensor(run.train(box, 1)).isfinite().all()
    finally:
        AcceleratorState._reset_state(True)


def test_paths_of_the_page_name_what_the_exits_return():
    config = run.load_config("digits")
    paths = [f"heads.{index}.{part}" for index in range(3) for part in ("classifier", "adapter")]
    config["train"]["model"]["forward_hook"] = {"input": [], "output": ["backbone", *paths]}
    seen = {}
    box = run.build_box(config)
    box.criterion = lambda io_dict, *_: seen.update(io_dict["student"])
    box.forward_process(*first_batch(box))
    out = seen["."]["output"]
    assert seen["backbone"]["output"] is out.logits[-1]
    assert all(seen[f"heads.{index}.classifier"]["output"] is out.logits[index] for index in range(3))
    assert all(seen[f"heads.{index}.adapter"]["output"] is out.features[index] for index in range(3))


class SomeImages(torchvision.datasets.VisionDataset):
    """Sixty images where torchvision would download CIFAR-100."""

    def __init__(self, root, train, download, transform=None):
        super().__init__(root, transform=transform)

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.transform(Image.new("RGB", (32, 32), (index, 2 * index, 4 * index))), index


def test_the_cifar_configuration_builds_with_the_recipes_hyperparameters(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", SomeImages)
    config = run.load_config("cifar100-resnet18")
    box = run.build_box(config)
    recipe = load_recipe("cifar100-resnet18")
    group = box.optimizer.param_groups[0]
    assert [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")] == [
        recipe.optimizer.lr,
        recipe.optimizer.momentum,
        recipe.optimizer.weight_decay,
        False,
    ]
    assert sorted(box.lr_scheduler.milestones) == list(recipe.schedule.decay_milestones)
    assert box.lr_scheduler.gamma == recipe.schedule.decay_rate
    assert (box.num_epochs, box.train_data_loader.batch_size) == (recipe.epochs, recipe.batch_size)
    assert [len(config["datasets"][f"cifar100/{part}"]) for part in ("train", "val", "test")] == [54, 6, 60]
    samples = [config["datasets"]["cifar100/train"][index] for index in range(2)]
    images, targets = torch.stack([image for image, _ in samples]), torch.tensor([target for _, target in samples])
    assert box.org_model.backbone.conv1.stride == (1, 1)
    assert box.forward_process(images, targets).isfinite()


def test_digits_are_those_of_the_recipe():
    recipe = load_recipe("digits")
    input = InputConfig.from_model(timm.create_model(recipe.model.name, **recipe.model.kwargs), recipe.data)
    datasets = run.load_config("digits")["datasets"]
    assert [len(data) for data in datasets.values()] == [1293, 144, 360]
    bare = plugin.ImageDataset("eval", {"path": "digits"}, channels=1)
    image, target = bare[7]
    expected, label = datasets["digits/test"][7]
    assert torch.equal(eval_transform(input)(image), expected)
    assert target == label == bare.targets[7]
    assert bare.classes == [str(digit) for digit in range(10)]
    assert plugin.ImageDataset("eval", {"path": "digits"})[7][0].mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "test"}, "part is 'test'; allowed are train, validation, eval"),
        ({"channels": 2}, "channels is 2; allowed are 1, 3, 4"),
        ({"data": {"path": "digits", "image_size": 32, "streaming": True}}, "data has the keys image_size, streaming"),
        ({"data": {"path": "digits", "validation": 2}}, "validation"),
        ({"part": "validation", "data": {"path": "digits", "validation": 0}}, "data.validation is 0"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.ImageDataset(**{"part": "train", "data": {"path": "digits"}, **arguments})


def test_an_output_without_exits_is_refused():
    with pytest.raises(ValueError, match=r"returned a Tensor: .* forward_proc timm_selfdistill\.forward_exits"):
        loss()({".": {"output": torch.zeros(2, 10)}}, {}, torch.zeros(2, dtype=torch.int64))


def test_unknown_settings_of_the_loss_are_refused():
    with pytest.raises(ValueError, match="Unknown settings kd; known are"):
        loss(kd=1)
    with pytest.raises(ValueError, match="kd_weight is '1e-3'"):  # as PyYAML reads 1e-3
        loss(kd_weight="1e-3")
    with pytest.raises(ValueError, match=r"Needs\(ema=True.*which torchdistill does not provide"):
        loss(teacher="ema")
    with pytest.raises(ValueError, match=r"gate=0\.5.*which torchdistill does not provide"):
        loss(gate=0.5)
    loss(teacher="ensemble", deepest_kd_weight=0.5)


def test_another_packages_loss_is_found_by_its_name_and_must_have_no_parameters(monkeypatch):
    monkeypatch.setattr(sd.losses.get_loss.__self__, "_entries", {})

    @sd.register_loss("mean-square")
    class MeanSquare(nn.Module):
        needs_exits = True

        def __init__(self, weight=1.0, trained=False):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weight)) if trained else weight

        def forward(self, out, target):
            return {"loss": self.weight * torch.stack(out.logits).square().mean()}

    out = sd.ExitOutput((torch.ones(2, 3), torch.ones(2, 3)), ())
    assert loss(name="mean-square", weight=4.0)({".": {"output": out}}, {}, torch.zeros(2)) == 4
    with pytest.raises(ValueError, match="'mean-square' has parameters, which torchdistill would not train"):
        loss(name="mean-square", trained=True)


REGISTRIES = """
import torchdistill.core.distillation, torchdistill.core.training
from torchdistill.core.interfaces import registry as processes
from torchdistill.datasets import registry as datasets
from torchdistill.losses import registry as losses
from torchdistill.models import official, registry as models
from torchdistill.optim import registry as optim

def registries():
    modules = (processes, datasets, losses, models, official, optim)
    names = [(module, name) for module in modules for name in vars(module) if name.endswith("_DICT")]
    return {(module.__name__, name): dict(getattr(module, name)) for module, name in names}
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_torchdistills_is_overwritten():
    code = f"""{REGISTRIES}
before = registries()
assert sum(map(len, before.values())) > 300
from importlib import reload
from timm_selfdistill.plugins import torchdistill as plugin
reload(plugin)
for place, entries in registries().items():
    assert all(entries[key] is before[place][key] for key in before[place]), place
    print(*(f"{{place[1]}}:{{key}}" for key in entries.keys() - before[place].keys()))
"""
    assert sorted(python(code).split()) == [
        "FORWARD_PROC_FUNC_DICT:timm_selfdistill.forward_exits",
        "MIDDLE_LEVEL_LOSS_DICT:timm_selfdistill.loss",
        "MODEL_DICT:timm_selfdistill.create_model",
        "MODEL_DICT:timm_selfdistill.from_pretrained",
        "MODEL_DICT:timm_selfdistill.wrap",
        "PRE_EPOCH_PROC_FUNC_DICT:timm_selfdistill.eval_teacher",
    ]


def test_a_taken_key_is_refused_and_nothing_registered(monkeypatch):
    def theirs():
        """Another package's model."""

    monkeypatch.setitem(MODEL_DICT, "timm_selfdistill.create_model", theirs)
    monkeypatch.delitem(MODEL_DICT, "timm_selfdistill.wrap")
    monkeypatch.delitem(MIDDLE_LEVEL_LOSS_DICT, "timm_selfdistill.loss")
    with pytest.raises(ValueError, match=r"'timm_selfdistill\.create_model' is taken by test_torchdistill\..*theirs"):
        plugin.register()
    assert MODEL_DICT["timm_selfdistill.create_model"] is theirs
    assert "timm_selfdistill.wrap" not in MODEL_DICT
    assert "timm_selfdistill.loss" not in MIDDLE_LEVEL_LOSS_DICT


def test_without_torchdistill_the_error_names_the_extra():
    code = """
import sys
sys.modules["torchdistill"] = None
try:
    import timm_selfdistill.plugins.torchdistill
except ImportError as error:
    print(error)
"""
    assert "pip install 'timm_selfdistill[torchdistill]'" in python(code)


def test_the_page_names_every_key_and_configuration():
    page = (ROOT / "docs" / "torchdistill.md").read_text()
    keys = {key for _, key, _ in plugin._ENTRIES}
    assert set(re.findall(r"^\| `timm_selfdistill\.(\w+)` \|", page, re.M)) == keys
    assert sorted(re.findall(r"^\| `([\w-]+)\.yaml` \|", page, re.M)) == CONFIGURATIONS
