"""Damaged and hostile input: the answer is what was saved, or an error that says what is wrong; nothing is executed."""

import copy
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, configuration, example, given, settings
from hypothesis import strategies as st

import timm_selfdistill as sd
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.hub import CONFIG, read_early_exit
from timm_selfdistill.recipe import Recipe, RecipeError, list_recipes, load_recipe, read_settings
from timm_selfdistill.train.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parents[1]

# Hypothesis writes a folder of its own even without a database.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")


def bounded(max_examples: int) -> settings:
    """The same examples every time, nothing stored."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


# Sizes that would really be allocated are left out: to fill the memory is not to be clear.
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 10**20, -(10**20), 10**400, 0.0, -0.5, 0.5, 1.5, 1e300, 1e-320])
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
WORDS = st.sampled_from(
    ["", "no", "auto", "resnet18", "test", "train", "1e9", "../x", "a\0b", "layer1", "é", "x" * 300]
)
SCALARS = st.none() | st.booleans() | NUMBERS | NOT_FINITE | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3)
)


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


DEEP = st.builds(nested, st.sampled_from([19, 21, 400]), st.sampled_from(["list", "dict"]))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below the root of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """A JSON tree with one or two nodes replaced, removed, added or swapped."""
    tree, values = copy.deepcopy(tree), values.map(copy.deepcopy)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(tree)) or [()]))
        if not path:
            return draw(values)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
        if action == "replace":
            parent[path[-1]] = draw(values)
        elif action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(WORDS)] = draw(values)
        elif action == "add":
            parent.insert(path[-1], draw(values))
        else:
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(action: Callable[[], Any], allowed: type[Exception] = ValueError) -> tuple[Any, Any]:
    """What the action returns, and the error that it raises, which must be an allowed one."""
    try:
        return action(), None
    except allowed as error:
        return None, error


def check_recipe(load: Callable[[], Recipe], folder: Path) -> None:
    """It is a recipe that is written and read back to an equal one, or an error whose every line names a place."""
    recipe, error = outcome(load, RecipeError)
    if recipe is not None:
        (folder / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(folder / "again.yaml") == recipe
    else:
        assert error.problems
        assert all(re.match(r"[^ ].*: |must be|not valid|is nested", problem) for problem in error.problems), error


EXAMPLE = load_recipe("digits", ["ema={}", "push_to_hub={repo: me/net}"]).model_dump(mode="json")
EXOTIC = st.sampled_from(
    [b"bytes", {1, 2}, {1: 2}, {None: 1}, {("a",): 1}, object(), 1j, Path("x"), np.float32(1), len]
)


@bounded(250)
@given(mutated(EXAMPLE, VALUES | DEEP | EXOTIC))
def test_recipes_with_wrong_values(folder: Path, mapping: Any) -> None:
    if isinstance(mapping, dict):
        check_recipe(lambda: load_recipe(mapping), folder)


TAGGED = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [SENTINEL]]"
SNIPPETS = st.sampled_from(
    [
        *(
            "\n",
            "  ",
            "\t",
            "- ",
            ": ",
            "? ",
            "#",
            "&a ",
            "*a",
            "<<: ",
            "{",
            "}",
            "[",
            "]",
            "|",
            ">",
            "%YAML 1.1\n",
            "---\n",
        ),
        *(
            "...\n",
            "'",
            '"',
            "\\",
            "\0",
            "\ufeff",
            "\ud800",
            "!!set ",
            "!!binary aa",
            "!x ",
            "!!int x",
            "!!float ",
            "0x",
        ),
        *("9" * 5000, "1e999", "[" * 1200, "{a: " * 300, "a: b: c", "!!python/name:os.system ", f"\nx: {TAGGED}\n"),
        *(TAGGED, "!!python/object/new:os.system [touch SENTINEL]", "!!js/function 'x'", "2020-01-01", "\u2028"),
    ]
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """The text of a shipped recipe, with snippets put in and pieces cut out."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(SNIPPETS | st.text(max_size=5)) + text[at + draw(st.integers(0, 3)) :]
    return text


TEXTS = {name: (ROOT / "recipes" / f"{name}.yaml").read_text() for name in list_recipes()}


