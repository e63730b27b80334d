"""Load a model from the Hugging Face Hub or a folder, push one to the Hub, and say what the Hub's errors mean."""

import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig
from timm_selfdistill.escape import redact, without_places
from timm_selfdistill.hub.card import card_for_repository
from timm_selfdistill.hub.folder import BACKBONE, CARD, EXITS, load_folder, read_early_exit, save_pretrained
from timm_selfdistill.hub.saved_config import CONFIG
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.program import ReportedError
from timm_selfdistill.recipe import LICENSE, RECIPE, REPO_ID, RecipeError, load_recipe

_TEXTS: Final = (".md", ".yaml", ".json")
# What a training run writes beside its model.
_OF_A_RUN: Final = ("report.json", "report.md", "report.png", RECIPE)
# What `calibrate` writes there: it describes the early-exit settings, and is pushed only with them.
_OF_SETTINGS: Final = ("calibration.json", "calibration.md", "calibration.png")
_BY_STATUS: Final = {
    401: "the token is missing or not valid: log in with `hf auth login`, or give another token",
    403: "the token may not do that: give one that may write to it",
    412: "somebody else pushed to it meanwhile, so nothing was changed: look at the new commit, and push again",
}


class HubError(ReportedError):
    """The Hub could not be reached, or did not do what was asked; what is stored locally is as it was."""


