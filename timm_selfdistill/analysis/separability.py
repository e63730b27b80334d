"""How well the features of an exit tell the classes apart."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.model import SelfDistillModel


class Scatter(TypedDict):
    """Squared distances, means over the images: `within` from each to the mean of its class, `between` from the mean of
    its class to that of all; `ratio` is the first over the second, None where the latter is 0.
    """

    within: float
    between: float
    ratio: float | None


class Projection(TypedDict):
    """Features on the two directions in which they vary most.

    `points` holds [x, y] for each image, `classes` its class index; `explained` is the share of the features' variance
    in each direction, 0 to 1.
    """

    points: list[list[float]]
    classes: list[int]
    explained: list[float]


@torch.no_grad()
def collect_features(
    model: SelfDistillModel, batches: Sequence[tuple[Tensor, Tensor]], title: str = "features"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the features of every exit for every image, in eval mode.

    Args:
        model: The wrapped model; left in eval mode.
        batches: Images [B, C, H, W] and targets [B]; targets IGNORED are left out.
        title: Shown by the progress bar.

    Returns:
        K + 1 tensors [N, D], shallow to deep, the last the backbone's own, in float64; targets [N]. On the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    features: list[list[Tensor]] = [[] for _ in model.exit_names]
    targets = []
    for images, labels in tqdm(batches, desc=title, leave=False):
        known = labels.cpu() != IGNORED
        targets.append(labels.cpu()[known].long())
        out = model(images.to(device), return_exits=True)
        for found, feature in zip(features, out.features, strict=True):
            found.append(feature.cpu().double()[known])
    return tuple(torch.cat(found) for found in features), torch.cat(targets)


def measure_scatter(features: Tensor, targets: Tensor) -> Scatter:
    """Measure how far images lie from the mean of their class, and these means from one another.

    With N images, feature f_i of image i, mean m_c of the n_c images of class c, and mean m of all:
    `within = sum_i |f_i - m_c(i)|^2 / N`, `between = sum_c n_c |m_c - m|^2 / N`. These are the traces of the within-
    and between-class scatter matrices of discriminant analysis, divided by N; the ratio is that of the sums of squares
    that the ICCV paper reports (https://arxiv.org/abs/1905.08094). It does not depend on the scale of the features.

    Args:
        features: Features [N, D].
        targets: Class indices [N].
    """
    total_mean = features.mean(0)
    within = between = 0.0
    for label in sorted(set(targets.tolist())):
        members = features[targets == label]
        mean = members.mean(0)
        within += float((members - mean).square().sum())
        between += len(members) * float((mean - total_mean).square().sum())
    count = len(features)
    return {"within": within / count, "between": between / count, "ratio": within / between if between else None}


def project(features: Tensor, targets: Tensor) -> Projection:
    """Project features on their first two principal components.

    Args:
        features: Features [N, D], D at least 2.
        targets: Class indices [N].
    """
    centred = features - features.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors[:, -2:].flip(1)
    # A direction has no sign of its own: the entry of largest magnitude is made positive.
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    total = float(values.clamp(min=0).sum())
    explained = [max(float(value), 0.0) / total if total else 0.0 for value in values[-2:].flip(0)]
    return {"points": (centred @ (directions * signs)).tolist(), "classes": targets.tolist(), "explained": explained}
