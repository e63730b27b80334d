"""The documentation: its examples run, its tables are those of the code, its links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill.checks import Section
from timm_selfdistill.cli import main as cli
from timm_selfdistill.early_exit import stage_costs
from timm_selfdistill.heads import HEADS
from timm_selfdistill.losses import PRESETS, divergences, protocol, teachers
from timm_selfdistill.recipe import EmaSection, PushSection, Recipe, RecipeError, TeacherSection, load_recipe
from timm_selfdistill.recipe.plain_yaml import parse
from timm_selfdistill.train import train

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
REGISTRIES = (HEADS, divergences._DIVERGENCES, teachers._TEACHERS, protocol._LOSSES)
TRAIN_PAGE = ROOT / "docs" / "train.md"

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A code block of a page.

    Args:
        page: The page.
        line: Line of its first line of code.
        language: What stands behind the fence.
        text: The code.
        reason: Why it is not run, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], match["text"], match["reason"]))
    return [block for block in found if block.language == language]


PYTHON = [block for page in PAGES for block in blocks(page, "python")]
RUN_PAGES = sorted({block.page for block in PYTHON if block.reason is None})
NOT_RUN = [block for block in PYTHON if block.reason is not None]
TORCHDISTILL_PAGE = ROOT / "docs" / "torchdistill.md"
OPTIONAL = {"torchdistill.md": ("torchdistill",), "trainers.md": ("transformers", "lightning")}
YAML = [block for page in PAGES if page != TORCHDISTILL_PAGE for block in blocks(page, "yaml")]
COMMANDS = [
    pytest.param(command, id=f"{block}:{index}")
    for page in PAGES
    for block in blocks(page, "bash")
    for index, command in enumerate(block.text.replace("\\\n", " ").splitlines())
    if re.search(r"timm-selfdistill train|timm_selfdistill\.train", command)
]

SHOWN = [
    (match[1], match[2])
    for page in PAGES
    for match in re.finditer(
        r"^```bash\n(timm-selfdistill exits [^\n]+)\n```\n\n```text\n(.*?)^```$", page.read_text(), re.M | re.S
    )
]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Examples register heads and the like, and measure times, here of few runs."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name, value in (("_WARM_UP_ROUNDS", 0), ("_MIN_ROUNDS", 1), ("_SECONDS", 0.0)):
        monkeypatch.setattr(stage_costs, name, value)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, make_image_folder):
    """A clone's folder with the run `runs/digits` in it, which the pages evaluate and load, and images in `images`."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    make_image_folder(folder / "images")
    small = ["epochs=1", "baseline=false", "data.max_train=64", "data.max_eval=10", "batch_size=16", "precision='no'"]
    train(load_recipe("digits", [*small, f"output_dir={folder / 'runs' / 'digits'}"]))
    return folder


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_examples_run_and_print_what_the_page_says(page, finished_run, monkeypatch, capsys):
    for package in OPTIONAL.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(finished_run)
    torch.manual_seed(0)
    shared: dict[str, Any] = {"__name__": "example"}
    for block in PYTHON:
        if block.page == page and block.reason is None:
            # Padded with lines, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), shared)
    printed = capsys.readouterr().out
    for text in re.findall(r"^```python\n[^`]*^```\n\n```text\n(.*?)^```$", page.read_text(), re.M | re.S):
        assert text in printed


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=lambda text: text.splitlines()[0])
def test_commands_print_what_the_page_shows(command, output, capsys):
    assert cli(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == output


AFTER_THE_FIRST = [
    command
    for block in blocks(ROOT / "README.md", "bash")
    for command in block.text.splitlines()
    if command.startswith("timm-selfdistill ") and "flowers" not in command
]


@pytest.mark.parametrize("command", AFTER_THE_FIRST)
def test_the_readmes_commands_run_after_its_first_one(command, finished_run, monkeypatch):
    monkeypatch.chdir(finished_run)
    assert cli(shlex.split(command, comments=True)[1:]) == 0


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_examples_that_are_not_run_are_at_least_python(block):
    compile(block.text, str(block), "exec")
    pytest.skip(f"example {block} is not run: {block.reason}")


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block):
    mapping, problems = parse(block.text)
    assert not problems
    load_recipe({"model": {"name": "resnet18"}, "data": {"path": "digits"}} | mapping)


@pytest.mark.parametrize("block", blocks(TORCHDISTILL_PAGE, "yaml"), ids=str)
def test_yaml_for_torchdistill_is_a_part_of_a_shipped_configuration(block):
    configurations = [path.read_text() for path in (ROOT / "recipes" / "torchdistill").glob("*.yaml")]
    assert any(block.text in text for text in configurations)


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands_have_recipes_that_load(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word in ("train", "timm_selfdistill.train"))
    recipe, *overrides = words[start + 1 :]
    if recipe.endswith(".yaml"):
        monkeypatch.chdir(tmp_path)
        Path(recipe).write_text(next(block.text for block in YAML if block.text.startswith(f"# {recipe}")))
    load_recipe(recipe, overrides)


