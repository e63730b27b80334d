"""The network to compare with: the same backbone, trained on its own."""

import copy
from collections.abc import Mapping
from pathlib import Path

from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train.saved import SavedRun


def open_baseline(
    saved: SavedRun, model: SelfDistillModel, baseline: Path | None
) -> tuple[SelfDistillModel | None, str | None]:
    """Return the network whose backbone was trained on its own, and where it comes from.

    Args:
        saved: The run to analyze.
        model: Its model.
        baseline: A run's folder, or the model folder in it; the newest checkpoint of the run's own baseline by default.

    Returns:
        The network and a name for where it comes from; None and None where there is no such checkpoint.

    Raises:
        ValueError: If the baseline cannot be read, is the model itself, or has another backbone.
    """
    if baseline is None:
        found = saved.baseline_weights()
        if found is None:
            return None, None
        path, weights = found
        plain = copy.deepcopy(model)
        try:
            plain.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the model in {saved.model_folder}: {error}") from error
        return plain, f"{saved.folder.name}/checkpoints/baseline/{path.name}"
    other = SavedRun.find(baseline)
    if other.model_folder.resolve() == saved.model_folder.resolve():
        raise ValueError(f"--baseline {baseline} is the model that is to be analyzed: name another one.")
    plain = from_pretrained(other.model_folder)
    shapes, others = _shapes(model), _shapes(plain)
    if shapes != others:
        raise ValueError(
            f"--baseline {baseline} has another backbone ({plain.pretrained_cfg['architecture']} with "
            f"{len(others)} parameters; {saved.model_folder} is {model.pretrained_cfg['architecture']} with "
            f"{len(shapes)}), or other sizes: only equal backbones can be compared."
        )
    return plain, other.output.name


def check_input(folder: Path, plain: SelfDistillModel, input: InputConfig, recipe: Recipe) -> None:
    """Refuse a baseline that takes other images than the network is fed.

    Args:
        folder: Where it comes from.
        plain: The baseline.
        input: What the network is fed.
        recipe: Its data section says what of that does not depend on the model.
    """
    own = InputConfig.from_model(plain.backbone, recipe.data)
    if own != input:
        raise ValueError(f"--baseline {folder} takes other images: {own}, where the model takes {input}.")


def _shapes(model: SelfDistillModel) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.backbone.named_parameters()}
