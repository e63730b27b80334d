"""Load the example server on loopback, with early exit and without: throughput, latency, and every answer checked.

Run from the repository root, with the package and its extra `serve`: python benchmarks/serve_load.py MODEL IMAGES
What each column means is told in benchmarks/README.md.
"""

import argparse
import http.client
import json
import platform
import random
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

import timm_selfdistill as sd
from timm_selfdistill.data.decode import decode
from timm_selfdistill.data.transforms import MODES, InputConfig, eval_transform
from timm_selfdistill.hub import load_with_early_exit

ENDINGS = (".png", ".jpg", ".jpeg")


def main() -> int:
    """Print a line for each way to serve and each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model with early-exit settings")
    parser.add_argument("images", type=Path, help="folder with image files")
    parser.add_argument("--most", type=int, default=400, help="different images that are sent")
    parser.add_argument("--labelled", action="store_true", help="the images' folders are named as their classes")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each load")
    parser.add_argument("--rounds", type=int, default=3, help="how often the servers take turns")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="loads, of what plain can answer")
    parser.add_argument("--batch-size", type=int, default=32, help="most images in a batch of the server")
    parser.add_argument("--clients", type=int, default=16, help="connections")
    parser.add_argument("--threads", type=int, default=1, help="batches that the server runs at the same time")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in ENDINGS)
    random.Random(0).shuffle(files)
    files = files[: arguments.most]
    bodies = [path.read_bytes() for path in files]
    expected = {way: answers(arguments.model, bodies, plain=way == "plain") for way in ("plain", "early exit")}
    common = [arguments.model, "--threads", str(arguments.threads), "--batch-size", str(arguments.batch_size)]
    ports = {"plain": start([*common, "--plain"]), "early exit": start(common)}
    try:
        if arguments.labelled:
            accuracy({way: port for way, (port, _) in ports.items()}, files)
        measure({way: port for way, (port, _) in ports.items()}, bodies, expected, arguments)
    finally:
        for _, process in ports.values():
            process.terminate()
    print(f"\n{len(bodies)} images, {arguments.clients} clients, one server at a time; torch {torch.__version__}")
    print(f"{platform.processor() or platform.machine()}\ncommand: python {shlex.join(sys.argv)}")
    return 0


def measure(
    ports: dict[str, int],
    bodies: list[bytes],
    expected: dict[str, list[tuple[int, int]]],
    arguments: argparse.Namespace,
) -> None:
    """Load the servers in turns: first as much as they take, then at shares of what the plain one took."""
    print(
        f"{'':>10}  {'load/s':>7}  {'answers/s':>9}  {'p50 ms':>7}  {'p95 ms':>7}  {'p99 ms':>7}  {'as direct %':>11}"
    )
    capacity = 0.0
    for share in (None, *arguments.shares):
        found: dict[str, list[list[float]]] = {way: [] for way in ports}
        for _ in range(arguments.rounds):
            for way, port in ports.items():
                rate = None if share is None else share * capacity
                found[way].append(load(port, bodies, expected[way], rate, arguments.seconds, arguments.clients))
        for way, rounds in found.items():
            speed, p50, p95, p99, same = map(statistics.median, zip(*rounds, strict=True))
            asked = "full" if share is None else f"{share * capacity:.1f}"
            print(
                f"{way:>10}  {asked:>7}  {speed:>9.1f}  {1000 * p50:>7.1f}  {1000 * p95:>7.1f}  {1000 * p99:>7.1f}  "
                f"{100 * same:>11.2f}",
                flush=True,
            )
            if share is None and way == "plain":
                capacity = speed


def accuracy(ports: dict[str, int], files: list[Path]) -> None:
    """Print the share of the answers over HTTP that are right: a file's folder has the name of its class."""
    for way, port in ports.items():
        connection, right = http.client.HTTPConnection("127.0.0.1", port), 0
        for path in files:
            right += ask(connection, path.read_bytes())["label"] == path.parent.name
        connection.close()
        print(f"{way:>10}  top-1 {100 * right / len(files):.2f} % of the answers to {len(files)} images")
    print()


def ask(connection: http.client.HTTPConnection, image: bytes) -> dict[str, Any]:
    """Return a server's answer for an image file."""
    for again in (True, False):
        try:
            connection.request("POST", "/classify", image)
            response = connection.getresponse()
            break
        except ConnectionError:  # a server may close a connection that waits
            connection.close()
            if not again:
                raise
    body: dict[str, Any] = json.loads(response.read())
    assert response.status == 200, body
    return body


def answers(folder: Path, bodies: list[bytes], plain: bool) -> list[tuple[int, int]]:
    """Return class and exit of each image, by a direct call."""
    model, settings = load_with_early_exit(folder)
    assert settings is not None, "the model has no early-exit settings: run timm-selfdistill calibrate first"
    fast = sd.EarlyExit(model, float("inf")) if plain else sd.EarlyExit.from_config(model, settings)
    config = InputConfig.from_model(model.backbone)
    prepare, found = eval_transform(config), []
    with torch.inference_mode():
        for body in bodies:
            out = fast(prepare(decode(body, MODES[config.channels])).unsqueeze(0))
            found.append((int(out.logits.argmax()), int(out.exit_index)))
    return found


def start(command: list[object]) -> tuple[int, "subprocess.Popen[bytes]"]:
    """Start the example, and return its port when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "examples/serve.py", *map(str, command), "--port", str(port)])
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port, process
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    raise TimeoutError("the server does not answer")


def load(
    port: int, bodies: list[bytes], expected: list[tuple[int, int]], rate: float | None, seconds: float, clients: int
) -> list[float]:
    """Send images for some seconds, and return answers a second, quantiles of the latency, and the share as expected.

    With a rate, images come at random times (Poisson), and the latency counts from then, also while all connections are
    busy; without, every client sends one after the other.
    """
    queue: SimpleQueue[tuple[int, float] | None] = SimpleQueue()
    latencies: list[float] = []
    same: list[bool] = []
    end = time.perf_counter() + seconds

    def client(seed: int) -> None:
        connection, draw = http.client.HTTPConnection("127.0.0.1", port), random.Random(seed)
        while True:
            item = queue.get() if rate is not None else (draw.randrange(len(bodies)), time.perf_counter())
            if item is None or (rate is None and time.perf_counter() > end):
                connection.close()
                return
            place, begin = item
            body = ask(connection, bodies[place])
            latencies.append(time.perf_counter() - begin)
            same.append((body["class"], body["exit"]) == expected[place])

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    if rate is not None:
        draw, due = random.Random(0), begin
        while (due := due + draw.expovariate(rate)) < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            queue.put((draw.randrange(len(bodies)), due))
        for _ in threads:
            queue.put(None)
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(latencies, n=100)
    return [len(latencies) / (time.perf_counter() - begin), cuts[49], cuts[94], cuts[98], statistics.mean(same)]


if __name__ == "__main__":
    sys.exit(main())
