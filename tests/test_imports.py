"""What is imported when: nothing before it is needed."""

import os
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import timm_selfdistill as sd

pytestmark = pytest.mark.multiprocess

HEAVY = {"accelerate", "datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "scipy"}
LOADED = """
import sys
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""

USED = """
import timm
import torch
from PIL import Image
import timm_selfdistill as sd
from timm_selfdistill import *

assert timm.is_model("cifar_wrn20_8")
model = sd.wrap("test_resnet", num_classes=4, image_size=64)
x = torch.randn(2, 3, 64, 64)
sd.SelfDistillationTask(model)(x, torch.tensor([0, 1]))["loss"].backward()
sd.EarlyExit(model.eval(), 0.5)(x)
sd.truncate(model, 0)(x)
sd.save_pretrained(model, "model")
sd.from_pretrained("model")
sd.export_model(model, 0, "exit-0", format="safetensors")
sd.load_exported("exit-0")
Image.new("RGB", (64, 64)).save("a.png")
list(sd.predict_images(model, ["a.png"]))
"""


def run(code: str, folder: Path) -> str:
    """Return what code prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_load_torch_and_timm_only(tmp_path: Path) -> None:
    loaded = set(run(USED + LOADED, tmp_path).split())
    assert {"torch", "timm"} <= loaded
    assert loaded & HEAVY == set()


def test_the_package_alone_loads_neither_torch_nor_timm(tmp_path: Path) -> None:
    assert not {"torch", "timm", "numpy"} & set(run("import timm_selfdistill" + LOADED, tmp_path).split())


def command(folder: Path, torch: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command where importing torch or timm runs another code."""
    for name in ("torch", "timm"):
        (folder / f"{name}.py").write_text(torch)
    paths = [str(folder), str(Path(sd.__file__).parents[1])]
    return subprocess.run(
        [sys.executable, "-m", "timm_selfdistill.cli", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize(("word", "shown"), [("--help", "{init,train,finish,"), ("recipes", "digits   ")])
def test_the_command_loads_neither_for_what_needs_neither(word: str, shown: str, tmp_path: Path) -> None:
    done = command(tmp_path, "raise RuntimeError('It is imported.')", word)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_signal_during_the_import_ends_the_command_with_one_line(number: str, status: int, tmp_path: Path) -> None:
    torch = f"import os, signal, time\nos.kill(os.getpid(), signal.{number})\ntime.sleep(30)\n"
    done = command(tmp_path, torch, "predict", "model", "a.png")
    assert done.returncode == status
    assert done.stderr == f"Stopped by {number}. Run the same command again to go on.\n"


@pytest.mark.parametrize("first", ["timm_selfdistill", "timm_selfdistill.exits"])
def test_timm_knows_our_networks_if_it_is_imported_last(first: str, tmp_path: Path) -> None:
    code = f"import {first}\nimport timm, timm_selfdistill\nprint(timm.is_model('cifar_wrn20_8'))"
    assert run(code, tmp_path) == "True\n"


def test_names_are_there_as_if_they_had_been_imported() -> None:
    assert set(sd.__all__) <= set(dir(sd))
    for name in sd.__all__:
        value = getattr(sd, name)
        assert callable(value), name
        assert pickle.loads(pickle.dumps(value)) is value
        assert vars(sd)[name] is value
    assert "wrap(" in pydoc.render_doc(sd, renderer=pydoc.plaintext)
    assert sd.losses is sys.modules["timm_selfdistill.losses"]
    with pytest.raises(AttributeError, match="module 'timm_selfdistill' has no attribute 'warp'"):
        _ = sd.warp
    with pytest.raises(ImportError, match="warp"):
        exec("from timm_selfdistill import warp")


def test_no_module_hides_a_public_name() -> None:
    modules = {path.stem for path in Path(sd.__file__).parent.iterdir()}
    assert modules & set(sd.__all__) == set()
