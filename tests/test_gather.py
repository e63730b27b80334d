"""Samples of one process; those of several are in test_metrics.py and test_multiprocess.py."""

import pytest
import torch

from timm_selfdistill.gather import SampleGatherer


@pytest.mark.parametrize(("count", "most"), [(7, None), (7, 7), (40, 16), (41, 10), (1000, 1)])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_too_many_samples_are_thinned_out_evenly(count: int, most: int | None, batch: int) -> None:
    samples = SampleGatherer(most=most)
    for part in torch.arange(count).split(batch):
        samples.add(torch.stack([part, -part], 1).float(), part)
    values, labels = samples.gather((2,))
    step = int(labels[1] - labels[0]) if len(labels) > 1 else count
    assert labels.tolist() == list(range(0, count, step))
    assert values.tolist() == [[label, -label] for label in labels.tolist()]
    assert len(labels) <= (most or count)
    assert most is None or 2 * len(labels) >= min(most, count)
    assert samples.gather((2,))[0].shape == (0, 2)
