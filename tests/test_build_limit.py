"""Models that are larger than a machine, or than any model, are refused before they are given memory."""

import contextlib
import cProfile
import pstats
import statistics
import sys
import threading
import time

import pytest
import timm
import torch
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.measure import BuildLimit, TooLargeError


def test_what_builds_too_much_is_ended_whatever_it_catches() -> None:
    def build() -> None:
        with contextlib.suppress(Exception):  # as third-party code does
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))

    for limit, part in (
        (BuildLimit(10, 100), "parameters"),
        (BuildLimit(100, 5), "modules"),
        (BuildLimit(99, 99, 50), "work"),
    ):
        with pytest.raises(TooLargeError, match=part), limit:
            build()
    with BuildLimit(40, 20, 10_000) as limit:
        build()
    with pytest.raises(TooLargeError, match="parameters"), limit:  # entered again, it goes on counting
        build()
    assert sys.getprofile() is None
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_a_profiler_goes_on_after_it() -> None:
    profile = cProfile.Profile()
    profile.enable()
    with BuildLimit(40, 20, 10_000):
        nn.Linear(1, 1)
    statistics.median([1.0])
    profile.disable()
    names = {name for _, _, name in pstats.Stats(profile).stats}
    assert "median" in names


def test_other_threads_may_build_what_they_want() -> None:
    with BuildLimit(1, 1, 10_000):
        thread = threading.Thread(target=lambda: built.append(nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))))
        built: list[nn.Module] = []
        thread.start()
        thread.join()
    assert len(built[0]) == 50


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": [20_000, 1, 1, 1]}, r"'test_resnet' with .*20000.* has more than 10,000 parameters"),
        ({"channels": [32, 48, 10**6, 96]}, r"has weights of [\d,]+ GiB, and this machine has"),
    ],
)
def test_a_backbone_beyond_the_machine_is_refused_at_once(kwargs: dict[str, object], message: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        sd.wrap("test_resnet", num_classes=4, image_size=64, model_kwargs=kwargs)
    assert time.process_time() - began < 60  # some seconds on a fast machine


def test_a_backbone_has_the_weights_of_its_seed() -> None:
    """What is built to find out its size draws no number."""
    for name in ("test_resnet", "test_vit"):
        torch.manual_seed(0)
        expected = timm.create_model(name, num_classes=4).state_dict()
        torch.manual_seed(0)
        found = sd.wrap(name, num_classes=4).backbone.state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
