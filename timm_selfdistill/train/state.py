"""What a checkpoint holds beside the progress: weights, teachers, loss, optimizer, schedule, scaler, random states."""

import random
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.task import SelfDistillationTask
from timm_selfdistill.train.parallel import Parallelism


class PhaseState:
    """Everything of a phase that a checkpoint holds beside the progress."""

    def __init__(
        self,
        model: SelfDistillModel,
        task: SelfDistillationTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        parallelism: Parallelism,
    ) -> None:
        self.parallelism = parallelism
        self.accelerator = accelerator = parallelism.accelerator
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if scheduler is not None:
            self.parts["scheduler"] = scheduler
        if task.has_ema():
            self.parts["ema"] = task.get_trainable_module(ema=True)
        if task.past is not None:
            self.parts["past"] = task.past
        self.loss = task.get_submodule("criterion")
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler

    def capture(self) -> dict[str, Any]:
        """Return the state of every part, and of all processes the loss's and the random states.

        A loss may have seen other images in each process. All processes call it together, and the main process has
        what is returned.
        """
        of_processes = {"random": gather_object([_random_state()])}
        if state := self.loss.state_dict():
            on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
            of_processes["loss"] = gather_object([on_cpu])
        parts = {name: self.parallelism.state_dict(part) for name, part in self.parts.items()}
        return {**of_processes, "in_parts": self.parallelism.in_parts, **parts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Load the state of every part; of the loss, its parameters alone where there were other processes."""
        for name, part in self.parts.items():
            self.parallelism.load_state_dict(part, saved[name])
        if not self.loss.state_dict():
            return
        if len(saved["loss"]) == self.accelerator.num_processes:
            self.loss.load_state_dict(saved["loss"][self.accelerator.process_index])
        else:
            # These are the same in all processes, and what the optimizer remembers is about them.
            own = {name: saved["loss"][0][name] for name, _ in self.loss.named_parameters()}
            self.loss.load_state_dict(own, strict=False)

    def restore_random(self, saved: dict[str, Any]) -> None:
        """Load the random state of this process, where there are as many as when it was saved."""
        if len(saved["random"]) == self.accelerator.num_processes:
            _set_random_state(saved["random"][self.accelerator.process_index])


def _random_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