@bounded(250)
@given(texts())
@example(f"a: {TAGGED}")
def test_recipes_of_damaged_text(folder: Path, text: str) -> None:
    sentinel = folder / "executed"
    text = text.replace("SENTINEL", str(sentinel))
    (folder / "damaged.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    check_recipe(lambda: load_recipe(folder / "damaged.yaml"), folder)
    assert not sentinel.exists()


@bounded(100)
@given(st.sampled_from(sorted(TEXTS)), st.integers(0, 400), st.binary(max_size=6))
def test_recipes_of_damaged_bytes(folder: Path, name: str, at: int, damage: bytes) -> None:
    data = TEXTS[name].encode()
    (folder / "damaged.yaml").write_bytes(data[:at] + damage + data[at + len(damage) :])
    check_recipe(lambda: load_recipe(folder / "damaged.yaml"), folder)


KEYS = st.sampled_from(
    [".".join(map(str, path)) for path in places(EXAMPLE) if all(isinstance(key, str) for key in path)]
) | st.lists(st.sampled_from(["model", "kwargs", "data", "x", "", "epochs", "0"]), max_size=30).map(".".join)
OVERRIDES = st.one_of(
    st.tuples(KEYS, SNIPPETS | st.text(max_size=8) | VALUES.map(str)).map("=".join), SNIPPETS, st.text(max_size=12)
)


@bounded(250)
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_overrides_of_any_text(folder: Path, overrides: list[str]) -> None:
    sentinel = folder / "executed"
    overrides = [override.replace("SENTINEL", str(sentinel)) for override in overrides]
    check_recipe(lambda: load_recipe("digits", overrides), folder)
    found, error = outcome(lambda: read_settings(overrides))
    assert isinstance(found, dict) if error is None else "override" in str(error)
    assert not sentinel.exists()


STATE = {
    "step": 3,
    "values": [1.5, math.inf, None, True, "text", (1, 2)],
    "weights": {0: torch.arange(6.0).reshape(2, 3).t(), "half": torch.ones(3, dtype=torch.bfloat16)},
    "array": np.arange(4, dtype=np.uint32),
    "scalar": np.float64(2.5),
}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, types, strides and bits included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    """A folder with two checkpoints."""
    for step in (1, 2):
        save_checkpoint(folder / "saved", STATE | {"step": step}, step)
    return folder / "saved"


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """Something that happens to the files of a folder."""
    kind = draw(st.sampled_from(["flip", "cut", "extend", "empty", "delete", "swap", "folder", "insert"]))
    at, bit, junk = draw(st.floats(0, 1)), draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=9))
    pick, other = draw(st.integers(0, 9)), draw(st.integers(0, 9))

    def damage(path: Path) -> None:
        files = sorted(file for file in path.iterdir() if file.is_file())
        file, second = files[pick % len(files)], files[other % len(files)]
        data = file.read_bytes()
        place = int(at * (len(data) - 1)) if data else 0
        if kind == "flip" and data:
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        elif kind in ("flip", "cut"):
            file.write_bytes(data[:place])
        elif kind in ("extend", "insert"):
            place = len(data) if kind == "extend" else place
            file.write_bytes(data[:place] + junk + data[place:])
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "swap":
            file.write_bytes(second.read_bytes())
            second.write_bytes(data)
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()

    return damage


@pytest.fixture
def run(folder: Path) -> Path:
    """Where each example puts a copy."""
    return folder / "copy"


def copied(saved: Path, run: Path) -> Path:
    """A fresh copy of the checkpoints, of which the newer one is to be harmed."""
    shutil.rmtree(run, ignore_errors=True)
    return shutil.copytree(saved, run) / "checkpoint-2"


@bounded(150)
@given(st.lists(damages(), min_size=1, max_size=2))
def test_damaged_checkpoints(saved: Path, run: Path, harms: list[Callable[[Path], None]]) -> None:
    newest = copied(saved, run)
    for harm in harms:
        harm(newest)
    state, error = outcome(lambda: load_checkpoint(newest), CheckpointError)
    if error is None:
        assert same(state, STATE | {"step": 2})
        assert latest_checkpoint(run) == newest
    else:
        assert str(newest) in str(error)
        assert isinstance(error, DamagedCheckpointError)
        assert latest_checkpoint(run) == run / "checkpoint-1"
    assert same(load_checkpoint(run / "checkpoint-1"), STATE | {"step": 1})


KINDS = st.sampled_from(["dict", "tuple", "float", "tensor", "array", "scalar"])
NODES = VALUES | DEEP | st.dictionaries(KINDS, VALUES, max_size=1)


