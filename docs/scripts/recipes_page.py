"""Write `docs/recipes.md` from the files in `recipes/`: `python docs/scripts/recipes_page.py`."""

from pathlib import Path

from timm_selfdistill.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"

_INTRODUCTION = """\
# The shipped recipes

Written by `python docs/scripts/recipes_page.py` from the files in `recipes/`, which are shipped with the package.

A recipe is a YAML file; [train.md](train.md#fields) has every field, and the default of what is not written here. Run
one by its name, followed by changes, or copy it to a file of your own:

```bash
timm-selfdistill recipes                                          # a line about each
timm-selfdistill recipes digits --copy mine.yaml                  # a file of your own
timm-selfdistill init FOLDER                                      # or a recipe that suits your images
timm-selfdistill train digits epochs=5 optimizer.lr=0.02          # one of them, with two changes
```
"""
_COLUMNS = ("recipe", "network", "data", "loss", "optimizer", "schedule", "epochs", "batch size")


def render() -> str:
    """Return the page: a table of the main settings, then every recipe as its file has it."""
    paths = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem)
    table = [_COLUMNS, ("---",) * 6 + ("---:",) * 2, *(_row(path.stem, load_recipe(path)) for path in paths)]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([_INTRODUCTION, lines, "", *map(_section, paths)])


def _row(name: str, recipe: Recipe) -> tuple[str, ...]:
    model, data, optimizer = recipe.model, recipe.data, recipe.optimizer
    extras = [word for word, present in (("pretrained", model.pretrained), ("small stem", model.small_stem)) if present]
    return (
        f"[`{name}`](#{name})",
        ", ".join([f"`{model.name}`", *extras]),
        f"`{data.path}`" + (f", {data.image_size} px" if data.image_size else ""),
        f"`{recipe.loss.preset}`",
        f"`{optimizer.name}`, rate {optimizer.lr:g}",
        f"`{recipe.schedule.name}`",
        str(recipe.epochs),
        str(recipe.batch_size),
    )


def _section(path: Path) -> str:
    """Return the part about one recipe: the comment at its top, and the rest of the file."""
    lines = path.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    description = "\n".join(line.removeprefix("#").strip() for line in lines[:first])
    settings = "\n".join(lines[first:])
    return f"""\
## {path.stem}

{description}

```yaml
{settings}
```
"""


if __name__ == "__main__":
    PAGE.write_text(render())
