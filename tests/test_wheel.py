"""The built wheel, installed apart from the checkout: it lists its recipes and trains the smallest one."""

import email
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SMALL = ["epochs=1", "batch_size=16", "data.max_train=32", "data.max_eval=10", "data.image_size=16", "precision='no'"]

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=900,
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheel alone; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=900)
    return folder


def run(site: Path, folder: Path, *command: str) -> str:
    """Run a command where only the wheel's library can be imported, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_library_is_the_wheels_and_knows_every_recipe(site, tmp_path):
    code = (
        "import timm_selfdistill as sd; print(sd.__file__); print(*[n for n in sd.list_recipes() if sd.load_recipe(n)])"
    )
    file, recipes = run(site, tmp_path, sys.executable, "-c", code).splitlines()
    assert Path(file) == site / "timm_selfdistill" / "__init__.py"
    assert recipes.split() == RECIPES
    listed = run(site, tmp_path, str(site / "bin" / "timm-selfdistill"), "recipes")
    assert [line.split()[0] for line in listed.splitlines()] == RECIPES


def test_digits_train(site, tmp_path):
    program = str(site / "bin" / "timm-selfdistill")
    run(site, tmp_path, program, "train", "digits", *SMALL, "output_dir=run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["exits"]] == ["layer1", "layer2", "layer3", "fc"]
    assert report["baseline"] is not None
    assert report["num_samples"] == 10
    saved = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert saved == {"config.json", "model.safetensors", "exits.safetensors", "README.md"}


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names} - {"timm_selfdistill"}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert info.endswith(".dist-info")
    assert {part for name in names for part in Path(name).parts} & {"tests", "benchmarks", "docs"} == set()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "timm_selfdistill").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {f"timm_selfdistill/recipes/{name}.yaml" for name in RECIPES} <= set(names)
    assert any(name.startswith("timm_selfdistill/digits/") for name in names)
    assert (metadata["Name"], metadata["License-Expression"]) == ("timm_selfdistill", "Apache-2.0")
    assert metadata["Version"] == sd.__version__
    assert {"timm_selfdistill/py.typed", "timm_selfdistill/__init__.pyi"} <= set(names)
    assert "timm-selfdistill = timm_selfdistill.cli:main" in entry_points
    assert licence == (ROOT / "LICENSE").read_text()


def test_what_a_package_index_shows(wheel):
    """It renders README.md without warnings, and every link leads out of the page: to the repository, or elsewhere."""
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(file))
    shown = metadata.get_payload()
    assert re.findall(r"\]\((?!https://|#)[^)]*", shown) == []
    repository = dict(line.split(", ") for line in metadata.get_all("Project-URL"))["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]*)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).is_file()
        assert f"]({repository}/blob/main/{link}" in shown or f"]({raw}/main/{link}" in shown


def test_metadata_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    repository = project["urls"]["Repository"]
    assert all(url.startswith(repository) for url in project["urls"].values())
    for key, value in {"repository-code": repository, "version": sd.__version__, "license": project["license"]}.items():
        assert citation[key] == value
    assert citation["authors"] == project["authors"]
    assert {"authors", "keywords", "classifiers", "urls"} <= set(project)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli(["--version"])
    assert capsys.readouterr().out == f"timm-selfdistill {sd.__version__}\n"
