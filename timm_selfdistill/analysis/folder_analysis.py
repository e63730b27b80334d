"""Analyze a saved model: noise on its weights, gradients in its stages, features at its exits."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from timm_selfdistill.analysis.analysis_page import (
    Analysis,
    FeatureRow,
    Gradients,
    NoiseCurves,
    StageGradients,
    write_analysis,
)
from timm_selfdistill.analysis.probes import (
    Batches,
    BatchLoss,
    collect_features,
    find_stages,
    measure_gradients,
    measure_noise,
    measure_scatter,
    project,
)
from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.losses import Needs, TrainingTime, needs_of
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.model import ExitOutput, SelfDistillModel
from timm_selfdistill.recipe import AugmentSection, Recipe, load_recipe
from timm_selfdistill.report import versions
from timm_selfdistill.train import build_loss
from timm_selfdistill.train.launch import fresh_accelerate, make_accelerator
from timm_selfdistill.train.saved_run import SavedRun, check_classes, check_data, evaluation_loaders

IMAGES: Final = 1000
DRAWS: Final = 5
SIGMAS: Final = tuple(step / 500 for step in range(11))
_GRADIENT_BATCHES: Final = 4
_CLASSES: Final = 10
_POINTS: Final = 500


@fresh_accelerate()
def analyze_folder(
    folder: Path,
    data_path: str | None = None,
    overrides: Sequence[str] = (),
    *,
    baseline: Path | None = None,
    images: int = IMAGES,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = DRAWS,
    seed: int = 0,
    output: Path | None = None,
) -> Analysis:
    """Measure on a saved model what the method's paper explains its gain by, beside the backbone trained on its own.

    The first three arguments are those of `evaluate_folder`.

    Args:
        baseline: A run's folder, or the model folder in it, whose backbone is the one to compare with; by default that
            of the run's own baseline, if its checkpoint is there.
        images: How many images of the evaluation split to take at most, 2 or more.
        sigmas: Standard deviations of the noise on the weights; 0 is always among them.
        draws: How often noise is drawn.
        seed: Decides the noise, and what dropout draws.
        output: Folder for `analysis.json`, `.md` and `.png`; the run's by default, or the model's without a run.

    Raises:
        ValueError: If an argument is not allowed, the model, the baseline or the data cannot be read, or the data has
            other classes than the models.
    """
    sigmas = _check(images, sigmas, draws, seed)
    saved = SavedRun.find(folder)
    ran = None if saved.recipe_path is None else load_recipe(saved.recipe_path)
    model = from_pretrained(saved.model_folder)
    plain, origin = _open_baseline(saved, model, baseline)
    recipe = saved.evaluation_recipe(model, data_path, overrides)
    limit = min(images, recipe.data.max_eval or images)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_eval": limit})})
    data = open_dataset(recipe.data, recipe.seed)
    check_data(saved, recipe, data, is_own=data_path is None)
    fed = InputConfig.from_model(model.backbone, recipe.data)
    if baseline is not None and plain is not None:
        taken = InputConfig.from_model(plain.backbone, recipe.data)
        if taken != fed:
            raise ValueError(f"--baseline {baseline} takes other images: {taken}, where the model takes {fed}.")
        check_classes(SavedRun.find(baseline).model_folder, data)
    # Mixup and CutMix are left out: targets stay class indices.
    augment = (AugmentSection() if ran is None else ran.augment).model_copy(update={"mixup_prob": 0.0})
    loaders = evaluation_loaders(data, recipe, augment, fed, SkipList())
    accelerator = make_accelerator(recipe.precision)
    networks = {"network": model} if plain is None else {"network": model, "baseline": plain}
    for network in networks.values():
        network.to(accelerator.device)
    # Decoded once: every noisy network sees them again.
    batches = list(loaders.eval)
    labels = torch.cat([targets for _, targets in batches])
    num_samples = int((labels != IGNORED).sum())
    if num_samples < 2:
        raise ValueError(f"{data.name}, {recipe.data.eval_split}: 2 images are needed that can be decoded.")
    first = islice(loaders.train, _GRADIENT_BATCHES)
    training = [(images.to(accelerator.device), targets.to(accelerator.device)) for images, targets in first]
    noise = _noise(networks, batches, accelerator, sigmas, draws, seed)
    gradients = _gradients(model, plain, training, ran, seed, f"{data.name}, {recipe.data.train_split}")
    features = _features(model, plain, batches)
    drawn = sorted({label for row in features for label in row["projection"]["classes"]})
    analysis: Analysis = {
        "noise": noise,
        "gradients": gradients,
        "features": features,
        "classes": {str(label): data.class_names[label] for label in drawn},
        "baseline": origin,
        "backbone": model.pretrained_cfg["architecture"],
        "dataset": f"{data.name}, {recipe.data.eval_split}",
        "num_samples": num_samples,
        "num_skipped": len(labels) - num_samples,
        "recipe": saved.output.name,
        "precision": accelerator.mixed_precision,
        "seed": seed,
        "versions": versions(),
    }
    write_analysis(analysis, saved.output if output is None else output.expanduser())
    return analysis


def _check(images: int, sigmas: Sequence[float], draws: int, seed: int) -> tuple[float, ...]:
    """Refuse arguments that cannot work, and return the standard deviations in order, with 0."""
    for name, value, least in (("images", images, 2), ("draws", draws, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, received {value}.")
    wrong = [sigma for sigma in sigmas if not (math.isfinite(sigma) and sigma >= 0)]
    if wrong:
        raise ValueError(f"sigmas must be finite and 0 or more, received {', '.join(map(str, wrong))}.")
    return tuple(sorted({0.0, *sigmas}))


def _open_baseline(
    saved: SavedRun, model: SelfDistillModel, baseline: Path | None
) -> tuple[SelfDistillModel | None, str | None]:
    """Return the network whose backbone was trained on its own, and where it comes from; None where there is none."""
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
    shapes, others = (
        {name: weight.shape for name, weight in each.backbone.named_parameters()} for each in (model, plain)
    )
    if shapes != others:
        raise ValueError(
            f"--baseline {baseline} has another backbone ({plain.pretrained_cfg['architecture']} with "
            f"{len(others)} parameters; {saved.model_folder} is {model.pretrained_cfg['architecture']} with "
            f"{len(shapes)}), or other sizes: only equal backbones can be compared."
        )
    return plain, other.output.name


def _noise(
    networks: dict[str, SelfDistillModel],
    batches: Batches,
    accelerator: Accelerator,
    sigmas: Sequence[float],
    draws: int,
    seed: int,
) -> NoiseCurves:
    measure = partial(measure_noise, batches=batches, accelerator=accelerator, sigmas=sigmas, draws=draws, seed=seed)
    curves = {name: measure(network, title=f"{name}, noise") for name, network in networks.items()}
    sizes = {name: _rms(network) for name, network in networks.items()}
    return {
        "draws": draws,
        "network": curves["network"],
        "baseline": curves.get("baseline"),
        "weight_rms": sizes["network"],
        "baseline_weight_rms": sizes.get("baseline"),
    }


def _rms(model: SelfDistillModel) -> float:
    """Return the root of the mean square of all weights of a model's backbone."""
    weights = list(model.backbone.parameters())
    total = sum(float(weight.detach().double().square().sum()) for weight in weights)
    return math.sqrt(total / sum(weight.numel() for weight in weights))


