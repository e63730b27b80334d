"""Recipes: defaults, errors that say everything at once, overrides, YAML traps, and the shipped files."""

import copy
import dataclasses
import inspect
import pickle
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from timm_selfdistill.recipe import LossSection, Recipe, RecipeError, dump_local, list_recipes, load_recipe
from timm_selfdistill.recipe.loss_settings import OutsideTeacherConfig, SelfDistillationConfig
from timm_selfdistill.recipe.plain_yaml import dump

ROOT = Path(__file__).parents[1]
MINIMAL = "model: {name: resnet18}\ndata: {path: digits}\n"

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str | bytes = MINIMAL, *overrides: str) -> Recipe:
        path = tmp_path / "trial.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def problems(load: Load) -> Callable[..., tuple[str, ...]]:
    def problems(text: str | bytes = MINIMAL, *overrides: str) -> tuple[str, ...]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return problems


def test_defaults_are_the_agreed_ones(load):
    recipe = load()
    assert recipe.model.model_dump() == {
        "name": "resnet18",
        "num_classes": None,
        "pretrained": False,
        "weights": None,
        "grad_checkpointing": False,
        "small_stem": False,
        "channels_last": True,
        "kwargs": {},
    }
    assert recipe.exits.model_dump() == {
        "points": None,
        "head": "auto",
        "head_kwargs": {},
        "head_budget": None,
        "hint_adapter": False,
    }
    assert recipe.loss.name == "self-distillation"
    assert recipe.loss.preset == "ensemble-distillation"
    assert {getattr(recipe.loss, name) for name in ("temperature", "kd_weight", "hint_weight", "t_squared")} == {None}
    assert (recipe.data.image, recipe.data.target) == ("image", "label")
    assert (recipe.data.train_split, recipe.data.eval_split, recipe.data.validation) == ("train", "test", 0.1)
    assert (recipe.data.workers, recipe.data.streaming, recipe.data.shuffle_buffer) == (None, False, 10000)
    assert (recipe.augment.train_crop_mode, recipe.augment.hflip, recipe.augment.color_jitter) == ("rrc", 0.5, None)
    assert not recipe.augment.mixes
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (recipe.optimizer.momentum, recipe.optimizer.clip_mode, recipe.optimizer.accumulate) == (0.9, "norm", 1)
    assert (recipe.schedule.name, recipe.schedule.regime, recipe.schedule.select) == ("cosine", "joint", "last")
    assert (recipe.schedule.warmup_lr, recipe.schedule.decay_rate, recipe.schedule.decay_milestones) == (1e-5, 0.1, ())
    assert (recipe.epochs, recipe.batch_size, recipe.precision, recipe.seed) == (200, 128, "auto", 0)
    assert (recipe.compile, recipe.ema, recipe.baseline) == (False, None, False)
    assert (recipe.resume, recipe.trackers, recipe.push_to_hub) == ("auto", (), None)


def test_every_field_is_documented_and_only_fields_are():
    sections = [Recipe]
    for field in Recipe.model_fields.values():
        kinds = (field.annotation, *get_args(field.annotation))
        sections += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert len(sections) == 13
    for section in sections:
        documented = arguments_of(section)
        for config in (SelfDistillationConfig, OutsideTeacherConfig):
            if config.__name__ in documented:
                place = documented.index(config.__name__)
                documented[place : place + 1] = arguments_of(config)
        assert documented == list(section.model_fields), section


def arguments_of(documented: type) -> list[str]:
    """Return the names that a class's docstring explains."""
    text = inspect.cleandoc(documented.__doc__)  # Python 3.13 takes the indentation away by itself
    return re.findall(r"^ {4}(\w+):", text.split("Args:\n")[1].split("\nRaises:")[0], flags=re.MULTILINE)


