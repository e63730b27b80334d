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
print(*sorted({name.split(".")[0] for name, module in sys.modules.items() if module is not None}))
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


# What the extra `train` installs cannot be imported, as where it was left out.
WITHOUT_EXTRA = f"""
import sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None
"""

REFUSED = """
from timm_selfdistill.cli import main

def refusal(call):
    try:
        call()
    except ImportError as error:
        return str(error)
    raise AssertionError("nothing is missing")

def refused(*words):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2

print(refusal(lambda: sd.train(sd.load_recipe("digits"))))
print(refusal(lambda: sd.data.open_dataset))
print(refusal(lambda: sd.fit_ensemble(logits=torch.randn(2, 8, 3), target=torch.arange(8) % 3)))
print(refusal(lambda: __import__("timm_selfdistill.plugins.evaluate_metrics")))
sys.stderr = sys.stdout
refused("train", "digits")
refused("calibrate", "runs/digits")
assert main(["predict", "model", "a.png"]) == 0
assert main(["exits", "test_resnet", "--num", "1"]) == 0
"""


def test_public_names_need_and_load_torch_and_timm_only(tmp_path: Path) -> None:
    """One interpreter for what is loaded, what works without the extra `train`, and what is said where it does not."""
    said = run(WITHOUT_EXTRA + USED + REFUSED + LOADED, tmp_path).splitlines()
    extra = "pip install 'timm_selfdistill[train]'."
    assert said[:4] == [
        f"timm_selfdistill.train needs accelerate, which is not installed: {extra}",
        f"timm_selfdistill.data.open_dataset needs datasets, which is not installed: {extra}",
        f"fit_ensemble needs scipy, which is not installed: {extra}",
        f"timm_selfdistill.plugins.evaluate_metrics needs evaluate, which is not installed: {extra}",
    ]
    for command in ("train", "calibrate"):
        assert f"error: timm-selfdistill {command} needs accelerate, which is not installed: {extra}" in said
    assert any(line.startswith("a.png\t") for line in said)
    assert {"torch", "timm"} <= set(said[-1].split())


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
    # `timm_selfdistill.train` is both, and can be called.
    assert modules & set(sd.__all__) == {"train"}


def test_the_package_train_is_called_as_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm_selfdistill.train as package

    assert sd.train is package is sys.modules["timm_selfdistill.train"]
    monkeypatch.setattr(package, "train", lambda *args, **kwargs: (args, kwargs))
    assert sd.train("recipe", key=1) == (("recipe",), {"key": 1})