@bounded(200)
@given(st.data())
def test_forged_states(saved: Path, run: Path, data: st.DataObject) -> None:
    """Whoever means harm writes the checksums anew."""
    newest = copied(saved, run)
    manifest = json.loads((newest / "manifest.json").read_text())
    if data.draw(st.booleans()):
        tree = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(data.draw(mutated(tree, NODES))))
    else:
        data.draw(damages())(newest)
    for name, entry in manifest["files"].items():
        if (newest / name).is_file():
            content = (newest / name).read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    if not (newest / "manifest.json").is_dir():
        (newest / "manifest.json").write_text(json.dumps(manifest))
    state, error = outcome(lambda: load_checkpoint(newest), CheckpointError)
    assert isinstance(state, dict) if error is None else str(newest) in str(error)


@bounded(100)
@given(st.data())
def test_forged_manifests(saved: Path, run: Path, data: st.DataObject) -> None:
    newest = copied(saved, run)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(data.draw(mutated(manifest, VALUES | DEEP))))
    state, error = outcome(lambda: load_checkpoint(newest), CheckpointError)
    latest, refused = outcome(lambda: latest_checkpoint(run), CheckpointError)
    if error is None:
        assert same(state, STATE | {"step": 2})
        assert latest == newest
    elif isinstance(error, DamagedCheckpointError):
        assert latest == run / "checkpoint-1"
    else:
        assert "version" in str(error)
        assert str(refused) == str(error)


SETTINGS = EarlyExitConfig((0.5, math.inf), temperatures=(1.0, 2.0)).to_json()


@pytest.fixture(scope="module")
def model_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    model = sd.wrap("vit_tiny_patch16_224", num_classes=3, exits=2, model_kwargs=kwargs)
    early_exit = EarlyExitConfig.from_json(SETTINGS)
    return sd.save_pretrained(model, folder / "model", label_names=["a", "b", "c"], early_exit=early_exit)


def check_model(path: Path) -> None:
    """It loads and runs, or the error says what is wrong; so do its settings of early exit."""
    model, error = outcome(lambda: sd.from_pretrained(path))
    if error is None:
        with torch.no_grad():
            out = model(torch.zeros(1, 3, *model.wrap_config.image_size), return_exits=True)
        assert len(out.logits) == model.num_exits + 1
    else:
        assert str(path) in str(error)
    early_exit, error = outcome(lambda: read_early_exit(path))
    assert isinstance(early_exit, EarlyExitConfig | None) if error is None else str(path) in str(error)


def test_what_is_not_damaged_is_read(saved: Path, model_folder: Path, folder: Path) -> None:
    """Else the tests of damage would prove nothing."""
    assert same(load_checkpoint(saved / "checkpoint-2"), STATE | {"step": 2})
    assert sd.from_pretrained(model_folder).num_exits == 2
    assert read_early_exit(model_folder) == EarlyExitConfig.from_json(SETTINGS)
    (folder / "example.yaml").write_text(load_recipe(EXAMPLE).to_yaml())
    assert load_recipe(folder / "example.yaml") == load_recipe(EXAMPLE)


@bounded(50)
@given(st.data())
def test_model_folders_with_another_configuration(folder: Path, model_folder: Path, data: st.DataObject) -> None:
    path = folder / "other"
    shutil.copytree(model_folder, path, dirs_exist_ok=True)
    config = json.loads((model_folder / CONFIG).read_text())
    if data.draw(st.booleans()):
        config["timm_selfdistill"] = data.draw(mutated(config["timm_selfdistill"], VALUES | DEEP))
    else:
        config = data.draw(mutated(config, VALUES | DEEP))
    (path / CONFIG).write_text(json.dumps(config))
    check_model(path)


@bounded(30)
@given(damages())
def test_damaged_model_folders(folder: Path, model_folder: Path, harm: Callable[[Path], None]) -> None:
    path = folder / "harmed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(model_folder, path)
    harm(path)
    check_model(path)


@bounded(300)
@given(mutated(SETTINGS, VALUES) | VALUES)
def test_early_exit_settings(saved_settings: Any) -> None:
    config, error = outcome(lambda: EarlyExitConfig.from_json(saved_settings))
    assert error is not None or EarlyExitConfig.from_json(config.to_json()) == config
