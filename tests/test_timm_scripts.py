"""What timm's train.py and validate.py call on a model, called on a wrapped one."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config, resolve_model_data_config
from timm.data.model_config import resolve_input_data_config
from timm.layers import apply_test_time_pool, convert_sync_batchnorm
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    accuracy,
    dispatch_clip_grad,
    freeze,
    get_state_dict,
    reparameterize_model,
    unfreeze,
    unwrap_model,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_selfdistill as sd
from timm_selfdistill.model import ExitOutput, SelfDistillModel

PAGE = Path(__file__).parents[1] / "docs" / "timm.md"
SIZE = 64
CLASSES = 4


def wrapped(make_backbone, name: str, **kwargs: Any) -> SelfDistillModel:
    return sd.wrap(make_backbone(name, **kwargs), image_size=SIZE)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(one: ExitOutput, other: ExitOutput) -> None:
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def loaders(tmp_path_factory, make_image_folder) -> tuple[DataLoader, DataLoader]:
    """timm's loaders of 32 images for training and 20 for validation."""
    root = make_image_folder(tmp_path_factory.mktemp("images") / "images", CLASSES)
    common = {"input_size": (3, 32, 32), "batch_size": 8, "num_workers": 0, "device": torch.device("cpu")}
    train = create_dataset("", root=str(root), split="train", is_training=True)
    validation = create_dataset("", root=str(root), split="validation")
    return (
        create_loader(train, is_training=True, no_aug=True, **common),
        create_loader(validation, crop_pct=1.0, **common),
    )


