"""Serve a network with early exit over HTTP: dynamic batches, a limit for each request, metrics. See docs/serve.md.

python examples/serve.py runs/digits/model --port 8000          (pip install "timm_selfdistill[serve]")
"""

import argparse
import asyncio
import math

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

import timm_selfdistill as sd
from timm_selfdistill.data.decode import decode
from timm_selfdistill.data.transforms import MODES, InputConfig, eval_transform
from timm_selfdistill.hub import class_names, load_with_early_exit
from timm_selfdistill.serving import Batcher


def make_app(batcher: Batcher, model: sd.SelfDistillModel) -> FastAPI:
    """Return the application: POST an image file to /classify, GET /metrics."""
    app, config = FastAPI(), InputConfig.from_model(model.backbone)
    names, prepare = class_names(model) or list(range(model.num_classes)), eval_transform(config)

    @app.post("/classify")
    async def classify(request: Request, max_exit: int | None = None, deadline_ms: float | None = None) -> dict:
        body = await request.body()
        try:
            image = await asyncio.to_thread(lambda: prepare(decode(body, MODES[config.channels])))
        except Exception as error:  # Pillow raises whatever a format's library does
            raise HTTPException(415, f"This is no image that can be read: {error}") from error
        try:
            deadline = None if deadline_ms is None else deadline_ms / 1000
            future = batcher.submit(image, max_exit=max_exit, deadline=deadline)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        logits, exit = await asyncio.wrap_future(future)
        probability, best = logits.softmax(-1).max(-1)
        return {"class": int(best), "label": str(names[best]), "probability": float(probability), "exit": exit}

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


def main() -> None:
    """Load the network, time its parts for deadlines if that was not done, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a saved model with early-exit settings, or a repository on the Hub")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32, help="most images in a batch")
    parser.add_argument("--threads", type=int, default=1, help="batches that run at the same time")
    parser.add_argument("--plain", action="store_true", help="serve the backbone alone")
    arguments = parser.parse_args()
    model, settings = load_with_early_exit(arguments.model)
    if arguments.plain or settings is None:
        costs = None if settings is None else settings.costs
        settings = sd.EarlyExitConfig((math.inf,) * model.num_exits, costs=costs)
    fast = sd.EarlyExit.from_config(model, settings)
    if fast.config.costs is None:
        fast.measure(arguments.batch_size)
    with Batcher(fast, batch_size=arguments.batch_size, threads=arguments.threads) as batcher:
        uvicorn.run(make_app(batcher, model), port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
