"""transformers: its Trainer trains a wrapped model, and its timm wrapper loads what is saved."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import timm_selfdistill as sd
from timm_selfdistill.plugins.transformers import TrainerModel, exit_accuracy

transformers = pytest.importorskip("transformers")


def tiny() -> sd.SelfDistillModel:
    torch.manual_seed(0)
    return sd.wrap("test_resnet", num_classes=3, image_size=32)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(12)]


def arguments(folder: Path, **changes: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 0.01, **changes}
    return transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2, **settings
    )


def test_the_loss_is_the_task_s_in_train_mode_and_the_backbones_in_eval_mode(rows: list[dict[str, Any]]) -> None:
    model = tiny()
    images = torch.stack([row["pixel_values"] for row in rows[:4]])
    labels = torch.tensor([row["labels"] for row in rows[:4]])
    train = TrainerModel(model).train()
    out = model(images, return_exits=True)
    assert train(images, labels)["loss"].item() == pytest.approx(sd.SelfDistillationLoss()(out, labels)["loss"].item())
    evaluated = train.eval()(images, labels)
    out = model(images, return_exits=True)
    assert evaluated["loss"].item() == pytest.approx(F.cross_entropy(out.logits[-1], labels).item())
    assert torch.equal(evaluated["exit_logits"], torch.stack(out.logits[:-1], 1))
    assert set(train(images)) == {"logits", "exit_logits"}


def test_accuracy_of_each_exit() -> None:
    logits = np.eye(3)[[0, 1, 2, 0]]
    exits = np.eye(3)[[[0, 0], [1, 0], [0, 0], [1, 0]]]
    found = exit_accuracy(SimpleNamespace(predictions=(logits, exits), label_ids=np.array([0, 1, 2, 1])))
    assert found == {"accuracy": 0.75, "accuracy_exit_0": 0.75, "accuracy_exit_1": 0.25}


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    def trainer(folder: str) -> Any:
        return transformers.Trainer(
            TrainerModel(tiny()),
            arguments(tmp_path / folder),
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=exit_accuracy,
        )

    whole = trainer("whole")
    whole.train()
    metrics = whole.evaluate()
    assert {"eval_accuracy", "eval_accuracy_exit_0", "eval_loss"} <= metrics.keys()
    assert not torch.equal(tiny().backbone.conv1[0].weight, whole.model.model.backbone.conv1[0].weight)

    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.model.state_dict()
    found = resumed.model.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    sd.save_pretrained(whole.model.model.eval(), tmp_path / "saved", label_names=["a", "b", "c"])
    images = torch.stack([row["pixel_values"] for row in rows[:2]])
    with torch.no_grad():
        logits = whole.model.model(images)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(theirs(images).logits, logits)
        torch.testing.assert_close(sd.from_pretrained(tmp_path / "saved")(images), logits)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    classify = transformers.pipeline("image-classification", model=theirs, image_processor=processor)
    answers = classify(Image.new("RGB", (40, 40)), top_k=3)
    assert {answer["label"] for answer in answers} == {"a", "b", "c"}


def test_gradient_checkpointing_gives_the_same_gradients(rows: list[dict[str, Any]]) -> None:
    images = torch.stack([row["pixel_values"] for row in rows[:4]])
    labels = torch.tensor([row["labels"] for row in rows[:4]])
    gradients = []
    for checkpoint in (False, True):
        model = TrainerModel(tiny()).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        model(images, labels)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(torch.allclose(value, checkpointed[name], atol=1e-6) for name, value in plain.items())
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": False})


def test_a_loss_that_trainer_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the time of the training"):
        TrainerModel(tiny(), sd.SelfDistillationLoss.from_preset("byot-iccv2019", kd_warmup_epochs=2))
    with pytest.raises(ValueError, match="the average of the weights"):
        TrainerModel(tiny(), sd.SelfDistillationLoss.from_preset("byot-iccv2019", teacher="ema"))
