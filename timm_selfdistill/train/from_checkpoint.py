"""The network in a run's newest checkpoint, as it would have been evaluated and saved: of use before the run ends."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timm_selfdistill.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import save_pretrained
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import RECIPE, Recipe, load_recipe
from timm_selfdistill.train.build import build_model
from timm_selfdistill.train.run_folder import CHECKPOINTS
from timm_selfdistill.train.run_record import ENTRY, RunRecord
from timm_selfdistill.train.saved import SavedRun, evaluated_weights


@dataclass(frozen=True)
class CheckpointModel:
    """The network in a checkpoint.

    Args:
        model: The network, in eval mode.
        recipe: The run's recipe, with the paths of this machine as far as they are known.
        record: What the run is, and how far it had come.
        step: Optimizer steps that had been taken.
        seconds: Time that had been spent on them.
    """

    model: SelfDistillModel
    recipe: Recipe
    record: RunRecord
    step: int
    seconds: float


def load_newest(folder: Path, network: str = "self-distilled") -> CheckpointModel:
    """Load a network from its newest whole checkpoint in a run's folder.

    Args:
        folder: The run's folder.
        network: Name of the network, "self-distilled" or "baseline".

    Raises:
        ValueError: If there is no such checkpoint, or it cannot be used.
    """
    path = latest_checkpoint(folder / CHECKPOINTS / network)
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint of the network {network!r}.")
    state = load_checkpoint(path)
    record = RunRecord.from_json(state.get(ENTRY))
    if record is None:
        raise ValueError(
            f"{path} was written by an earlier release, which did not keep the run's recipe and classes with it: let "
            "the run go on with this one to its next checkpoint."
        )
    recipe = load_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else record.recipe
    # Its weights come from the checkpoint.
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"pretrained": False})})
    model = build_model(plain, record.data.classes, recipe.data.path)
    try:
        model.load_state_dict(evaluated_weights(state))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network of the recipe beside it: {error}") from error
    return CheckpointModel(model.eval(), recipe, record, state["progress"]["step"], state["progress"]["seconds"])


@contextmanager
def opened_run(folder: Path, from_checkpoint: bool = False) -> Iterator[SavedRun]:
    """Give the body a saved model and its run.

    Args:
        folder: A run's folder, or the model folder in it.
        from_checkpoint: Take the network in the run's newest checkpoint, saved in a folder that lasts as long as the
            body.

    Raises:
        ValueError: If there is no checkpoint that can be used.
    """
    folder = folder.expanduser()
    if not from_checkpoint:
        yield SavedRun.find(folder)
        return
    found = load_newest(folder)
    with tempfile.TemporaryDirectory(prefix="timm-selfdistill-") as temporary:
        save_pretrained(
            found.model,
            temporary,
            label_names=found.record.data.classes,
            data_config=InputConfig.from_model(found.model.backbone, found.recipe.data).to_timm(),
            run=found.record.to_json(),
        )
        yield SavedRun(folder, Path(temporary))
