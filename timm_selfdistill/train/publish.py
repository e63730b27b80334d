"""What a run saves of its model, and what it pushes to the Hugging Face Hub."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from timm_selfdistill.data import ImageData
from timm_selfdistill.data.sources import is_on_hub
from timm_selfdistill.data.survey import fingerprint
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.escape import redact
from timm_selfdistill.hub import (
    HubError,
    Training,
    from_pretrained,
    make_repository,
    model_card,
    push_folder,
    read_early_exit,
    save_pretrained,
)
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import RECIPE, PushSection, Recipe
from timm_selfdistill.report import Report, format_markdown
from timm_selfdistill.stop import in_background
from timm_selfdistill.train.run_folder import MODEL, RunRecord

_logger = logging.getLogger(__name__)


class ModelWriter:
    """Saves a run's model, with what plain timm needs to know of its input and a card that says how it was trained."""

    def __init__(self, recipe: Recipe, data: ImageData, input_config: InputConfig) -> None:
        shared = recipe.without_local_paths()
        self._recipe, self._dataset = recipe, shared.data.path
        self._record = RunRecord(shared, fingerprint(data, recipe.data))
        self._class_names = data.class_names
        self._data_config = input_config.to_timm()
        self.shared_recipe = redact(shared.to_yaml())

    def save(
        self,
        model: SelfDistillModel,
        folder: Path,
        report: Report | None = None,
        note: str = "",
        epochs: tuple[int, int] | None = None,
    ) -> None:
        """Write the model and its card, which `note` ends; early-exit settings for the very same weights are kept.

        `epochs` says how many epochs of the run are done, and of how many; all by default.
        """
        recipe = self._recipe
        done, total = epochs or (recipe.epochs, recipe.epochs)
        # The weights that training started from are under a licence of their own, which what is made of them inherits.
        origin = model.pretrained_cfg if recipe.model.pretrained else {}
        training = Training(
            dataset=self._dataset,
            on_hub=is_on_hub(recipe.data.path),
            base_model=origin.get("hf_hub_id"),
            recipe=self.shared_recipe,
            report=report,
            table="" if report is None else format_markdown(report),
        )
        chosen = recipe.push_to_hub.license if recipe.push_to_hub is not None else None
        early_exit = _settings_for(model, folder)
        card = model_card(model, training, license=chosen or origin.get("license"), early_exit=early_exit)
        save_pretrained(
            model,
            folder,
            label_names=self._class_names,
            data_config=self._data_config,
            early_exit=early_exit,
            card=f"{card}{note}",
            run=replace(self._record, epochs_done=done, epochs=total).to_json(),
        )


class Publisher:
    """Pushes a run's model to the Hub: in the background while it trains, and when it is done.

    A push that stalls does not keep a run from being stopped: it is given up, and what is stored here is unchanged.
    The constructor makes the repository, and so proves the token, before training; it and `finish` raise `HubError`.
    """

    def __init__(self, push: PushSection, folder: Path, writer: ModelWriter) -> None:
        make_repository(push.repo, private=push.private)
        self._push, self._folder, self._writer = push, folder, writer
        self._snapshot = folder / ".pushing"
        self._running: Future[bool] | None = None

    def after_epoch(self, model: SelfDistillModel, epoch: int, total: int) -> None:
        """Start to push the model, which may change afterwards, if it is due and the push before is done."""
        if self._push.every is None or epoch % self._push.every or epoch == total:
            return
        if self._running is not None and not self._running.done():
            _logger.warning("Epoch %d is not pushed: the push before it still runs.", epoch)
            return
        done = f"epoch {epoch} of {total}"
        # Saved on this thread, as training goes on to change the weights.
        if self._succeeds(partial(self._save_snapshot, model, done, (epoch, total))):
            private, message = self._push.private, f"Add the model after {done}"
            push = partial(push_folder, self._snapshot, self._push.repo, private=private, commit_message=message)
            self._running = in_background(partial(self._succeeds, push), "push-to-hub")

    def finish(self) -> None:
        """Push the complete run; if that fails, the message names the command that pushes it."""
        if self._running is not None:
            self._running.result()
        shutil.rmtree(self._snapshot, ignore_errors=True)
        try:
            push = partial(push_folder, self._folder, self._push.repo, private=self._push.private)
            in_background(push, "push-to-hub").result()
        except HubError as error:
            again = f"timm-selfdistill push {self._folder} {self._push.repo}"
            raise HubError(f"{error} The run is complete in {self._folder}; push it again by: {again}") from error

    def _save_snapshot(self, model: SelfDistillModel, done: str, epochs: tuple[int, int]) -> None:
        note = f"\nTraining goes on: this is the model after {done}.\n"
        self._writer.save(model, self._snapshot / MODEL, note=note, epochs=epochs)
        (self._snapshot / RECIPE).write_text(self._writer.shared_recipe)

    def _succeeds(self, work: Callable[[], object]) -> bool:
        """Do what a training must not stop for."""
        try:
            work()
        except (HubError, OSError, ValueError) as error:
            _logger.warning("%s Training goes on.", error)
            return False
        return True


def _settings_for(model: SelfDistillModel, folder: Path) -> EarlyExitConfig | None:
    """Return the early-exit settings that are saved in a folder beside the weights of this model, if there are any."""
    try:
        settings = read_early_exit(folder)
        before = None if settings is None else from_pretrained(folder).state_dict()
    except ValueError:  # no model there, or a damaged one
        return None
    now = model.state_dict()
    if before is None or before.keys() != now.keys():
        return None
    same = all(torch.equal(tensor.cpu(), before[name]) for name, tensor in now.items())
    return settings if same else None