def _gradients(
    model: SelfDistillModel,
    plain: SelfDistillModel | None,
    batches: Batches,
    ran: Recipe | None,
    seed: int,
    dataset: str,
) -> Gradients:
    stages = find_stages(model)
    reason, own = _own_loss(model, ran)

    def measure(network: SelfDistillModel | None, loss: BatchLoss | None) -> list[float | None]:
        if network is None or loss is None:
            return [None] * len(stages)
        return measure_gradients(network, batches, loss, list(stages.values()), seed=seed)

    columns = [measure(model, own), measure(model, _cross_entropy(model)), measure(plain, _cross_entropy(plain))]
    sizes = {name: weight.numel() for name, weight in model.backbone.named_parameters()}
    rows: list[StageGradients] = []
    for name, network, ce, of_baseline in zip(stages, *columns, strict=True):
        params = sum(sizes[parameter] for parameter in stages[name])
        rows.append({"name": name, "params": params, "network": network, "network_ce": ce, "baseline": of_baseline})
    return {
        "stages": rows,
        "dataset": dataset,
        "num_batches": len(batches),
        "batch_size": len(batches[0][1]),
        "own_loss": reason,
    }


def _own_loss(model: SelfDistillModel, ran: Recipe | None) -> tuple[str | None, BatchLoss | None]:
    """Return None and the loss that a run trained with, or why it cannot be computed here and None."""
    if ran is None:
        return "there is no recipe beside the model", None
    if ran.schedule.regime == "frozen":
        return "the backbone was frozen", None
    if ran.teacher is not None:
        return "a model from outside taught too", None
    criterion = build_loss(ran).to(next(model.parameters()).device)
    needs = needs_of(criterion)
    if needs.gate != 1 or needs.gate_fade:
        return "a gate changed the gradients of the exits", None
    if needs != Needs(time=needs.time, exits=needs.exits, features=needs.features, ensemble=needs.ensemble):
        return "the loss needs other networks or special batches", None
    # At the end of training, after any warm-up.
    given = {"time": TrainingTime(ran.epochs, ran.epochs)} if needs.time else {}

    def own(images: Tensor, targets: Tensor) -> Tensor:
        out = model(images, return_exits=True) if needs.exits else ExitOutput((model(images),), ())
        loss: Tensor = criterion(out, targets, **given)["loss"]
        return loss

    return None, own


def _cross_entropy(model: SelfDistillModel | None) -> BatchLoss | None:
    """Return the cross-entropy of the backbone's own classifier."""
    return None if model is None else lambda images, targets: F.cross_entropy(model(images), targets)


def _features(model: SelfDistillModel, plain: SelfDistillModel | None, batches: Batches) -> list[FeatureRow]:
    features, targets = collect_features(model, batches)
    rows = dict(zip(model.exit_names, features, strict=True))
    if plain is not None:
        rows["baseline"] = collect_features(plain, batches, "baseline, features")[0][-1]
    classes = sorted(set(targets.tolist()))[:_CLASSES]
    shown = torch.isin(targets, torch.tensor(classes)).nonzero().flatten()[:_POINTS]
    found: list[FeatureRow] = []
    for name, feature in rows.items():
        projection = project(feature[shown], targets[shown])
        found.append({"name": name, "scatter": measure_scatter(feature, targets), "projection": projection})
    return found
