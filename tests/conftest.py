import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from forks import TRAINING, ForkServer, fork_server
from PIL import Image
from quick_reports import quicken
from torch import Tensor, nn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, and so name, what takes very long, unless a `-m` expression chooses."""
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run it with -m slow"))


def pytest_collection_finish() -> None:
    """Let the garbage collector run more rarely, and leave alone what was imported: it took an eighth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


def pytest_unconfigure() -> None:
    """At the end of the process it looks at everything again: nanobind reports what is left."""
    gc.unfreeze()


# The tensors are tiny: more threads would only wait for one another.
torch.set_num_threads(1)

CLASSES = 5

# One small member of each way in which timm's families differ: layout, prefix tokens, classifier, batch norm.
FAMILIES = {
    "resnet18": {"channels": [16, 32, 64, 128]},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
    },
    "convnext_atto": {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "test_efficientnet": {},
}


@pytest.fixture
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` store what it makes below the test's folder, and download nothing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # `datasets` waits 5 seconds after each pass over a shuffled stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """What starts processes that train without importing torch again."""
    with fork_server(TRAINING, tmp_path_factory, {"HF_HUB_OFFLINE": "1"}) as server:
        yield server


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of the first run in a process-wide state."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run gives must not depend on the machine's instructions, by which precision: auto chooses."""
    monkeypatch.setattr("timm_selfdistill.train.launch.cpu_computes_bf16", lambda: False)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each small backbone in turn."""
    return request.param


@pytest.fixture
def make_backbone() -> Callable[..., nn.Module]:
    """A function that creates a small timm model, the same weights every time."""

    def make(name: str, seed: int = 0, **kwargs: object) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(name, **{"num_classes": CLASSES, **FAMILIES.get(name, {}), **kwargs})

    return make


@pytest.fixture
def images() -> Tensor:
    """Four images [4, 3, 64, 64]."""
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are not about the times and the picture in a report."""
    if "whole_reports" not in request.keywords:
        quicken(monkeypatch.setattr)


@pytest.fixture(scope="session")
def make_image_folder() -> Callable[..., Path]:
    """A function that writes an image folder as timm reads it: SPLIT/CLASS/IMAGE.png."""

    def make(folder: Path, classes: int = 4, train: int = 8, validation: int = 5) -> Path:
        generator = np.random.default_rng(0)
        for split, count in (("train", train), ("validation", validation)):
            for index in range(classes):
                # Brightness tells the class.
                pixels = (
                    generator.normal(40 + 180 * index / classes, 20, (count, 24, 24, 3)).clip(0, 255).astype("uint8")
                )
                (folder / split / f"class{index}").mkdir(parents=True)
                for number, image in enumerate(pixels):
                    Image.fromarray(image).save(folder / split / f"class{index}" / f"{number}.png")
        return folder

    return make


@pytest.fixture
def tiny_net() -> type[nn.Module]:
    """A class of backbone that is not timm's and follows its contract."""
    return TinyNet


class TinyNet(nn.Module):
    """Three strided convolutions, one activation module that runs behind each, and a module that never runs."""

    def __init__(self, num_classes: int = CLASSES, size: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 32
        self.size = size
        self.feature_info = [{"module": f"stage{n}", "num_chs": 8 * 2**n, "reduction": 2 * 2**n} for n in range(3)]
        self.stage0 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage1 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.stage2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.unused = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.size, self.size):
            raise RuntimeError(f"only {self.size} px")
        x = self.act(self.stage0(x))
        x = self.act(self.stage1(x))
        x = self.act(self.stage2(x))
        return self.fc(x.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(32, num_classes)
