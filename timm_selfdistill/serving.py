"""Answer single images in batches, as a server does: images that wait go together, each with its own limit."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np

_KEPT_LATENCIES: Final = 10_000

Give = Callable[[Sequence[int], Sequence[Any], int], None]
"""Takes the places in the batch of images that have their answer, the logits [num_classes] of each, and the exit."""

NO_TIMES: Final = "A deadline needs the times of the network's parts: call measure(batch_size) on it first."


class Servable(Protocol):
    """A network that `Batcher` can run: `EarlyExit`, `OnnxEarlyExit`, or one of your own."""

    @property
    def num_exits(self) -> int:
        """Number K of added exits; the fallback has index K."""

    def answer_images(self, images: Sequence[Any], limits: Sequence[int], give: Give) -> None:
        """Answer a batch.

        Args:
            images: Images [C, H, W] of one shape and type.
            limits: For each, the exit that answers at the latest.
            give: Called as soon as images have their answer, once for each image.
        """

    def seconds_to(self, exit: int, rows: int) -> float:
        """Return what a batch of `rows` images takes of which none leaves before an exit.

        Raises:
            ValueError: If that was not measured.
        """


class Answer(NamedTuple):
    """The answer for one image.

    Attributes:
        logits: Logits [num_classes], on the CPU: a tensor of `EarlyExit`, a numpy array of `OnnxEarlyExit`.
        exit: The exit that gave them; K stands for the fallback.
    """

    logits: Any
    exit: int


@dataclass
class _Request:
    image: Any
    max_exit: int
    due: float  # on time.monotonic's clock
    start: float = field(default_factory=time.monotonic)
    future: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Runs a network with early exit for many callers at once; a context manager that ends its threads.

    A thread that is free takes the images that wait, at most a batch, and waits for no more of them: the busier the
    server, the larger the batches. An image is answered as soon as it leaves the network, before the rest of its batch.

    Args:
        network: An `EarlyExit` in eval mode, an `OnnxEarlyExit`, or another network of this kind.
        batch_size: Most images in a batch.
        threads: How many batches run at the same time.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(self, network: Servable, *, batch_size: int = 32, threads: int = 1) -> None:
        for name, value in (("batch_size", batch_size), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed is 1 or more.")
        self._network, self._batch_size = network, batch_size
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._exits: Counter[int] = Counter()
        self._batches: Counter[int] = Counter()
        self._failed = 0
        self._latencies: deque[float] = deque(maxlen=_KEPT_LATENCIES)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, image: Any, *, max_exit: int | None = None, deadline: float | None = None) -> "Future[Answer]":
        """Ask for the answer of one image; images of one shape go into one batch.

        Args:
            image: The image [C, H, W], prepared for the network: a tensor or a numpy array.
            max_exit: The exit that answers at the latest; K, the fallback, by default.
            deadline: Seconds from now in which to answer: by the times of the network's `measure`, the deepest exit
                that is reached before answers, and exit 0 if none is.

        Returns:
            A future of the answer, which has the error if the network fails on its batch.

        Raises:
            ValueError: If there is no such exit, the image has another number of dimensions, or the network has no
                measured times for a deadline.
            RuntimeError: If the batcher was closed.
        """
        exits = self._network.num_exits
        deepest = exits if max_exit is None else max_exit
        if not 0 <= deepest <= exits:
            raise ValueError(f"There is no exit {deepest}; allowed are 0 to {exits} (the fallback).")
        if image.ndim != 3:
            raise ValueError(f"The image has the shape {list(image.shape)}; allowed is [C, H, W].")
        if deadline is not None:
            self._network.seconds_to(0, 1)  # refuses a network without times
        due = np.inf if deadline is None else time.monotonic() + deadline
        request = _Request(image, deepest, due)
        with self._changed:
            if self._closed:
                raise RuntimeError("The batcher was closed.")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def metrics(self) -> dict[str, Any]:
        """Return what was done so far: answers by exit, batches by size, failures, and quantiles of the latency.

        Returns:
            `answers` and `failed` (counts), `exits` and `batches` (counts by exit and by size), `waiting` (images), and
            `latency` (seconds by quantile, of the last 10,000 answers).
        """
        with self._changed:
            latencies = np.array(self._latencies)
            quantiles = (0.5, 0.95, 0.99) if len(latencies) else ()
            return {
                "answers": sum(self._exits.values()),
                "failed": self._failed,
                "waiting": len(self._waiting),
                "exits": dict(sorted(self._exits.items())),
                "batches": dict(sorted(self._batches.items())),
                "latency": {share: float(np.quantile(latencies, share)) for share in quantiles},
            }

    def close(self) -> None:
        """Answer the images that wait, take no more, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        while batch := self._take():
            # A request that was cancelled is left out; one that runs can no longer be.
            batch = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _take(self) -> list[_Request]:
        """Return images of one shape that wait; none when all are answered and no more come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch: list[_Request] = []
            while self._waiting and len(batch) < self._batch_size:
                first, following = (batch or self._waiting)[0].image, self._waiting[0].image
                if (first.shape, first.dtype) != (following.shape, following.dtype):
                    break
                batch.append(self._waiting.popleft())
            return batch

    def _answer(self, batch: list[_Request]) -> None:
        open_requests = dict(enumerate(batch))
        with self._changed:
            self._batches[len(batch)] += 1

        def give(places: Sequence[int], logits: Sequence[Any], exit: int) -> None:
            now = time.monotonic()
            for place, answer in zip(places, logits, strict=True):
                request = open_requests.pop(place)
                with self._changed:
                    self._exits[exit] += 1
                    self._latencies.append(now - request.start)
                request.future.set_result(Answer(answer, exit))

        try:
            limits = [self._limit(request, len(batch)) for request in batch]
            self._network.answer_images([request.image for request in batch], limits, give)
        except Exception as error:  # whatever it is, it is the callers', and the next batch may be fine
            with self._changed:
                self._failed += len(open_requests)
            for request in open_requests.values():
                request.future.set_exception(error)

    def _limit(self, request: _Request, rows: int) -> int:
        """Return the deepest exit that a request may wait for."""
        if request.due == np.inf:
            return request.max_exit
        left = request.due - time.monotonic()
        reached = (exit for exit in range(request.max_exit, 0, -1) if self._network.seconds_to(exit, rows) <= left)
        return next(reached, 0)
