"""Serve a network with early exit over HTTP: dynamic batches, a limit for each request, metrics. See docs/serve.md.

python examples/serve.py runs/digits/model --port 8000          (pip install "timm_selfdistill[serve]")
"""

import argparse
import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

import timm_selfdistill as sd
from timm_selfdistill.data.decode import decode
from timm_selfdistill.data.transforms import MODES, InputConfig, eval_transform
from timm_selfdistill.hub import class_names, load_with_early_exit
from timm_selfdistill.serving import Batcher, Servable


def make_app(batcher: Batcher, config: InputConfig, names: Sequence[str] | None) -> FastAPI:
    """Return the application: POST an image file to /classify, GET /metrics."""
    app, prepare = FastAPI(), eval_transform(config)

    @app.post("/classify")
    async def classify(request: Request, max_exit: int | None = None, deadline_ms: float | None = None) -> dict:
        body = await request.body()
        try:
            image = await asyncio.to_thread(lambda: prepare(decode(body, MODES[config.channels])))
        except Exception as error:  # Pillow raises whatever a format's library does
            raise HTTPException(415, f"This is no image that can be read: {error}") from error
        try:
            future = batcher.submit(image, max_exit=max_exit, deadline=deadline_ms and deadline_ms / 1000)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        logits, exit = await asyncio.wrap_future(future)
        odds = np.exp(np.asarray(logits, float) - float(max(logits)))
        best, probability = int(odds.argmax()), float(1 / odds.sum())
        return {"class": best, "label": str(names[best] if names else best), "probability": probability, "exit": exit}

    @app.get("/metrics")
    def metrics() -> Response:
        """Return the counts as Prometheus reads them."""
        found = batcher.metrics()
        lines = [f"{name} {found[name]}" for name in ("answers", "failed", "waiting")]
        lines += [f'exits{{exit="{exit}"}} {count}' for exit, count in found["exits"].items()]
        lines += [f'batches{{size="{size}"}} {count}' for size, count in found["batches"].items()]
        lines += [f'latency_seconds{{quantile="{share}"}} {value:.6f}' for share, value in found["latency"].items()]
        return Response("\n".join([*lines, ""]), media_type="text/plain")

    return app


def load(path: str, batch_size: int, *, plain: bool) -> tuple[Servable, InputConfig, Sequence[str] | None]:
    """Load a network, with times for deadlines: stages that were exported to ONNX, or a saved model."""
    if (Path(path) / "manifest.json").exists():
        stages = sd.OnnxEarlyExit(path, thresholds=math.inf if plain else None)
        stages.measure(batch_size)
        return stages, InputConfig.from_timm(stages.manifest), stages.manifest["label_names"]
    model, settings = load_with_early_exit(path)
    never = sd.EarlyExitConfig((math.inf,) * model.num_exits, costs=settings and settings.costs)
    fast = sd.EarlyExit.from_config(model, never if plain or settings is None else settings)
    if fast.config.costs is None:
        fast.measure(batch_size)
    return fast, InputConfig.from_model(model.backbone), class_names(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a saved model or of exported ONNX stages, or a repository")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32, help="most images in a batch")
    parser.add_argument("--threads", type=int, default=1, help="batches that run at the same time")
    parser.add_argument("--plain", action="store_true", help="serve the backbone alone")
    args = parser.parse_args()
    network, config, names = load(args.model, args.batch_size, plain=args.plain)
    with Batcher(network, batch_size=args.batch_size, threads=args.threads) as batcher:
        uvicorn.run(make_app(batcher, config, names), port=args.port, log_level="warning")
