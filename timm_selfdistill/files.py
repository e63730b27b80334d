"""Write files so that nobody reads half of one."""

from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is complete, or as it was before; a link is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    # What a killed process left, or a link, which is not followed either.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)
