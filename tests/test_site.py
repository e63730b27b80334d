"""The documentation site: what `mkdocs build --strict` does not see, or only when the site is built."""

import re
import tomllib
from pathlib import Path

from recipes_page import PAGE, render
from ruamel.yaml import YAML

import timm_selfdistill as sd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_navigation_has_every_page():
    listed = leaves(YAML(typ="safe").load(ROOT / "mkdocs.yml")["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^::: timm_selfdistill\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(names) == sd.__all__


def test_the_site_links_to_the_repository_of_the_package():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert YAML(typ="safe").load(ROOT / "mkdocs.yml")["repo_url"] == urls["Repository"]


def test_every_page_has_a_title_of_its_own():
    titles = [re.match(r"# (.+)\n", path.read_text())[1] for path in sorted(DOCS.rglob("*.md"))]
    assert len(titles) == len(set(titles))


def test_the_home_page_shows_a_picture_and_is_short():
    page = (DOCS / "index.md").read_text()
    assert re.search(r"^!\[.{20,}\]\([\w-]+\.png\)$", page, re.M)
    assert len(re.findall(r"^\|", page, re.M)) <= 12, "a list by task, not a row for each page"


def test_the_recipes_page_is_that_of_the_files():
    assert PAGE.read_text() == render(), "run python docs/scripts/recipes_page.py"
    assert re.findall(r"^## (.+)$", render(), re.M) == sd.list_recipes()


def leaves(nav) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in leaves(part)]
