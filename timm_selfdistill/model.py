"""The self-distilling model: a timm backbone with classifiers on its intermediate features."""

from typing import NamedTuple

from torch import Tensor


class ExitOutput(NamedTuple):
    """What a model returns with `return_exits=True`, shallow to deep; the last entry is the backbone's own.

    Args:
        logits: K + 1 tensors [B, num_classes].
        features: K + 1 tensors [B, D], D the width of what enters the backbone's classifier.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
