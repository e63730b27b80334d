"""Answers under concurrent requests are those of a direct call, and limits are kept; the example over HTTP."""

import importlib.util
import io
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_selfdistill as sd
from timm_selfdistill import onnx as onnx_runner
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import Line, StageCosts
from timm_selfdistill.serving import Batcher

K = 2


@pytest.fixture
def images():
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(tiny_net, images):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), exits=["stage0", "stage1"], image_size=32, head="linear").eval()
    with torch.no_grad():
        every = model(images, return_exits=True).logits[:K]
    thresholds = [float(logits.softmax(-1).amax(-1).quantile(0.6)) for logits in every]
    costs = StageCosts((Line(0, 1e-3),) * (K + 1), (Line(0, 1e-3),) * K, (Line(0, 0),) * K, batch_size=8)
    return sd.EarlyExit(model, thresholds, costs=costs)


@pytest.fixture
def stages(fast, tmp_path):
    pytest.importorskip("onnxruntime")
    path = sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=32)
    return sd.OnnxEarlyExit(path)


def alone(fast, image, **kwargs):
    with torch.inference_mode():
        out = fast(image.unsqueeze(0), **kwargs)
    return out.logits[0].clone(), int(out.exit_index)


@pytest.mark.parametrize("threads", [1, 3])
def test_answers_under_concurrent_requests_are_those_of_a_direct_call(fast, images, threads):
    expected = [alone(fast, image) for image in images]
    assert len({exit for _, exit in expected}) == K + 1
    with Batcher(fast, batch_size=8, threads=threads) as batcher, ThreadPoolExecutor(6) as callers:
        order = (
            torch.arange(240).remainder(24)[torch.randperm(240, generator=torch.Generator().manual_seed(1))].tolist()
        )
        answers = list(callers.map(lambda place: batcher.submit(images[place]).result(30), order))
        metrics = batcher.metrics()
    for place, answer in zip(order, answers, strict=True):
        assert answer.exit == expected[place][1]
        torch.testing.assert_close(answer.logits, expected[place][0])
    assert metrics["answers"] == 240 == sum(size * count for size, count in metrics["batches"].items())
    assert metrics["exits"] == {exit: 10 * sum(exit == other for _, other in expected) for exit in range(K + 1)}
    assert max(metrics["batches"]) <= 8
    assert 0 < metrics["latency"][0.5] <= metrics["latency"][0.99]


