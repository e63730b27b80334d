"""Write files so that nobody reads half of one."""

from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: it is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