def test_example_recipe_errors_are_seen():
    """The two tests above rely on this."""
    with pytest.raises(RecipeError):
        load_recipe("digits", ["optimiser.lr=1"])


SECTIONS = {name: Recipe.model_fields[name].annotation for name in Recipe.model_fields}
SECTIONS = {name: kind for name, kind in SECTIONS.items() if isinstance(kind, type) and hasattr(kind, "model_fields")}
TABLES = {
    **{f"`{name}`": kind for name, kind in SECTIONS.items()},
    "`teacher`": TeacherSection,
    "`ema`": EmaSection,
    "`push_to_hub`": PushSection,
    "The run": Recipe,
}


def test_every_section_class_has_a_table():
    assert set(Section.__subclasses__()) == set(TABLES.values())


@pytest.mark.parametrize("heading", TABLES)
def test_every_field_is_listed_with_its_default(heading):
    rows = table_rows(TRAIN_PAGE, f"### {heading}")
    documented = {unquoted(cells[0]): cells[1] for cells in rows}
    fields = {name: field for name, field in TABLES[heading].model_fields.items() if name not in SECTIONS}
    assert list(documented) == list(fields)
    for name, field in fields.items():
        if field.is_required():
            assert documented[name] == "required", name
            continue
        default = field.default
        value, problems = parse(unquoted(documented[name]))
        assert not problems
        assert value == (list(default) if isinstance(default, tuple) else default), name
        assert type(value) is not bool or type(default) is bool, name


@pytest.mark.parametrize("heading", TABLES)
def test_every_allowed_value_is_listed(heading):
    rows = {unquoted(cells[0]): cells[2] for cells in table_rows(TRAIN_PAGE, f"### {heading}")}
    for name, meaning in rows.items():
        missing = [value for value in literals(TABLES[heading].model_fields[name].annotation) if value not in meaning]
        assert missing == [], name


def test_settings_of_the_loss_are_listed_with_their_defaults():
    rows = table_rows(ROOT / "docs" / "losses.md", "## Settings")
    documented = {unquoted(cells[0]): parse(unquoted(cells[1]))[0] for cells in rows if len(cells) == 3}
    assert documented == {**vars(sd.SelfDistillationConfig()), "hint_weight": pytest.approx(128e-6)}


def test_every_registered_name_is_listed():
    losses, wrap = (ROOT / "docs" / name for name in ("losses.md", "wrap.md"))
    assert first_column(losses, "preset") == sd.list_presets()
    assert first_column(losses, "divergence") == sd.list_divergences()
    assert first_column(losses, "teacher") == sd.list_teachers()
    assert first_column(losses, "loss") == sd.list_losses()
    assert first_column(wrap, "`head`") == ["auto", *sorted([*sd.list_heads(), "published"])]


def test_weights_of_the_presets_are_those_of_the_code():
    rows = {unquoted(cells[0]): cells[3] for cells in table_rows(ROOT / "docs" / "losses.md", "## Presets")}
    assert set(rows) == set(PRESETS)
    for name in ("byot-iccv2019", "byot-tpami2021"):
        config = PRESETS[name]
        a, temperature, hint = (
            float(re.search(rf"\b{symbol} = (?:[^,]* = )?([\d.e-]+)", rows[name])[1]) for symbol in "aTl"
        )
        assert (a, 1 - a, temperature) == pytest.approx((config.kd_weight, config.ce_weight, config.temperature))
        assert hint == pytest.approx(config.hint_weight, rel=2e-3)


def test_the_index_names_every_page():
    index = ROOT / "docs" / "index.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index.read_text()))
    assert linked == {page.name for page in ROOT.glob("docs/*.md")} - {index.name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    prose = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its header."""
    below = page.read_text().split(f"\n{heading}\n", 1)[1]
    return rows_of(re.search(r"(?:^\|.*\n)+", below, re.M)[0])


def first_column(page: Path, header: str) -> list[str]:
    """Return the names in the first column of the table with that column, sorted, "auto" first."""
    table = re.search(rf"^\| {re.escape(header)} \|.*\n(?:^\|.*\n)+", page.read_text(), re.M)
    assert table is not None, header
    names = [re.search(r"`\"?([\w-]+)\"?`", cells[0])[1] for cells in rows_of(table[0])]
    return sorted(names, key=lambda name: (name != "auto", name))


def rows_of(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def unquoted(cell: str) -> str:
    return cell.strip("`")


def literals(annotation: Any) -> list[str]:
    """Return the texts that a field's annotation allows, if it names them."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in literals(part)]
