"""When a run pushes its model; what is pushed, and by the real client, is in test_hub_remote."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from test_background import signalled

import timm_selfdistill as sd
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import CARD, HubError
from timm_selfdistill.recipe import PushSection
from timm_selfdistill.stop import Interrupted, StopSignals
from timm_selfdistill.train import publish
from timm_selfdistill.train.publish import ModelWriter, Publisher

NARROW = {"channels": [16, 32, 64, 80], "in_chans": 1}


class Hub:
    """Stands in for pushing: waits until it may go on, and remembers what was pushed."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.pushed: list[tuple[Path, str | None]] = []
        self.weights: list[torch.Tensor] = []

    def push(self, folder: Path, repo_id: str, *, private: bool, commit_message: str | None = None) -> None:
        if commit_message is not None:
            assert self.may_go_on.wait(600)
            self.weights.append(sd.from_pretrained(folder / "model").backbone.fc.bias.detach())
        self.pushed.append((folder, commit_message))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(publish, "push_folder", hub.push)
    monkeypatch.setattr(publish, "make_repository", lambda repo, private: None)
    return hub


def make_writer(channels: int = 1, **model: Any) -> ModelWriter:
    recipe = sd.load_recipe({"model": {"name": "resnet18", **model}, "data": {"path": "digits", "image_size": 32}})
    data = open_dataset(recipe.data, 0)
    return ModelWriter(
        recipe, data, InputConfig(channels, (32, 32), (0.5,) * channels, (0.5,) * channels, "bilinear", 1.0)
    )


def make_model() -> sd.SelfDistillModel:
    return sd.wrap("resnet18", num_classes=10, image_size=32, model_kwargs=NARROW)


def test_training_does_not_wait_for_a_push_and_may_change_the_weights(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 9\n")
    publisher = Publisher(PushSection(repo="me/net", every=2), tmp_path, make_writer())
    model = make_model()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for epoch in range(1, 10):
            model.backbone.fc.bias.fill_(epoch)
            publisher.after_epoch(model, epoch, 9)
            if epoch == 6:
                assert not hub.pushed
                hub.may_go_on.set()
                publisher._running.result()
    publisher.finish()
    assert [message for _, message in hub.pushed] == [
        "Add the model after epoch 2 of 9",
        "Add the model after epoch 8 of 9",
        None,
    ]
    assert [set(bias.tolist()) for bias in hub.weights] == [{2.0}, {8.0}]
    assert [record.message for record in caplog.records] == [
        "Epoch 4 is not pushed: the push before it still runs.",
        "Epoch 6 is not pushed: the push before it still runs.",
    ]
    assert hub.pushed[-1][0] == tmp_path
    assert not (tmp_path / ".pushing").exists()


def test_the_last_epoch_is_pushed_once(hub: Hub, tmp_path: Path) -> None:
    publisher = Publisher(PushSection(repo="me/net", every=1), tmp_path, make_writer())
    publisher.after_epoch(make_model(), 1, 1)
    publisher.finish()
    assert hub.pushed == [(tmp_path, None)]


def test_a_push_that_fails_does_not_stop_training(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 9\n")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise HubError("Pushing to me/net failed: the Hub is away.")

    monkeypatch.setattr(publish, "push_folder", fail)
    publisher = Publisher(PushSection(repo="me/net", every=1), tmp_path, make_writer())
    publisher.after_epoch(make_model(), 1, 3)
    with pytest.raises(HubError, match=r"the Hub is away\. The run is complete in .*; push it again by: timm"):
        publisher.finish()
    assert [record.message for record in caplog.records] == [
        "Pushing to me/net failed: the Hub is away. Training goes on."
    ]


def test_a_push_that_stalls_does_not_keep_a_run_from_being_stopped(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 9\n")
    publisher = Publisher(PushSection(repo="me/net", every=1), tmp_path, make_writer())
    publisher.after_epoch(make_model(), 1, 3)
    assert not publisher._running.done()
    with pytest.raises(Interrupted), StopSignals():
        signalled(publisher.finish)
    assert hub.pushed == []
    # Python waits for no daemon when it ends.
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "push-to-hub"] == [True]
    hub.may_go_on.set()


def test_the_last_push_does_not_either(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(PushSection(repo="me/net"), tmp_path, make_writer())
    monkeypatch.setattr(publish, "push_folder", lambda *args, **kwargs: hub.may_go_on.wait(600))
    with pytest.raises(Interrupted), StopSignals():
        signalled(publisher.finish)
    hub.may_go_on.set()


def test_a_full_disk_does_not_stop_training_either(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "save_pretrained", fill)
    publisher = Publisher(PushSection(repo="me/net", every=1), tmp_path, make_writer())
    publisher.after_epoch(make_model(), 1, 3)
    publisher.finish()
    assert hub.pushed == [(tmp_path, None)]
    assert "No space left on device Training goes on." in caplog.text


def test_the_card_of_a_fine_tuned_network_names_the_weights_and_their_licence(tmp_path: Path) -> None:
    backbone = timm.create_model("convnextv2_atto.fcmae_ft_in1k", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    model = sd.wrap(backbone, exits=2, image_size=64)
    make_writer(3, pretrained=True).save(model, tmp_path / "fine-tuned")
    data = ModelCard((tmp_path / "fine-tuned" / CARD).read_text()).data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "timm/convnextv2_atto.fcmae_ft_in1k")
    make_writer(3).save(model, tmp_path / "from scratch")
    data = ModelCard((tmp_path / "from scratch" / CARD).read_text()).data
    assert (data.license, data.base_model) == (None, None)
