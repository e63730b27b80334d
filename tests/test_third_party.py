"""Another package's heads, losses, divergences and teachers: installed by pip, found by name, from a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "example-plugin"
version = "1.0"

[project.entry-points."timm_selfdistill.heads"]
example-head = "example_plugin:Head"
example-broken = "example_plugin:Missing"

[project.entry-points."timm_selfdistill.losses"]
example-loss = "example_plugin:Loss"

[project.entry-points."timm_selfdistill.divergences"]
example-divergence = "example_plugin:divergence"

[project.entry-points."timm_selfdistill.teachers"]
example-teacher = "example_plugin:teacher"
"""
MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

from timm_selfdistill.heads import as_tokens


class Head(nn.Module):
    def __init__(self, tap, feature_dim, scale=1.0):
        super().__init__()
        self.tap, self.scale = tap, scale
        self.proj = nn.Linear(tap.channels, feature_dim)

    def forward(self, x):
        return self.scale * self.proj(as_tokens(x, self.tap).mean(1))


class Loss(nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight

    def forward(self, out, target):
        terms = [F.cross_entropy(logits, target) for logits in out.logits]
        return {"loss": self.weight * torch.stack(terms).sum(), "example": terms[0].detach()}


def divergence(student, teacher, target, *, temperature, scale):
    return (student - teacher).square().mean((1, 2))


def teacher(logits):
    return logits[-1:].expand_as(logits[:-1])
"""
SMALL = [
    "epochs=1",
    "batch_size=16",
    "data.max_train=32",
    "data.max_eval=10",
    "data.image_size=16",
    "precision='no'",
    "baseline=false",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the example package was installed."""
    source, site = tmp_path_factory.mktemp("example"), tmp_path_factory.mktemp("site")
    (source / "example_plugin").mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "example_plugin" / "__init__.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=900)
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the example package is installed."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_an_installed_loss_and_head_train_from_a_recipe(site, tmp_path):
    settings = ["loss.name=example-loss", "loss.preset=null", "loss.kwargs={weight: 2.0}"]
    settings += ["exits.head=example-head", "exits.head_kwargs={scale: 0.5}"]
    command = ["-m", "timm_selfdistill.cli", "train", "digits", *SMALL, *settings, f"output_dir={tmp_path / 'run'}"]
    process = run(site, *command)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("example" in key for line in lines for key in line), lines
    assert (tmp_path / "run" / "model" / "exits.safetensors").is_file()


def test_what_is_broken_is_named_and_the_others_work(site):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import timm_selfdistill as sd
    assert "example-head" in sd.list_heads() and "example-broken" not in sd.list_heads()
assert any("head 'example-broken' cannot be loaded: example_plugin:Missing" in str(w.message) for w in caught), caught
assert "example-divergence" in sd.list_divergences() and "example-teacher" in sd.list_teachers()
assert "example-loss" in sd.list_losses()
sd.SelfDistillationLoss.from_preset("byot-iccv2019", divergence="example-divergence", teacher="example-teacher")
try:
    sd.wrap("resnet18", head="example-broken", image_size=32)
except ValueError as error:
    assert "head 'example-broken' is installed but cannot be loaded" in str(error), error
else:
    raise AssertionError("a broken head was used")
"""
    process = run(site, "-c", code)
    assert process.returncode == 0, process.stderr


def test_without_the_package_its_names_are_unknown(tmp_path):
    settings = [*SMALL, "loss.name=example-loss", f"output_dir={tmp_path / 'run'}"]
    process = run(tmp_path, "-m", "timm_selfdistill.cli", "train", "digits", *settings)
    assert process.returncode == 2
    assert "loss.name: unknown, received 'example-loss'; known are" in process.stderr
