"""Runs of two processes, one after the other, as listed in a JSON file; started by test_sharding.

Each entry is `{"folder", "overrides", "fsdp", "stop_at", "poison"}`: whether FSDP2 is asked for, the step in which the
last process gets a SIGTERM, and the steps whose images are NaN. What each process holds in the last step of a run is
written to `held-<network>-<process>.json` in its folder.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from quick_reports import quicken
from torch.distributed.tensor import DTensor

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.stop import Interrupted
from timm_selfdistill.train import publish, train, trainer

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

SMALL = [
    "model.kwargs={in_chans: 1, channels: [8, 8, 16, 16], drop_rate: 0.2, drop_path_rate: 0.2}",
    "exits.head=linear",
    "data.max_train=64",
    "data.max_eval=39",
    "data.image_size=16",
    "data.workers=0",
    "batch_size=16",
    "epochs=2",
    "baseline=false",
    "precision='no'",
    "optimizer.clip_grad=1.0",
]


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    quicken()
    # It ends the process group, too, which cannot be made twice.
    Accelerator.end_training = lambda self: None
    publish.make_repository = lambda repo, private: None
    publish.push_folder = keep_snapshot
    for entry in json.loads(plan.read_text()):
        run(entry["folder"], entry["overrides"], **{k: entry[k] for k in ("fsdp", "stop_at", "poison") if k in entry})


def run(
    folder: str, overrides: Iterable[str], fsdp: bool = True, stop_at: int | None = None, poison: Iterable[int] = ()
) -> None:
    """Do a run from a fresh start of Accelerate."""
    AcceleratorState._reset_state(True)
    for name, value in ASKED.items():
        os.environ.pop(name, None)
        if fsdp:
            os.environ[name] = value
    step = trainer.Trainer._step

    def stepping(self: trainer.Trainer, stepper: Any, running: Any, batches: Any) -> bool:
        context = self.context
        if self.progress.step + 1 == stop_at and context.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.progress.step + 1 in poison:
            batches = ((images * torch.nan, targets) for images, targets in batches)
        stop = step(self, stepper, running, batches)
        held = {
            "weights": held_bytes(stepper.task.trainable_module.state_dict()),
            "optimizer": held_bytes(stepper.optimizer.state),
            "average": held_bytes(stepper.task.trainable_module_ema.state_dict()) if context.recipe.ema else [0, 0],
        }
        (context.folder / f"held-{self.name}-{context.accelerator.process_index}.json").write_text(json.dumps(held))
        return stop

    trainer.Trainer._step = stepping
    try:
        train(load_recipe("digits", [*SMALL, *overrides, f"output_dir={folder}"]))
    except Interrupted:
        assert stop_at is not None
    finally:
        trainer.Trainer._step = step


def held_bytes(state: Any) -> list[int]:
    """Return how many bytes the tensors of a state take in this process, and how many they would take whole.

    What a tensor is a view of counts in full.
    """
    if isinstance(state, DTensor):
        return [state.to_local().untyped_storage().nbytes(), state.nbytes]
    if isinstance(state, torch.Tensor):
        return [state.untyped_storage().nbytes(), state.nbytes]
    values = state.values() if hasattr(state, "values") else ()
    parts = [held_bytes(value) for value in values]
    return [sum(part[0] for part in parts), sum(part[1] for part in parts)]


def keep_snapshot(folder: Path, repo_id: str, *, private: bool, commit_message: str | None = None) -> None:
    """Stand in for pushing."""
    if commit_message is not None:
        (folder / "model").rename(folder.with_name(f"pushed-{commit_message.split()[-3]}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
