"""Names of classes, splits and files: compared after normalisation, and quoted in messages."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Final

_QUOTED: Final = 5


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): some systems store an `é` as one character, others as two."""
    return unicodedata.normalize("NFC", name)


def quoted(names: Iterable[str]) -> str:
    """Return the first names as Python writes them, so that none can be mistaken or act on a terminal."""
    names = list(names)
    return ", ".join([*map(repr, names[:_QUOTED]), *(["..."] if len(names) > _QUOTED else [])])


def with_similar(name: str, known: Iterable[str]) -> str:
    """Return a name, quoted, and the known one that it is like, if any: "'Dog' (is it 'dog'?)"."""
    by_lower = {other.casefold(): other for other in known}
    similar = difflib.get_close_matches(name.casefold(), by_lower, 1)
    return f"{name!r} (is it {by_lower[similar[0]]!r}?)" if similar else repr(name)
