"""Load a model from a folder or from the Hugging Face Hub, and say what the Hub's errors mean."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig
from timm_selfdistill.escape import redact
from timm_selfdistill.hub.folder import BACKBONE, EXITS, load_folder, read_early_exit
from timm_selfdistill.hub.saved_config import CONFIG
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.program import ReportedError
from timm_selfdistill.recipe import REPO_ID

_BY_STATUS = {
    401: "the token is missing or not valid: log in with `hf auth login`, or give another token",
    403: "the token may not do that: give one that may write to it",
    412: "somebody else pushed to it meanwhile, so nothing was changed: look at the new commit, and push again",
}


class HubError(ReportedError):
    """The Hub could not be reached, or did not do what was asked; what is stored locally is as it was."""


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> SelfDistillModel:
    """Load a model from a folder or from the Hugging Face Hub, in eval mode.

    Nothing is unpickled or executed. Files that were downloaded before are taken from the cache.

    Args:
        source: A folder that `save_pretrained` wrote, or the Hub's repository, as "namespace/name"; a folder wins.
        revision: Branch, tag or commit on the Hub; the main branch by default.
        token: Access token of the Hub; the one that is logged in by default.
        cache_dir: Where downloads are kept; the Hub's usual cache by default.

    Returns:
        The wrapped model.

    Raises:
        ValueError: If the folder or a file is missing, damaged, of a newer format, or from something else.
        HubError: If the repository or revision does not exist or may not be read, or the Hub cannot be reached.
    """
    return load_folder(fetch(source, revision, token, cache_dir))


def load_early_exit(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> EarlyExit:
    """Load a model with the early-exit settings that are saved with it, in eval mode.

    Arguments and errors are those of `from_pretrained`.

    Raises:
        ValueError: Also if no early-exit settings are saved with the model.
    """
    folder = fetch(source, revision, token, cache_dir)
    model, config = load_with_early_exit(folder)
    if config is None:
        raise ValueError(
            f"{source} has no early-exit settings; with thresholds of your own: "
            "sd.EarlyExit(sd.from_pretrained(...), thresholds)."
        )
    return EarlyExit.from_config(model, config)


def load_with_early_exit(source: str | Path) -> tuple[SelfDistillModel, EarlyExitConfig | None]:
    """Load a model as `from_pretrained` does, and the early-exit settings that are saved with it, or None."""
    folder = fetch(source)
    return load_folder(folder), read_early_exit(folder)


def fetch(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a saved model, downloaded first where it is a repository on the Hub."""
    if not Path(source).is_dir() and REPO_ID.fullmatch(str(source)):
        with explained(f"Loading {source}", revision, token):
            return Path(
                snapshot_download(
                    str(source),
                    revision=revision,
                    token=bare(token),
                    cache_dir=cache_dir,
                    allow_patterns=[CONFIG, BACKBONE, EXITS],
                    library_name="timm_selfdistill",
                )
            )
    if revision is not None:
        raise ValueError(f"revision={revision!r} is one of a repository on the Hub, but {source} is a folder, or none.")
    return Path(source)


def check_repo_id(repo_id: str) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"A repository on the Hub is named namespace/name, such as me/my-net, not {repo_id!r}.")


def bare(token: str | None) -> str | None:
    """Return a token without the line break that it was read with, which no header takes."""
    return token.strip() if isinstance(token, str) else token


@contextmanager
def explained(doing: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Say what the Hub's errors mean, and no token."""
    try:
        yield
    except Exception as error:  # the client's, its HTTP library's and the system's errors have no common base
        tokens = [text for text in (token, get_token()) if isinstance(text, str)]
        failure = HubError(redact(f"{doing} failed: {_explain(error, revision)}.", tokens))
        trace = "".join(traceback.format_exception(error))
        if redact(trace, tokens) == trace:
            raise failure from error
    else:
        return
    # Without what caused it, which holds a token.
    raise failure from None


def _explain(error: Exception, revision: str | None) -> str:
    """Return what an error of the Hub means, and what to do."""
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and the token may not read it: check the name, log in with "
            "`hf auth login`, or give a token"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _BY_STATUS.get(status, f"{constants.ENDPOINT} answered {status} ({error})")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
        # This machine's own trouble, such as a full disk.
        return str(error)
    return f"{constants.ENDPOINT} cannot be reached, and what is not in the cache is needed ({error})"