def from_pretrained(
    source: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
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
    source: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> EarlyExit:
    """Load a model with the early-exit settings that are saved with it, in eval mode.

    Arguments and errors are those of `from_pretrained`.

    Raises:
        ValueError: Also if no early-exit settings are saved with the model.
    """
    model, config = load_with_early_exit(fetch(source, revision, token, cache_dir))
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
    source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Return the folder of a saved model, downloaded first where it is a repository on the Hub."""
    if not Path(source).is_dir() and REPO_ID.fullmatch(str(source)):
        with _explained(f"Loading {source}", revision, token):
            return Path(
                snapshot_download(
                    str(source),
                    revision=revision,
                    token=_bare(token),
                    cache_dir=cache_dir,
                    allow_patterns=[CONFIG, BACKBONE, EXITS],
                    library_name="timm_selfdistill",
                )
            )
    if revision is not None:
        raise ValueError(f"revision={revision!r} is one of a repository on the Hub, but {source} is a folder, or none.")
    return Path(source)


def push_to_hub(
    model: SelfDistillModel,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    early_exit: EarlyExitConfig | None = None,
) -> str:
    """Push a model to the Hugging Face Hub in one commit; plain timm loads the backbone from there too.

    Args:
        model: The wrapped model; what it is wrapped in (DDP, compile) must be removed first.
        repo_id: The repository, as "namespace/name"; made if it does not exist.
        private: Whether a repository that is made is private.
        revision: Branch to push to; the main branch by default.
        create_pr: Open a pull request instead of changing the branch.
        token: Access token; the one that is logged in by default.
        commit_message: What the commit says.
        license: Licence of the weights, by its identifier on the Hub, such as "apache-2.0".
        label_names: Class names, in the order of the logits.
        data_config: Preprocessing of the training run, as in `save_pretrained`.
        early_exit: When images leave early, as in `save_pretrained`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: If the name of the repository or licence is not allowed, or the model cannot be saved.
        HubError: If the Hub cannot be reached, or does not let the token do this.
    """
    _check_names(repo_id, license)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, label_names=label_names, data_config=data_config, early_exit=early_exit)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
            license=license,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
) -> str:
    """Push a folder that `save_pretrained` or a training run wrote, which is only read, in one commit.

    The model is loaded first, so that nothing damaged is pushed. The report and the recipe of a training run go with
    it, and with early-exit settings what `calibrate` wrote. The model card tells how to load the model from the Hub;
    what was edited in it stays. Arguments, return value and errors are those of `push_to_hub`.
    """
    _check_names(repo_id, license)
    folder = Path(folder)
    saved = folder / "model" if (folder / "model" / CONFIG).is_file() else folder
    model = load_folder(saved)
    files = _files(folder, saved, model, repo_id, license)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    make_repository(repo_id, private=private, token=token)
    api = _api(token)
    with _explained(f"Pushing to {repo_id}", revision, token):
        parent = api.repo_info(repo_id, revision=revision).sha
        for operation in operations:
            # One file at a time: for several, the client starts threads, whose end a signal would have to wait for.
            if operation.path_in_repo in (BACKBONE, EXITS):
                api.preupload_lfs_files(repo_id, [operation], revision=revision, create_pr=create_pr)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Add {model.pretrained_cfg['architecture']}, self-distilled",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    return str(commit.pr_url or commit.commit_url)


def make_repository(repo_id: str, *, private: bool = False, token: str | None = None) -> None:
    """Make a repository on the Hugging Face Hub where there is none yet; arguments and errors as in `push_to_hub`."""
    _check_names(repo_id, None)
    with _explained(f"Pushing to {repo_id}", None, token):
        _api(token).create_repo(repo_id, private=private, exist_ok=True)


def _check_names(repo_id: str, license: str | None) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"A repository on the Hub is named namespace/name, such as me/my-net, not {repo_id!r}.")
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(
            f"A licence is named as on the Hub, such as apache-2.0, mit, cc-by-4.0 or other, not {license!r}."
        )


def _files(
    folder: Path, saved: Path, model: SelfDistillModel, repo_id: str, license: str | None
) -> dict[str, Path | bytes]:
    """Return what to push, by its name in the repository."""
    early_exit = read_early_exit(saved)
    beside = _OF_A_RUN if early_exit is None else (*_OF_A_RUN, *_OF_SETTINGS)
    files: dict[str, Path | bytes] = {name: saved / name for name in (CONFIG, BACKBONE, EXITS)}
    files |= {name: folder / name for name in beside if (folder / name).is_file()}
    if (saved / CARD).is_file():
        card = (saved / CARD).read_text()
        files[CARD] = card_for_repository(card, model, repo_id, license=license, early_exit=early_exit).encode()
    texts = {name: file for name, file in files.items() if name.endswith(_TEXTS)}
    return files | _shareable(texts, folder)


def _shareable(files: Mapping[str, Path | bytes], folder: Path) -> dict[str, bytes]:
    """Return texts without tokens and this machine's paths, which recipes and cards of earlier versions hold."""
    texts = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}
    places = {str(path): folder.resolve().name for path in (folder.resolve(), folder) if path.is_absolute()}
    try:
        recipe = load_recipe(folder / RECIPE)
    except RecipeError:  # none, or that of another version
        recipe = None
    if recipe is not None:
        shared = recipe.without_local_paths()
        names = ((recipe.data.path, shared.data.path), (recipe.model.name, shared.model.name))
        places |= {full: short for full, short in names if full != short}
        if recipe.output_dir is not None and Path(recipe.output_dir).is_absolute():
            places[recipe.output_dir] = Path(recipe.output_dir).name
        if RECIPE in texts:
            texts[RECIPE] = shared.to_yaml().encode()
    return {
        # Bytes that cannot be decoded are kept.
        name: redact(without_places(text.decode(errors="surrogateescape"), places)).encode(errors="surrogateescape")
        for name, text in texts.items()
    }


def _api(token: str | None) -> HfApi:
    return HfApi(token=_bare(token), library_name="timm_selfdistill")


def _bare(token: str | None) -> str | None:
    """Return a token without the line break that it was read with, which no header takes."""
    return token.strip() if isinstance(token, str) else token


@contextmanager
def _explained(doing: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Say what the Hub's errors mean, and no token."""
    try:
        yield
    except Exception as error:  # the client's, its HTTP library's and the system's errors have no common base
        tokens = [text for text in (token, get_token()) if isinstance(text, str)]
        trace = "".join(traceback.format_exception(error))
        cause = error if redact(trace, tokens) == trace else None
        raise HubError(redact(f"{doing} failed: {_explain(error, revision)}.", tokens)) from cause


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
