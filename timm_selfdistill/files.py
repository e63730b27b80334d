"""Write files so that nobody reads half of one."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is complete, or as it was before; a link is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    # What a killed process left, or a link, which is not followed either.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)


def write_results(folder: Path, name: str, values: Mapping[str, Any], text: str, figure: "Figure") -> None:
    """Write what came out as `NAME.json`, `NAME.md` and `NAME.png`.

    Args:
        folder: Where to write; created if missing.
        name: What the files are called.
        values: What JSON can hold, without NaN and infinity.
        text: Markdown, which shows the picture.
        figure: The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    # Drawn first: a figure that cannot be drawn leaves all three as they were.
    figure.savefig(picture, format="png")
    replace_file(folder / f"{name}.json", json.dumps(values, indent=2, allow_nan=False).encode() + b"\n")
    replace_file(folder / f"{name}.md", text.encode())
    replace_file(folder / f"{name}.png", picture.getvalue())
