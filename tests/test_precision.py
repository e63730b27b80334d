"""The precision that suits a device, warnings of one that does not, and that of a run that goes on."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_selfdistill.compat import cpu_computes_bf16
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.train import as_begun, finished_report, launch, train
from timm_selfdistill.train.launch import fresh_accelerate

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx2": True}, True), ({"avx2": True}, False), ({}, False)],
)
def test_a_cpu_computes_in_bf16_where_its_instructions_do(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_computes_bf16() is native


@pytest.mark.parametrize("native", [True, False])
def test_older_torch_is_asked_too(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert cpu_computes_bf16() is native


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_a_gpu_computes_in_bf16_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.suitable_precision(GPU)[0] == chosen


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_suits_the_device_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool
) -> None:
    monkeypatch.setattr(launch, "cpu_computes_bf16", lambda: native)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with fresh_accelerate(), caplog.at_level(logging.INFO, "timm_selfdistill"):
        found = launch.make_accelerator("auto").mixed_precision
    assert found == ("bf16" if native else "no")
    assert f"Precision {found}: " in caplog.text


def test_emulated_bf16_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with fresh_accelerate():
        assert launch.make_accelerator("bf16").mixed_precision == "bf16"
    assert "bf16 is emulated on this cpu device, so training takes longer than in float32" in caplog.text


# A run that was begun when the default was float32.
SMALL: dict[str, Any] = {
    "model": {"name": "test_resnet", "kwargs": {"in_chans": 1}},
    "exits": {"points": 1, "head": "linear"},
    "data": {"path": "digits", "image_size": 16, "max_train": 32, "max_eval": 10, "workers": 0, "validation": 0},
    "schedule": {"name": "none"},
    "epochs": 1,
    "batch_size": 16,
}


def small(folder: Path, **changes: Any) -> Recipe:
    return load_recipe(SMALL | {"output_dir": str(folder)} | changes)


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert small(folder).precision == "auto"
    assert as_begun(small(folder)).precision == "auto"
    train(small(folder, precision="no"))
    assert as_begun(small(folder)).precision == "no"
    assert finished_report(as_begun(small(folder))) is not None
    report = train(small(folder, epochs=2))
    assert load_recipe(folder / "recipe.yaml").precision == "no"
    assert report["num_samples"] == 10
    # What a recipe names is not replaced, and another run is refused as ever.
    assert as_begun(small(folder, precision="auto")).precision == "auto"
    with pytest.raises(ValueError, match=r"precision \(no, now auto\)"):
        train(small(folder, precision="auto"))
    (checkpoint,) = sorted((folder / "checkpoints" / "self-distilled").iterdir())[-1:]
    elsewhere = small(tmp_path / "other", resume=str(checkpoint))
    assert as_begun(elsewhere).precision == "no"
    assert as_begun(small(folder, resume="never")).precision == "auto"


def test_the_time_of_each_phase_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "timm_selfdistill"):
        train(small(tmp_path / "run"))
    seconds = r"\d+\.\d s"
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Time: ")]
    names = [part.split()[0] for part in line.removeprefix("Time: ").split(", ")]
    assert names == ["preparation", "training", "evaluation", "report"]
    assert len(re.findall(seconds, line)) == 4
