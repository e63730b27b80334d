"""Graphs whose weights are in a second file, as those above 2 GB are: they are whole, guarded, and may be moved."""

import functools
import importlib
import json
import shutil

import numpy as np
import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill.export import graphs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_FILE", 3000)
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    monkeypatch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))


@pytest.fixture
def fast(tiny_net):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), exits=["stage0", "stage1"], image_size=32, head="linear").eval()
    return sd.EarlyExit(model, [0.21, 0.21])


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same(found, expected):
    assert found[1].tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(found[0], expected.logits.numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stages(fast, images, tmp_path):
    path = sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=32)
    files = {file.name for file in path.iterdir()}
    # The first convolution is small, and stays in its graph.
    assert files == {"manifest.json", *(f"stage-{n}.onnx" for n in range(3)), "stage-1.onnx.data", "stage-2.onnx.data"}
    sha256 = json.loads((path / "manifest.json").read_text())["sha256"]
    assert set(sha256) == files - {"manifest.json"}
    moved = shutil.move(path, tmp_path / "elsewhere")
    same(sd.OnnxEarlyExit(moved)(images.numpy()), fast(images))
    weights = tmp_path / "elsewhere" / "stage-2.onnx.data"
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"stage-2.onnx.data was damaged or exchanged"):
        sd.OnnxEarlyExit(moved)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no file 'stage-2.onnx.data'"):
        sd.OnnxEarlyExit(moved)


def test_one_graph_with_all_stages(fast, images, tmp_path):
    folder = tmp_path / "one"
    sd.export_early_exit(fast, folder / "net.onnx", format="onnx-if", image_size=32)
    assert {file.name for file in folder.iterdir()} == {"net.onnx", "net.onnx.data"}
    moved = shutil.move(folder, tmp_path / "elsewhere")
    session = onnxruntime.InferenceSession(f"{moved}/net.onnx", providers=["CPUExecutionProvider"])
    for image in images.split(1):
        with torch.no_grad():
            same(session.run(["logits", "exit_index"], {"images": image.numpy()}), fast(image))


def test_one_exit(fast, images, tmp_path):
    sd.export_model(fast.model, 2, tmp_path / "net.onnx", format="onnx", image_size=32, dynamic_batch=True)
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = fast.model(images).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_quantised_stages(fast, images, tmp_path, mode):
    given = {"calibration_images": images} if mode == "static" else {}
    path = sd.export_early_exit(fast, tmp_path / "int8", format="onnx-stages", image_size=32, quantize=mode, **given)
    files = {file.name for file in path.iterdir()}
    assert set(json.loads((path / "manifest.json").read_text())["sha256"]) == files - {"manifest.json"}
    used = set()
    for stage in path.glob("*.onnx"):
        for tensor in onnx.load(stage, load_external_data=False).graph.initializer:
            used |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    assert used == {name for name in files if name.endswith(".data")}
    every = sd.OnnxEarlyExit(shutil.move(path, tmp_path / "elsewhere")).every_exit(images.numpy())
    with torch.no_grad():
        expected = torch.stack(fast.model(images, return_exits=True).logits).numpy()
    assert np.abs(every - expected).max() < 0.1 * np.abs(expected).max()


def test_a_smaller_graph_leaves_no_weights_of_the_one_that_it_replaces(fast, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    sd.export_model(fast.model, 2, path, format="onnx", image_size=32)
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    monkeypatch.setattr(graphs, "LARGEST_FILE", 10**9)
    (tmp_path / "other.onnx.data").write_bytes(b"of another graph")
    sd.export_model(fast.model, 2, path, format="onnx", image_size=32, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "other.onnx.data"}
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