def documented_lines() -> list[str]:
    """The lines that the page adds to train.py."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert not re.search(r"^-", diff, re.M)
    return [line.removeprefix("+").strip() for line in diff.splitlines() if line.startswith("+")]


class TrainScript:
    """The course of timm's train.py with the documented lines in it."""

    def __init__(self, loaders: tuple[DataLoader, DataLoader], folder: Path, seed: int, resume: str = "") -> None:
        import_line, wrap_line, task_line = documented_lines()
        self.loader, self.loader_eval = loaders
        torch.manual_seed(seed)
        names: dict[str, Any] = {"device": torch.device("cpu"), "model_dtype": None}
        exec(import_line, names)
        names["model"] = timm.create_model("resnet18", num_classes=CLASSES, channels=(8, 16, 24, 32))
        exec(wrap_line, names)
        model = names["model"]
        model.get_classifier().weight.data.mul_(0.5)
        model.set_grad_checkpointing(enable=True)
        assert resolve_data_config({"img_size": 32}, model=model)["input_size"] == (3, 32, 32)
        model.to(device=names["device"], dtype=None)
        model.to(memory_format=torch.channels_last)
        exec(task_line, names)
        self.task = names["task"]

        model = self.task.get_trainable_module()
        self.eval_model = self.task.get_eval_model()
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.05, layer_decay=0.8)
        self.start_epoch = 0
        if resume:
            self.start_epoch = resume_task_checkpoint(self.task, resume, optimizer=self.optimizer)
        self.task.setup_ema(decay=0.6, use_warmup=False, device=None)
        if resume:
            load_task_ema_checkpoint(self.task, resume)
        self.evaluator = self.task.create_evaluator(max_samples=evaluation_sample_limit(self.loader_eval))
        folder.mkdir(exist_ok=True)
        self.saver = CheckpointSaver(
            model=model,
            optimizer=self.optimizer,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=False,
            max_history=2,
            task=self.task,
        )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=4, updates_per_epoch=len(self.loader)
        )
        if self.start_epoch > 0:
            self.scheduler.step(self.start_epoch)

    def train(self, epoch: int) -> float:
        """Train an epoch as train_one_epoch does, and return the last step's loss."""
        torch.manual_seed(epoch)
        step = epoch * len(self.loader)
        self.task.get_trainable_module().train()
        self.optimizer.zero_grad()
        for input, target in self.loader:
            input = input.contiguous(memory_format=torch.channels_last)
            loss = self.task(input, target)["loss"]
            loss.backward()
            dispatch_clip_grad(self.task.get_clip_parameters(exclude_head=True), value=0.2, mode="agc")
            self.optimizer.step()
            step += 1
            self.optimizer.zero_grad()
            self.task.update_ema(step=step)
            self.scheduler.step_update(num_updates=step)
        metrics = [self.validate(self.eval_model), self.validate(self.task.get_eval_model(ema=True))]
        self.saver.save_checkpoint(epoch, metric=metrics[1]["top1"])
        self.scheduler.step(epoch + 1, metrics[1]["top1"])
        self.metrics = metrics
        return loss.item()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Evaluate as train.py does."""
        self.evaluator.reset()
        model.eval()
        with torch.inference_mode():
            for input, target in self.loader_eval:
                output = model(input)
                assert isinstance(output, Tensor)
                self.evaluator.update(output, target)
        assert self.evaluator.num_samples == 20
        return self.evaluator.compute()


def validate_script(model: nn.Module, loader: DataLoader) -> tuple[float, float, float]:
    """Evaluate as validate.py does: loss, top-1 and top-5."""
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            output = model(input)
            acc1, acc5 = accuracy(output.detach(), target, topk=(1, 5))
            losses.update(F.cross_entropy(output, target).item(), output.shape[0])
            top1.update(acc1.item(), output.shape[0])
            top5.update(acc5.item(), output.shape[0])
    return losses.avg, top1.avg, top5.avg


def test_the_documented_lines_turn_train_py_into_self_distillation(loaders, tmp_path):
    run = TrainScript(loaders, tmp_path / "run", seed=0)
    assert isinstance(run.task, sd.SelfDistillationTask)
    before = state_of(run.task.get_trainable_module())
    losses = [run.train(epoch) for epoch in range(2)]
    changed = set(differing(before, state_of(run.task.get_trainable_module())))
    assert changed == set(before)
    checkpoint = shutil.copy(tmp_path / "run" / "last.pth.tar", tmp_path)
    saved = state_of(run.task.get_trainable_module()), state_of(unwrap_model(run.task.get_trainable_module(ema=True)))
    losses += [run.train(epoch) for epoch in range(2, run.epochs)]
    assert losses[-1] < 0.8 * losses[0]
    assert run.metrics[0]["top1"] > 50  # of four classes

    resumed = TrainScript(loaders, tmp_path / "resumed", seed=1, resume=str(checkpoint))
    assert resumed.start_epoch == 2
    assert differing(state_of(resumed.task.get_trainable_module()), saved[0]) == []
    assert differing(state_of(unwrap_model(resumed.task.get_trainable_module(ema=True))), saved[1]) == []
    assert [resumed.train(epoch) for epoch in range(2, run.epochs)] == losses[2:]
    assert resumed.metrics == run.metrics


@pytest.mark.parametrize("use_ema", [False, True])
def test_validate_py_loads_and_evaluates_what_train_py_saved(loaders, tmp_path, use_ema):
    run = TrainScript(loaders, tmp_path / "run", seed=0)
    run.train(0)
    model = sd.wrap(timm.create_model("resnet18", num_classes=CLASSES, channels=(8, 16, 24, 32)))
    load_checkpoint(model, str(tmp_path / "run" / "last.pth.tar"), use_ema)
    assert differing(state_of(model), state_of(unwrap_model(run.task.get_eval_model(ema=use_ema)))) == []
    data_config = resolve_input_data_config(model, {"img_size": 32}, use_test_size=True)
    model, test_time_pool = apply_test_time_pool(model, data_config)
    assert not test_time_pool
    loss, top1, _ = validate_script(model, loaders[1])
    expected = run.metrics[int(use_ema)]
    assert (loss, top1) == (pytest.approx(expected["loss"], rel=1e-4), pytest.approx(expected["top1"]))
    plain = timm.create_model(f"local-dir:{sd.save_pretrained(model, tmp_path / 'saved')}", pretrained=True)
    assert validate_script(plain, loaders[1]) == validate_script(model, loaders[1])


def test_test_time_pooling_is_refused_by_name(make_backbone):
    model = wrapped(make_backbone, "resnet18")
    with pytest.raises(ValueError, match=r"call reset_classifier on model\.backbone"):
        apply_test_time_pool(model, {"input_size": (3, 288, 288)})


@pytest.mark.parametrize(
    "args", [{}, {"img_size": SIZE}, {"mean": (0.5,), "crop_pct": 0.8, "interpolation": "bilinear"}]
)
@pytest.mark.parametrize("use_test_size", [False, True])
def test_data_config_is_that_of_the_backbone(make_backbone, family, args, use_test_size):
    model = wrapped(make_backbone, family)
    for resolve in (resolve_model_data_config, resolve_input_data_config):
        expected = resolve(model.backbone, args, use_test_size=use_test_size)
        assert resolve(model, args, use_test_size=use_test_size) == expected
    assert resolve_data_config(args, model=model, use_test_size=use_test_size) == resolve_data_config(
        args, model=model.backbone, use_test_size=use_test_size
    )


def test_channels_of_the_images_are_those_of_the_backbone(make_backbone):
    model = sd.wrap(make_backbone("vit_tiny_patch16_224", in_chans=1))
    assert resolve_input_data_config(model)["input_size"] == (1, SIZE, SIZE)
    with pytest.raises(ValueError, match="Requested 3 input channels"):
        resolve_input_data_config(model, {"in_chans": 3})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"opt": "sgd", "weight_decay": 2e-5},
        {"opt": "adamw", "weight_decay": 0.05, "layer_decay": 0.7},
        {"opt": "muon", "weight_decay": 0.05},
        {"opt": "lamb", "weight_decay": 0.0},
    ],
    ids=lambda kwargs: kwargs["opt"],
)
def test_optimizer_gets_every_parameter_once(make_backbone, family, kwargs):
    model = wrapped(make_backbone, family)
    optimizer = create_optimizer_v2(model, lr=0.1, **kwargs)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_ema_and_saver_without_a_task(make_backbone, family, images, tmp_path):
    model = wrapped(make_backbone, family)
    model(images, return_exits=True)
    ema = ModelEmaV3(model, decay=0.5)
    before = state_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    name = "heads.0.classifier.weight"
    torch.testing.assert_close(get_state_dict(ema)[name], before[name] + 0.5)
    assert unwrap_model(ema) is ema.module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = str(tmp_path)
    CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder).save_checkpoint(0)
    for use_ema, source in ((False, model), (True, ema.module)):
        loaded = wrapped(make_backbone, family, seed=1)
        load_checkpoint(loaded, str(tmp_path / "last.pth.tar"), use_ema)
        assert differing(state_of(loaded), state_of(source)) == []


def test_freeze_leaves_the_rest_of_the_task_training(make_backbone, images):
    model = wrapped(make_backbone, "resnet18")
    task = sd.SelfDistillationTask(model, verbose=False)
    frozen = ["backbone.conv1", "backbone.bn1", "backbone.layer1"]
    freeze(model, frozen)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1)
    before = state_of(model)
    task.train()(images, torch.arange(4))["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    frozen_state = {name for name in before if name.startswith(tuple(f"{name}." for name in frozen))}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert frozen_state.isdisjoint(differing(before, state_of(model)))
    assert trained == {name for name, _ in model.named_parameters()} - frozen_state
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.layer1.modules())


def test_synchronised_batch_norm_changes_no_logit(make_backbone, images):
    model = wrapped(make_backbone, "resnet18").eval()
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert_close(converted(images, return_exits=True), model(images, return_exits=True))


@pytest.mark.parametrize("name", ["repvgg_a0", "repvit_m0_9"])
def test_reparameterized_model_answers_as_before(make_backbone, images, name):
    model = wrapped(make_backbone, name).eval()
    out = model(images, return_exits=True)
    fused = reparameterize_model(model)
    assert len(fused.state_dict()) < len(model.state_dict())
    torch.testing.assert_close(fused(images), out.logits[-1], rtol=1e-4, atol=1e-4)
    for index in range(model.num_exits):
        torch.testing.assert_close(fused.forward_exit(images, index), out.logits[index], rtol=1e-4, atol=1e-4)
    assert_close(model(images, return_exits=True), out)
