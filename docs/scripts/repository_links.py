"""An MkDocs hook: pages in `docs/` link to other files of the repository as they do on disk, by `../PATH`.

Each such file becomes part of the site as PATH, and the links to it are turned to that place.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_DOCS = re.compile(r"(?<=\]\()docs/")
_OUTSIDE = re.compile(r"(?<=\]\()\.\./(?P<path>[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside `docs/` that its pages link to."""
    root = Path(config.docs_dir).parent
    pages = [Path(config.docs_dir, page.src_uri).read_text() for page in files.documentation_pages()]
    for path in sorted({match["path"] for text in pages for match in _OUTSIDE.finditer(text)}):
        # MkDocs warns of a link to a file that is not there.
        if (root / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link to the files where the site has them."""
    return _DOCS.sub("", _OUTSIDE.sub(r"\g<path>", markdown))