@pytest.mark.parametrize("as_array", [False, True])
def test_exported_stages_are_served_as_the_network_is(fast, stages, images, as_array):
    limits = [None, 0, 1, 2] * 6
    with Batcher(stages, batch_size=5, threads=2) as batcher:
        given = [image.numpy() if as_array else image for image in images]
        futures = [batcher.submit(image, max_exit=limit) for image, limit in zip(given, limits, strict=True)]
        for image, limit, future in zip(images, limits, futures, strict=True):
            logits, exit = alone(fast, image, max_exit=limit)
            answer = future.result(30)
            assert answer.exit == exit
            np.testing.assert_allclose(answer.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
        wrong = batcher.submit(np.zeros((3, 8, 8), np.float32))
        with pytest.raises(ValueError, match=r"images are float32 \[1, 3, 8, 8\]"):
            wrong.result(30)
        assert batcher.metrics()["failed"] == 1


def test_a_deadline_of_exported_stages(stages, images, monkeypatch):
    with Batcher(stages) as unmeasured, pytest.raises(ValueError, match="call measure"):
        unmeasured.submit(images[0], deadline=1.0)
    monkeypatch.setattr(onnx_runner, "_SECONDS", 0.0)
    with pytest.raises(ValueError, match="batch_size is 0; allowed is 1 or more"):
        stages.measure(0)
    stages.measure(4)
    times = [[stages.seconds_to(exit, rows) for exit in range(K + 1)] for rows in (1, 4)]
    assert all(0 < first <= second <= third for first, second, third in times)
    assert all(one <= four for one, four in zip(*times, strict=True))
    stages.thresholds = (math.inf,) * K
    with Batcher(stages, batch_size=1) as batcher:
        for deadline, exit in ((0.0, 0), (30.0, K)):
            assert batcher.submit(images[0], deadline=deadline).result(30).exit == exit


def test_serving_exported_stages_loads_no_torch():
    code = (
        "import sys, timm_selfdistill.serving, timm_selfdistill.onnx; assert not {'torch', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("thresholds", [None, math.inf])
@pytest.mark.parametrize("buckets", [None, [5]])
def test_every_image_is_told_of_once(fast, images, thresholds, buckets):
    network = sd.EarlyExit(fast.model, thresholds or fast.config.thresholds, buckets=buckets)
    told = {}

    def tell(places, logits, exit):
        assert told.keys().isdisjoint(places.tolist())
        told.update(zip(places.tolist(), ((row, exit) for row in logits), strict=True))

    with torch.inference_mode():
        out = network(images, on_answer=tell)
    assert [told[place][1] for place in range(24)] == out.exit_index.tolist()
    assert torch.equal(torch.stack([told[place][0] for place in range(24)]), out.logits)


def test_each_request_has_its_own_limit(fast, images):
    with Batcher(fast, batch_size=8) as batcher:
        futures = [batcher.submit(image, max_exit=place % 3) for place, image in enumerate(images)]
        for place, (image, future) in enumerate(zip(images, futures, strict=True)):
            logits, exit = alone(fast, image, max_exit=place % 3)
            assert future.result(30).exit == exit <= place % 3
            torch.testing.assert_close(future.result().logits, logits)


def test_a_deadline_is_kept_by_a_shallower_exit(fast, images):
    never = sd.EarlyExit(fast.model, math.inf, costs=fast.config.costs)
    with Batcher(never, batch_size=1) as batcher:
        # A part takes a millisecond by the measured times: exits 0 to 2 take 2, 3 and 3 of them. The queue takes some.
        for deadline, exit in ((0.0, 0), (1e-4, 0), (30.0, K)):
            assert batcher.submit(images[0], deadline=deadline).result(30).exit == exit
        assert batcher.submit(images[0], deadline=30.0, max_exit=1).result(30).exit == 1


def test_an_answer_does_not_wait_for_the_rest_of_its_batch(fast, images):
    entered, passes = threading.Semaphore(0), threading.Semaphore(0)

    def wait(module, args):
        entered.release()
        assert passes.acquire(timeout=30)

    first, last = (next(image for image in images if alone(fast, image)[1] == exit) for exit in (0, K))
    with Batcher(fast, batch_size=2) as batcher:
        blocker = fast.model.backbone.fc.register_forward_pre_hook(wait)
        held = batcher.submit(last)  # the thread waits at the end of this one, and the next two make one batch
        assert entered.acquire(timeout=30)
        futures = batcher.submit(first), batcher.submit(last)
        passes.release()
        assert held.result(30).exit == K
        assert futures[0].result(30).exit == 0
        assert not futures[1].done()
        passes.release()
        assert futures[1].result(30).exit == K
        blocker.remove()
        assert batcher.metrics()["batches"] == {1: 1, 2: 1}


def test_a_batch_that_fails_is_the_only_one(fast, images):
    with Batcher(fast, batch_size=4) as batcher:
        wrong = [batcher.submit(torch.randn(3, 16, 16)) for _ in range(3)]  # the network refuses another size
        fine = [batcher.submit(image) for image in images[:6]]
        for future in wrong:
            with pytest.raises(RuntimeError, match="only 32 px"):
                future.result(30)
        assert [future.result(30).exit for future in fine] == [alone(fast, image)[1] for image in images[:6]]
        assert batcher.metrics()["failed"] == 3


def test_wrong_requests(fast, images):
    batcher = Batcher(fast)
    with pytest.raises(ValueError, match="no exit 3; allowed are 0 to 2"):
        batcher.submit(images[0], max_exit=3)
    with pytest.raises(ValueError, match=r"shape \[24, 3, 32, 32\]; allowed is \[C, H, W\]"):
        batcher.submit(images)
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(images[0])
    with pytest.raises(ValueError, match="batch_size is 0; allowed is 1 or more"):
        Batcher(fast, batch_size=0)
    with Batcher(sd.EarlyExit(fast.model, 0.5)) as unmeasured, pytest.raises(ValueError, match="call measure"):
        unmeasured.submit(images[0], deadline=1.0)


@pytest.fixture(scope="module")
def serve():
    pytest.importorskip("fastapi.testclient")
    path = Path(__file__).parent.parent / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(path.read_text().splitlines()) <= 80
    return module


def ask(app, count, seed=0):
    """POST random images, several at once, and return the answers and the client."""
    from fastapi.testclient import TestClient

    client, files = TestClient(app), []
    for pixels in np.random.default_rng(seed).integers(0, 255, (count, 224, 224, 3), dtype="uint8"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        files.append(stream.getvalue())
    with ThreadPoolExecutor(3) as callers:
        answers = list(callers.map(lambda file: client.post("/classify", content=file), files))
    assert all(answer.status_code == 200 for answer in answers)
    return [answer.json() for answer in answers], client, files


def test_the_example_over_http(make_backbone, serve):
    model = sd.wrap(make_backbone("resnet18", channels=[8, 8, 8, 8]), image_size=32).eval()
    with Batcher(sd.EarlyExit(model, 0.0), batch_size=4) as batcher:
        app = serve.make_app(batcher, InputConfig.from_model(model.backbone), None)
        bodies, client, files = ask(app, 6)
        again, _, _ = ask(app, 6)
        assert bodies == [pytest.approx(body) for body in again]
        assert {body["exit"] for body in bodies} == {0}
        assert all(body["label"] == str(body["class"]) for body in bodies)
        assert client.post("/classify?max_exit=9", content=files[0]).status_code == 422
        assert client.post("/classify?deadline_ms=5", content=files[0]).status_code == 422  # no times were measured
        assert client.post("/classify", content=b"text").status_code == 415
        lines = client.get("/metrics").text.splitlines()
        assert "answers 12" in lines
        assert 'exits{exit="0"} 12' in lines


def test_the_example_serves_a_model_and_its_exported_stages_alike(fast, serve, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_runner, "_SECONDS", 0.0)
    fast.model.backbone.pretrained_cfg = {"input_size": (3, 32, 32)}
    names = ["ape", "bat", "cat", "dog", "eel"]
    stages = sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=32, label_names=names)
    monkeypatch.setattr(serve, "load_with_early_exit", lambda path: (fast.model, fast.config))
    monkeypatch.setattr(serve, "class_names", lambda model: names)
    answers = {}
    for path in ("model", str(stages)):
        network, config, labels = serve.load(path, 4, plain=False)
        assert isinstance(network, sd.OnnxEarlyExit if path == str(stages) else sd.EarlyExit)
        assert network.seconds_to(K, 4) > 0
        with Batcher(network, batch_size=4) as batcher:
            answers[path], _, _ = ask(serve.make_app(batcher, config, labels), 6)
        plain, _, _ = serve.load(path, 4, plain=True)
        with Batcher(plain, batch_size=4) as batcher:
            assert {body["exit"] for body in ask(serve.make_app(batcher, config, labels), 2)[0]} == {K}
    for body, other in zip(answers["model"], answers[str(stages)], strict=True):
        assert body.pop("probability") == pytest.approx(other.pop("probability"), rel=1e-4)
        assert body == other
    assert {body["label"] for body in answers["model"]} <= set(names)
