"""The precision that suits a device, and warnings of one that does not."""

import logging

import pytest
import torch

from timm_selfdistill.train import precision
from timm_selfdistill.train.launch import fresh_accelerate

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx2": True}, "bf16"), ({"avx2": True}, "no"), ({}, "no")],
)
def test_a_cpu_computes_in_bf16_where_its_instructions_do(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], chosen: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.suitable_precision(CPU)[0] == chosen


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_a_gpu_computes_in_bf16_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.suitable_precision(GPU)[0] == chosen


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_suits_the_device_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with fresh_accelerate(), caplog.at_level(logging.INFO, "timm_selfdistill"):
        found = precision.make_accelerator("auto").mixed_precision
    assert found == ("bf16" if native else "no")
    assert f"Precision {found}: " in caplog.text


def test_emulated_bf16_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with fresh_accelerate():
        assert precision.make_accelerator("bf16").mixed_precision == "bf16"
    assert "bf16 is emulated on this cpu" in caplog.text
