"""Count the multiply-accumulates of whatever runs."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates of convolutions, matrix products, attention and LSTMs inside a `with` block.

    Torch's counter also credits each module with its share, through a tracker that fails on modules such as CaiT's
    and PiT's and loses its place when an exception ends a forward; this one counts the sum alone. LSTMs, for which
    torch has no formula, are added. `macs` may be read at any time, also while the block runs.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_RNN_FORMULAS)
        self.mod_tracker = _WholeRun()

    @property
    def macs(self) -> int:
        """Multiply-accumulates since the block was entered."""
        return int(self.get_total_flops()) // 2


class _WholeRun(ModuleTracker):
    """Tells the counter that everything belongs to the whole run, and hangs no hooks on any module."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def _onednn_rnn_flops(input: Sequence[int], *weights: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count one direction of one layer: two weight matrices (and two biases) applied at every step."""
    return _rnn_flops(input, weights[:4])


def _cudnn_rnn_flops(
    input: Sequence[int], weights: Sequence[Sequence[int]], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count all directions and layers: two weight matrices each."""
    return _rnn_flops(input, weights)


def _rnn_flops(input: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    steps = input[0] * input[1]
    return sum(2 * steps * shape[0] * shape[1] for shape in weights if len(shape) == 2)


_RNN_FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _onednn_rnn_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_rnn_flops,
}
