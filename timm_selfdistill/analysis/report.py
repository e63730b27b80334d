"""What an analysis says."""

from typing import TypedDict

from timm_selfdistill.analysis.noise import NoisePoint
from timm_selfdistill.analysis.separability import Projection, Scatter


class NoiseCurves(TypedDict):
    """Accuracy and loss of the backbone's own classifier over the noise on its weights, for `draws` draws of it.

    `weight_rms` and `baseline_weight_rms` are the roots of the mean square of all weights, which the noise is to be
    seen beside.
    """

    draws: int
    network: list[NoisePoint]
    baseline: list[NoisePoint] | None
    weight_rms: float
    baseline_weight_rms: float | None


class StageGradients(TypedDict):
    """Mean magnitude of the gradient in one stage of the backbone, of `params` parameters; None where not finite.

    `network` is that of the loss that the run trained with, None where this cannot be computed; `network_ce` that of
    the cross-entropy of the backbone's own classifier alone, in the same network; `baseline` the same in the baseline,
    None where there is none.
    """

    name: str
    params: int
    network: float | None
    network_ce: float | None
    baseline: float | None


class Gradients(TypedDict):
    """Gradients by stage, over `num_batches` batches of `batch_size` images, augmented as in training, of `dataset`.

    `own_loss` tells why the loss that the run trained with is not among them; None where it is.
    """

    stages: list[StageGradients]
    dataset: str
    num_batches: int
    batch_size: int
    own_loss: str | None


class FeatureRow(TypedDict):
    """How well the features of one exit tell the classes apart; `name` is its module path, or "baseline"."""

    name: str
    scatter: Scatter
    projection: Projection


class Analysis(TypedDict):
    """The content of `analysis.json`.

    `features` go from shallow to deep, the last exit the backbone's own, then the baseline's own if there is one.
    `classes` are the names of the classes that are projected, by their index. `baseline` is where its weights come
    from, None if there is none.
    """

    noise: NoiseCurves
    gradients: Gradients
    features: list[FeatureRow]
    classes: dict[str, str]
    baseline: str | None
    backbone: str
    dataset: str
    num_samples: int
    num_skipped: int
    recipe: str
    precision: str
    seed: int
    versions: dict[str, str]