def test_every_setting_of_the_loss_is_a_key_that_keeps_the_presets_value():
    names = [field.name for field in dataclasses.fields(SelfDistillationConfig)]
    assert list(LossSection.model_fields) == ["name", "preset", *names, "kwargs"]
    assert LossSection().changes == {}
    settings = {**vars(SelfDistillationConfig()), "exit_weights": (1.0, 2.0), "class_weights": (1.0, 3.0)}
    assert LossSection(**settings).changes == settings


@pytest.mark.parametrize("repo", ["my-net", "me/my/net", "me/", "https://hub/me/net"])
def test_a_repository_has_a_namespace_and_a_name(problems, repo):
    assert load_recipe(
        {"model": {"name": "resnet18"}, "data": {"path": "digits"}, "push_to_hub": {"repo": "me/my.net-1"}}
    )
    (problem,) = problems(MINIMAL, f"push_to_hub.repo={repo}")
    assert problem == f"push_to_hub.repo: must be the name of a repository, namespace/name, received {repo!r}"


def test_recipe_is_frozen(load):
    recipe = load()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optimizer.lr = 3.0


def test_output_dir_defaults_to_the_name_of_the_recipe(load):
    assert load().output_dir == "runs/trial"
    assert load(MINIMAL + "output_dir: null\n").output_dir == "runs/trial"
    assert load(MINIMAL, "output_dir=elsewhere").output_dir == "elsewhere"
    assert load_recipe("digits").output_dir == "runs/digits"


def test_reading_a_recipe_needs_neither_torch_nor_timm():
    # The package's own `__init__` imports everything, so an empty one stands in for it.
    code = f"""
import sys, types
package = types.ModuleType("timm_selfdistill")
package.__path__ = [{str(ROOT / "timm_selfdistill")!r}]
sys.modules["timm_selfdistill"] = package
from timm_selfdistill.recipe import load_recipe
load_recipe("digits")
print({{"torch", "timm", "datasets"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipe_loads_and_round_trips(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert (ROOT / "recipes" / f"{name}.yaml").read_text().startswith("# ")


def test_shipped_recipes_are_the_files_of_the_folder():
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert list_recipes() == names
    assert {"digits", "cifar100-resnet18", "cifar100-resnet50", "imagenet-resnet50"} < set(names)
    assert {"imagefolder-convnext", "imagefolder-vit"} < set(names)


def test_built_wheel_holds_the_recipes_and_every_module(tmp_path):
    command = ["-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if "/recipes/" in name} == {
        f"timm_selfdistill/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")
    }
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "timm_selfdistill").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_round_trip_keeps_awkward_values(load, tmp_path):
    recipe = load(
        MINIMAL,
        "optimizer.lr=1e-7",
        "exits.points=[0.3, layer3, 2]",
        "data.name='1e-3'",
        "data.target='no'",
        "data.eval_split='null'",
        "data.train_split='a: b #c'",
        'output_dir=\'é "x" ' + "long " * 60 + "'",
        "model.kwargs={a: '0o7', b: ['', ~, {c: '='}], d: \"x\\ny\", e: [], f: {}, g: 1.5e+300, h: '2020-01-01'}",
        "ema={decay: 0.5}",
        "augment.scale=[0.5, 1]",
    )
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert recipe.exits.points == (0.3, "layer3", 2)
    assert recipe.augment.scale == (0.5, 1.0)


def test_yaml_1_2_reads_exponents_as_numbers_and_no_as_text(load):
    recipe = load(MINIMAL + "optimizer: {lr: 1e-3}\nprecision: no\n")
    assert recipe.optimizer.lr == 1e-3
    assert recipe.precision == "no"
    assert load(MINIMAL, "optimizer.lr=1e-3", "precision=no") == recipe


def test_all_errors_are_reported_at_once(problems):
    text = """\
