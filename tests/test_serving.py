"""Answers under concurrent requests are those of a direct call, and limits are kept; the example over HTTP."""

import importlib.util
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_selfdistill as sd
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


def test_the_example_over_http(make_backbone, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient")
    path = Path(__file__).parent.parent / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    assert len(path.read_text().splitlines()) <= 80
    model = sd.wrap(make_backbone("resnet18", channels=[8, 8, 8, 8]), image_size=32).eval()
    fast = sd.EarlyExit(model, 0.0)
    files = []
    for seed in range(6):
        stream = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype="uint8")
        Image.fromarray(pixels).save(stream, "png")
        files.append(stream.getvalue())
    with Batcher(fast, batch_size=4) as batcher:
        client = testclient.TestClient(serve.make_app(batcher, model))
        with ThreadPoolExecutor(3) as callers:
            answers = list(callers.map(lambda file: client.post("/classify", content=file), files * 2))
        assert all(answer.status_code == 200 for answer in answers)
        bodies = [answer.json() for answer in answers]
        assert bodies[:6] == [pytest.approx(body) for body in bodies[6:]]
        assert {body["exit"] for body in bodies} == {0}
        assert client.post("/classify?max_exit=9", content=files[0]).status_code == 422
        assert client.post("/classify?deadline_ms=5", content=files[0]).status_code == 422  # no times were measured
        assert client.post("/classify", content=b"text").status_code == 415
        lines = client.get("/metrics").text.splitlines()
        assert "answers 12" in lines
        assert 'exits{exit="0"} 12' in lines
