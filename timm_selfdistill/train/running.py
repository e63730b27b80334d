"""The progress bar of an epoch, and the running means of its terms."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm


class RunningTerms:
    """The progress bar and the running means of one epoch's terms, read rarely because reading waits for the GPU."""

    def __init__(self, title: str, updates: int, done: int, batch_size: int, accelerator: Accelerator) -> None:
        self.bar = tqdm(total=updates, initial=done, desc=title, unit="step", disable=not accelerator.is_main_process)
        self.batch_size = batch_size
        self.updates = done
        self._done_before = done
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._start = time.monotonic()
        self._device = accelerator.device

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading, for a checkpoint."""
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from sums that `state_dict` returned."""
        self._sums = {name: total.to(self._device) for name, total in state["sums"].items()}
        self._count = state["count"]

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """Add the terms of the micro batches of a step, detached."""
        for terms in parts:
            self._count += 1
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def read(self) -> dict[str, float]:
        """Return the mean of every term since the last reading, and images per second since the bar began."""
        values = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        rate = (self.updates - self._done_before) * self.batch_size / (time.monotonic() - self._start)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()} | {"img/s": f"{rate:.0f}"})
        return values | {"images_per_second": rate}

    def advance(self) -> None:
        """Count one optimizer step."""
        self.updates += 1
        self.bar.update()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