model: {name: resnet18, pretrained: yes}
data: {pth: digits}
epoch: 3
optimizer: {wieght_decay: 1e-3, lr: -1, momentum: true}
augment: {hflip: 1.5, scale: [1], ratio: [2, 1], cutmix_minmax: 3}
schedule: {name: multistep, regime: mixed}
epochs: 2.0
precision: fp8
ema: 3
seed: .nan
trackers: [wandb, 3]
"""
    assert problems(text, "batch_size", "loss.kd_weight=.inf") == (
        "override 'batch_size': must have the form section.key=value",
        "model.pretrained: must be a valid boolean, received 'yes'",
        "loss.kd_weight: must be a finite number, received inf",
        "data.path: is required",
        "data.pth: unknown key; did you mean 'path'?",
        "augment.scale: must have 2 entries, received [1]",
        "augment.ratio: must be two numbers above 0, the smaller one first, received [2, 1]",
        "augment.hflip: must be less than or equal to 1, received 1.5",
        "augment.cutmix_minmax: must be a list, received 3",
        "optimizer.lr: must be greater than 0, received -1",
        "optimizer.momentum: must be a valid number, received true",
        "optimizer.wieght_decay: unknown key; did you mean 'weight_decay'?",
        "schedule.decay_milestones: must have at least one epoch for the schedule multistep, received []",
        "schedule.backbone_epochs: must be a whole number of epochs for the regime mixed, received null",
        "epochs: must be a valid integer, received 2.0",
        "precision: must be 'auto', 'no', 'bf16' or 'fp16', received 'fp8'",
        "ema: must be a mapping, received 3",
        "seed: must be a valid integer, received nan",
        "trackers[1]: must be text, received 3",
        "epoch: unknown key; did you mean 'epochs'?",
    )


def test_message_has_one_line_per_problem_and_survives_pickling(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {name: a}\nepochs: x\n")
    with pytest.raises(ValueError, match="bad") as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"Recipe {path} has 2 problems:"
    assert lines[1:] == ["  data: is required", "  epochs: must be a valid integer, received 'x'"]
    assert "pydantic" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_unknown_key_that_resembles_nothing_lists_the_allowed_ones(problems):
    (problem,) = problems(MINIMAL + "ema: {zzz: 1}\n")
    assert problem == "ema.zzz: unknown key; allowed are decay, warmup"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.regime=mixed"], "schedule.backbone_epochs: must be a whole number of epochs"),
        (["schedule.backbone_epochs=3"], "schedule.backbone_epochs: must be null for the regime joint"),
        (["schedule.regime=mixed", "schedule.backbone_epochs=9", "epochs=9"], "epochs: must be greater than schedule."),
        (["schedule.select=best", "data.validation=0"], "schedule.select: must be 'last' where data.validation is 0"),
        (["schedule.decay_milestones=[2, 1]"], "schedule.decay_milestones: must be epochs in rising order"),
        (["data.validation=test"], "data.validation: must not be the split that is trained on or reported on"),
        (["data.validation=train"], "data.validation: must not be the split that is trained on or reported on"),
        (["data.validation=1"], "data.validation: must be a share of the training images"),
        (["data.validation=true"], "data.validation: must be a share of the training images"),
        (["data.eval_split=train"], "data.eval_split: must not be the split that is trained on"),
        (["data.eval_fraction=0.9"], "data.eval_fraction: must leave images to train on"),
        (["data.streaming=true"], "data.streaming: must be false where a share of the training images is held out"),
        (["data.classes=1"], "data.classes: must be the number of the classes, at least 2, or the list of their names"),
        (["data.classes=[1, 2]"], "data.classes: must be the number of the classes, at least 2, or the list of their"),
        (["data.classes=[a, a]"], "data.classes: must not name a class twice"),
        (["data.classes=[a, '']"], "data.classes: must be the number of the classes, at least 2, or the list of"),
        (["data.train_size=9"], "data.train_size: must be null unless data.streaming is true"),
        (["optimizer.accumulate=3"], "batch_size: must be a multiple of optimizer.accumulate (3)"),
        (["augment.mixup_alpha=1", "batch_size=6", "optimizer.accumulate=2"], "batch_size: must give micro batches of"),
        (["loss.kwargs.alpha=1"], "loss.kwargs: must be empty for this library's own loss"),
        (["model.kwargs.num_classes=3"], "model.kwargs: must not set num_classes"),
        (["optimizer.kwargs.lr=3"], "optimizer.kwargs: must not set lr"),
        (["optimizer.kwargs.eps=[1, {a: .inf}]"], "optimizer.kwargs: must hold finite numbers only"),
        (["exits.points=0"], "exits.points: must be null, a number of exits (1 or more)"),
        (["exits.points=true"], "exits.points: must be null, a number of exits (1 or more)"),
        (["exits.points=[]"], "exits.points: must be null, a number of exits (1 or more)"),
        (["exits.points=[1.0]"], "exits.points: must be null, a number of exits (1 or more)"),
        (["seed=4294967296"], "seed: must be less than 4294967296"),
        (["model.name=''"], "model.name: must not be empty"),
        (["model.name=18"], "model.name: must be text, received 18"),
        (["data.std=[0.1, 0]"], "data.std[1]: must be greater than 0"),
        (["data.mean=[]"], "data.mean: must have at least 1 item after validation, not 0"),
        (["augment.scale=[1, 2, 3]"], "augment.scale: must have at most 2 items after validation, not 3"),
        (["augment.scale=[]"], "augment.scale: must have 2 entries"),
        (["exits.head_kwargs=3"], "exits.head_kwargs: must be a mapping"),
    ],
)
def test_value_that_is_not_allowed_is_the_only_problem(problems, overrides, expected):
    found = problems(MINIMAL, *overrides)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.streaming=true", "data.validation=0", "data.train_size=9"],
        ["data.classes=[cat, dog]"],
        ["data.classes=10"],
        ["data.streaming=true", "data.validation=held_out"],
        ["schedule.select=best", "data.validation=held_out"],
        ["schedule.regime=mixed", "schedule.backbone_epochs=3", "epochs=4"],
        ["loss.name=theirs", "loss.kwargs.alpha=1"],
        ["augment.mixup_alpha=1", "augment.mixup_prob=0", "batch_size=3"],
        ["exits.points=[0, 0.5, layer3]"],
        ["optimizer.lr=1"],
        ["data.path=a=b"],
    ],
)
def test_combination_that_makes_sense_is_accepted(load, overrides):
    load(MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping of sections, such as `model: {name: resnet18}`, received an empty file"),
        ("# nothing", "received an empty file"),
        ("[1]", "must be a mapping of sections, such as `model: {name: resnet18}`, received [1]"),
        (b"\xff\xfe\x00", "must be text in UTF-8"),
        ("a: \x00", "not valid YAML: unacceptable character"),
        ("a: [", "line 1: not valid YAML"),
        ("a: b: c", "line 1: not valid YAML"),
        ("---\na: 1\n---\nb: 2", "line 3: not valid YAML: expected a single document"),
        ("%YAML 1.1\n---\na: no", "directives (%) are not allowed"),
        ("a: 1\nb: 2\na: 3", "line 3: duplicate key 'a', given first in line 1"),
        ("m:\n  x: 1\n  x: 1", "line 3: duplicate key 'x', given first in line 2"),
        ("1: 2", "line 1: a key must be text, received '1'"),
        ("? [a]\n: 2", "line 1: a key must be text, received a list"),
        ("<<: {a: 1}", "line 1: a key must be text, received '<<'"),
        ("a: !mine 3", "line 1: '3' is !mine; only text, numbers"),
        ("a: 2020-01-01", "line 1: '2020-01-01' is !!timestamp; only text, numbers"),
        ("a: !!set {x}", "line 1: a mapping is !!set; only text, numbers"),
        ("a: !!int x", "not valid YAML: invalid literal for int()"),
        ("a: !!bool x", "not valid YAML: a value does not fit its explicit tag"),
        ("a: !!float", "not valid YAML: a value does not fit its explicit tag"),
        ("a: &x 1\nb: *x", "line 1: anchors and aliases are not allowed, received &x"),
        ("a: " + "[" * 30 + "]" * 30, "line 1: is nested more than 20 levels deep"),
        ("a: " + "[" * 9999, "is nested more than 20 levels deep"),
        ("a: " + "9" * 9999, "line 1: '999"),
        ("a: 0x" + "f" * 9999, "line 1: '0xfff"),
        ('a: "\\ud800"', "line 1: '\\ud800' is not valid Unicode"),
    ],
)
def test_text_that_is_not_plain_yaml_is_refused(problems, text, expected):
    (problem,) = problems(text)
    assert expected in problem


def test_python_tags_construct_nothing(problems, tmp_path):
    target = tmp_path / "executed"
    problems(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{target}]]")
    problems(MINIMAL, f"data.path=!!python/object/apply:os.mkdir [{target}]")
    assert not target.exists()


def test_multiplying_aliases_are_refused_without_being_expanded(problems):
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 40)]
    found = problems("\n".join(["l0: &l0 [x]", *levels]))
    assert len(found) == 40
    assert all("anchors and aliases are not allowed" in problem for problem in found)


def test_utf8_with_byte_order_mark_is_read(load):
    assert load(b"\xef\xbb\xbf" + MINIMAL.encode()) == load()


def test_overrides_set_create_and_clear(load):
    recipe = load(
        MINIMAL + "ema: null\n",
        "ema.decay=0.99",
        "ema.warmup=true",
        "exits.points=[0.3,0.6]",
        "model.kwargs.channels=[16,32,64,128]",
        "loss.temperature=4",
        "epochs=3",
        "epochs=4",
    )
    assert (recipe.ema.decay, recipe.ema.warmup) == (0.99, True)
    assert recipe.exits.points == (0.3, 0.6)
    assert recipe.model.kwargs == {"channels": [16, 32, 64, 128]}
    assert recipe.loss.temperature == 4.0
    assert recipe.epochs == 4
    assert load(MINIMAL + "ema: {decay: 0.9}\n", "ema=null").ema is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "must have the form section.key=value"),
        ("=3", "must have the form section.key=value"),
        ("a b=3", "must have the form section.key=value"),
        ("optimizer..lr=3", "must have the form section.key=value"),
        ("epochs=", "has no value; write epochs=null if none is meant"),
        ("model.name.x=3", "model.name is not a mapping, received 'resnet18'"),
        ("data.path=[", "not valid YAML"),
        ("data.path=&a b", "anchors and aliases are not allowed"),
        ("model.kwargs={a: 1, a: 2}", "duplicate key 'a'"),
        ("model.kwargs." + "a." * 30 + "b=1", "is nested more than 20 levels deep"),
    ],
)
def test_malformed_override_is_explained(problems, override, expected):
    (problem,) = problems(MINIMAL, override)
    assert problem.startswith(f"override {override!r}: ")
    assert expected in problem


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError) as caught:
        load_recipe("digts")
    assert "neither the path of a file nor a shipped recipe" in str(caught.value)
    assert all(name in str(caught.value) for name in list_recipes())
    assert str(caught.value).endswith("did you mean 'digits'?")


@pytest.mark.parametrize("source", ["a\0b", "a" * 5000, "."])
def test_path_that_cannot_be_read_is_explained(source):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(source)


def test_file_beside_a_shipped_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(MINIMAL + "seed: 77\n")
    assert load_recipe("./digits").seed == 77
    assert load_recipe("digits") == load_recipe(ROOT / "recipes" / "digits.yaml")


def test_random_mutations_of_values_give_a_recipe_or_a_recipe_error(load):
    rng = random.Random(0)
    values = [None, True, -1, 0, 1, 10**20, 0.5, float("nan"), float("inf"), "", "no", "x" * 200, [], {}, 3, 2.0]
    values += [[1, 2], [0.5, 1.0], [True], {"a": {"b": [1]}}, {"decay": 0.5}, [[]], "train", "best", "mixed"]
    loaded = []
    for _ in range(150):
        mapping = load_recipe(rng.choice(list_recipes())).model_dump(mode="json")
        for _ in range(rng.randint(1, 2)):
            _mutate(mapping, rng, copy.deepcopy(values))
        recipe = _recipe_or_none(load, dump(mapping))
        assert recipe is None or load(recipe.to_yaml()) == recipe
        loaded.append(recipe is not None)
    assert 10 < sum(loaded) < 140


def test_random_damage_to_the_text_gives_a_recipe_or_a_recipe_error(load):
    rng = random.Random(0)
    loaded = []
    for _ in range(150):
        text = bytearray((ROOT / "recipes" / f"{rng.choice(list_recipes())}.yaml").read_bytes())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", b"\n", b"  ", b"&a ", b"!!x ", b"{", b"]", b": ", b"\xff"]
            )
        loaded.append(_recipe_or_none(load, bytes(text)) is not None)
    assert 10 < sum(loaded) < 140


def _recipe_or_none(load: Load, text: str | bytes) -> Recipe | None:
    try:
        return load(text)
    except RecipeError:
        return None


def _mutate(mapping: dict[str, Any], rng: random.Random, values: list[Any]) -> None:
    sections = [value for value in mapping.values() if isinstance(value, dict) and value]
    place = rng.choice([mapping, *sections])
    key = rng.choice([*place, "unknown"])
    if rng.random() < 0.1:
        place.pop(key, None)
    else:
        place[key] = rng.choice(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 10_000, "line 1: is nested more than 20 levels deep"),
        ("{[" * 5_000, "line 1: is nested more than 20 levels deep"),
        ("- " * 5_000, "line 1: is nested more than 20 levels deep"),
        ("\n".join(" " * level + "a:" for level in range(300)), "line 22: is nested more than 20 levels deep"),
        ("".join(f"k{n}: 1\n" for n in range(6_000)), "holds more than 10,000 values"),
        (f"[{'a,' * 20_000}]", "holds more than 10,000 values"),
        ("".join(f"k{n}: 1\n" for n in range(1_000_000)), "has more than 65,536 bytes, the most that is allowed"),
        ("[" * 1_000_000, "has more than 65,536 bytes, the most that is allowed"),
        (f"a: {'x' * 10_000_000}", "has more than 65,536 bytes, the most that is allowed"),
    ],
)
def test_a_recipe_that_asks_for_much_work_is_refused_at_once(text, expected, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert time.process_time() - began < 15  # about a second on a fast machine
    assert caught.value.problems == (expected,)


def test_a_message_of_many_or_long_problems_is_short(tmp_path):
    for text in (
        "".join(f"k{n}: {{}}\n" for n in range(4_000)),
        "".join(f"- &a{n} x\n" for n in range(4_000)),
        f"{'k' * 60_000}: 1\n",
        f"model: {{name: {'x' * 60_000}, pretrained: {'y' * 100}}}\n",
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / "r.yaml", ["a=" + "[" * 50_000, "=" + "z" * 50_000])
        assert len(str(caught.value)) < 20_000
    assert "and 3,961 more" in message_of(tmp_path, "".join(f"k{n}: 1\n" for n in range(3_999)))


def message_of(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.image_size=100000", "data.image_size: must be less than or equal to 4096, received 100000"),
        ("model.kwargs={layers: [1000000000, 1]}", "must hold whole numbers that add up to at most 16,777,216"),
        ("exits.head_kwargs={width: 1000000000}", "must hold whole numbers that add up to at most 16,777,216"),
    ],
)
def test_sizes_beyond_any_machine_are_refused(problems, override, expected):
    (problem,) = problems(MINIMAL, override)
    assert expected in problem


# Paths of this machine.


def test_a_recipe_without_local_paths_holds_none_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "secret client" / "flowers"
    folder.mkdir(parents=True)
    recipe = load_recipe(
        {
            "model": {"name": f"local-dir:{tmp_path}/nets/net", "kwargs": {"checkpoint_path": f"{tmp_path}/a.pt"}},
            "data": {"path": str(folder)},
            "output_dir": f"{tmp_path}/runs/one",
            "resume": f"{tmp_path}/runs/one/checkpoints/self-distilled/checkpoint-4",
        }
    )
    shared = recipe.without_local_paths()
    assert str(tmp_path) not in shared.to_yaml()
    assert "secret client" not in shared.to_yaml()
    assert (shared.data.path, shared.model.name) == ("flowers", "local-dir:net")
    assert shared.model.kwargs == {"checkpoint_path": "a.pt"}
    assert (shared.output_dir, shared.resume) == (None, "auto")
    assert shared.without_local_paths() == shared


@pytest.mark.parametrize("path", ["uoft-cs/cifar100", "digits", "flowers"])
def test_names_are_no_local_paths(path: str) -> None:
    recipe = load_recipe({"model": {"name": "hf-hub:timm/resnet18.a1_in1k"}, "data": {"path": path}})
    assert recipe.without_local_paths().data.path == path
    assert recipe.without_local_paths().model.name == recipe.model.name
    assert recipe.local_paths() == {}


def test_a_folder_is_local_even_if_it_is_called_as_a_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("client/flowers").mkdir(parents=True)
    recipe = load_recipe({"model": {"name": "resnet18"}, "data": {"path": "client/flowers"}})
    assert recipe.without_local_paths().data.path == "flowers"
    assert recipe.local_paths() == {"data": {"path": str(tmp_path / "client" / "flowers")}}


def test_the_folder_of_a_tables_images_is_local_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("client/photos").mkdir(parents=True)
    Path("client/labels.csv").touch()
    mapping = {"model": {"name": "resnet18"}, "data": {"path": "client/labels.csv", "root": "~/client/photos"}}
    recipe = load_recipe(mapping)
    shared = recipe.without_local_paths().data
    assert (shared.path, shared.root) == ("labels.csv", "photos")
    client = tmp_path / "client"
    assert recipe.local_paths() == {"data": {"path": str(client / "labels.csv"), "root": str(client / "photos")}}


def test_the_name_of_a_home_folder_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    recipe = load_recipe({"model": {"name": "resnet18"}, "data": {"path": "~"}})
    assert "alice" not in recipe.without_local_paths().to_yaml()


def test_the_paths_of_a_runs_recipe_lie_beside_it(tmp_path: Path) -> None:
    recipe = load_recipe({"model": {"name": "resnet18"}, "data": {"path": "/data/client/flowers"}, "output_dir": "run"})
    (tmp_path / "recipe.yaml").write_text(recipe.without_local_paths().to_yaml())
    (tmp_path / "local.yaml").write_text(dump_local(recipe))
    read = load_recipe(tmp_path / "recipe.yaml")
    assert read == recipe.model_copy(update={"output_dir": str(tmp_path)})
    assert load_recipe(tmp_path / "recipe.yaml", ["data.path=/other"]).data.path == "/other"
    # What was edited by hand wins.
    edited = (tmp_path / "recipe.yaml").read_text().replace("path: flowers", "path: leaves")
    (tmp_path / "recipe.yaml").write_text(edited)
    assert load_recipe(tmp_path / "recipe.yaml").data.path == "leaves"


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mapping = {"model": {"name": "local-dir:~/net"}, "data": {"path": "~/images"}, "output_dir": "~/run"}
    recipe = load_recipe(mapping, ["resume=~/run/checkpoints/self-distilled/checkpoint-1"])
    assert recipe.model.name == f"local-dir:{tmp_path}/net"
    assert recipe.data.path == f"{tmp_path}/images"
    assert recipe.output_dir == f"{tmp_path}/run"
    assert recipe.resume == f"{tmp_path}/run/checkpoints/self-distilled/checkpoint-1"
    with pytest.raises(RecipeError, match="output_dir: must not begin with ~ unless that is a home folder"):
        load_recipe(mapping, ["output_dir=~nobody-of-this-name/run"])
