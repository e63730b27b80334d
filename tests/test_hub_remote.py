"""Pushing to a Hub and loading from it: the real clients, in their own processes, against a server on this machine."""

import json
import os
import shutil
import signal
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import TRAINING, ForkServer, fork_server
from hub_server import HubServer
from PIL import Image

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli
from timm_selfdistill.hub import BACKBONE, CARD, CONFIG, EXITS, Training, model_card, remote, save_early_exit
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.recipe.plain_yaml import parse

pytestmark = pytest.mark.multiprocess

COMMON = """
import json, torch, timm
import timm_selfdistill as sd

def make_model(seed=0, width=16, **kwargs):
    torch.manual_seed(seed)
    channels = [width, 2 * width, 4 * width, 5 * width]
    return sd.wrap("resnet18", num_classes=7, image_size=64, model_kwargs={"channels": channels}, **kwargs).eval()

def same(one, other):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pairs = zip(one(x, return_exits=True).logits, other(x, return_exits=True).logits, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

def refused(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def answer(**values):
    print("ANSWER " + json.dumps(values))
"""

FILES_OF_A_RUN = {CONFIG, BACKBONE, EXITS, CARD, "report.json", "report.md", "report.png", "recipe.yaml"}

# What huggingface_hub reads when it is imported.
READ_ONCE = {"HF_ENDPOINT", "HF_HUB_OFFLINE"}

Client = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Served:
    """A server, the folder of its clients' downloads, and what starts clients."""

    hub: HubServer
    home: Path
    environment: dict[str, str | None]
    forks: ForkServer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("hub") / "cache"
    with HubServer() as hub:
        environment = {name: None for name in os.environ if name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        with fork_server(TRAINING + COMMON, tmp_path_factory, environment) as forks:
            yield Served(hub, home, environment, forks)


@pytest.fixture
def hub(served: Served) -> Iterator[HubServer]:
    """A server without repositories, of which nothing was downloaded yet."""
    served.hub.forget()
    yield served.hub
    shutil.rmtree(served.home, ignore_errors=True)


@pytest.fixture
def client(served: Served, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A function that runs code in a process whose Hub is the server, and returns what the code answers."""

    def run(code: str, **environment: str) -> dict[str, Any]:
        code, variables = textwrap.dedent(code), {"HF_TOKEN": "hf_owner", **environment}
        if READ_ONCE & environment.keys():
            with fork_server(COMMON, tmp_path_factory, {**served.environment, **environment}) as forks:
                status, out, errors = forks.start(code, **variables).wait()
        else:
            status, out, errors = served.forks.start(code, **variables).wait()
        assert status == 0, errors
        answers = [line for line in out.splitlines() if line.startswith("ANSWER ")]
        return json.loads(answers[-1].removeprefix("ANSWER "))

    return run


def test_a_pushed_model_is_loaded_bit_for_bit_here_and_in_plain_timm(hub: HubServer, client: Client) -> None:
    answer = client(
        """
        model = make_model(width=64)
        address = sd.push_to_hub(model, "me/large", commit_message="First")
        again = sd.push_to_hub(model, "me/large")
        x = torch.randn(2, 3, 64, 64)
        plain = timm.create_model("hf-hub:me/large", pretrained=True).eval()
        loaded = sd.from_pretrained("me/large")
        modes = {module.training for module in loaded.modules()}
        plain_same = torch.equal(plain(x), model(x))
        answer(address=address, again=again, same=same(model, loaded), modes=list(modes), plain=plain_same)
        """
    )
    assert answer["same"]
    assert answer["plain"]
    assert answer["modes"] == [False]
    assert answer["address"] == answer["again"] == f"{hub.url}/me/large/commit/{hub.repos['me/large'].refs['main']}"
    # One commit on top of the first, empty one; what is there already is not sent again.
    assert len(hub.repos["me/large"].commits) == 2
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    files = hub.files("me/large")
    assert set(files) == {".gitattributes", CONFIG, BACKBONE, EXITS, CARD}
    assert len(files[BACKBONE]) > 10_000_000
    card = files[CARD].decode()
    assert 'timm.create_model("hf-hub:me/large", pretrained=True)' in card
    assert 'sd.from_pretrained("me/large")' in card
    assert "FOLDER" not in card


# Backbones whose taps differ in kind: NCHW, NLC, NHWC, branches of tokens, branches of maps, a member of a tuple.
LAYOUTS: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [16, 32, 64, 80]},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 24,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
    },
    "crossvit_tiny_240": {},
    "hrnet_w18_small": {},
    "tnt_s_legacy_patch16_224": {"img_size": 64, "depth": 4},
}


def test_every_layout_class_comes_back_with_its_changed_number_of_classes(hub: HubServer, client: Client) -> None:
    answers = client(
        f"""
        def check(name, kwargs):
            torch.manual_seed(0)
            size = 240 if name == "crossvit_tiny_240" else 64
            model = sd.wrap(name, num_classes=7, image_size=size, head="linear", model_kwargs=kwargs).eval()
            model.reset_classifier(11)
            config = sd.EarlyExitConfig((0.09,) * model.num_exits)
            sd.push_to_hub(model, f"me/{{name}}", early_exit=config, license="mit")
            loaded = sd.from_pretrained(f"me/{{name}}")
            fast = sd.load_early_exit(f"me/{{name}}")
            plain = timm.create_model(f"hf-hub:me/{{name}}", pretrained=True).eval()
            x = torch.randn(2, 3, size, size)
            with torch.no_grad():
                ours, theirs = (net(x, return_exits=True).logits for net in (model, loaded))
                exits = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
                last = torch.equal(plain(x), ours[-1])
            return [ours[0].shape[1], exits, last, fast.config == config]

        answer(**{{name: check(name, kwargs) for name, kwargs in {LAYOUTS!r}.items()}})
        """
    )
    assert answers == {name: [11, True, True, True] for name in LAYOUTS}
    for name in LAYOUTS:
        card = hub.files(f"me/{name}")[CARD].decode()
        assert f'fast = sd.load_early_exit("me/{name}")' in card
        assert "license: mit" in card


def test_a_connection_that_breaks_while_a_file_is_sent_is_made_again(hub: HubServer, client: Client) -> None:
    hub.broken_uploads = 1
    code = 'sd.push_to_hub(make_model(), "me/net"); answer(same=same(make_model(), sd.from_pretrained("me/net")))'
    assert client(code)["same"]
    assert hub.broken_uploads == 0
    assert sum(request.startswith("PUT") for request in hub.requests) == 3  # one of the two files twice


def test_a_repository_that_this_version_cannot_read_is_refused(hub: HubServer, client: Client) -> None:
    client('sd.push_to_hub(make_model(), "me/net"); answer()')
    files = hub.files("me/net")

    def change(**ours: Any) -> None:
        config = json.loads(files[CONFIG])
        config["timm_selfdistill"] |= ours
        hub.repos["me/net"].commit("main", {CONFIG: json.dumps(config).encode()}, hub.repos["me/net"].refs["main"])

    code = 'answer(error=refused(sd.from_pretrained, "me/net"))'
    change(head="nose")
    assert "Unknown head 'nose'; known are" in client(code)["error"]
    change(format_version=2)
    assert "has format version 2, this version of timm_selfdistill reads 1: upgrade" in client(code)["error"]
    change(sha256={BACKBONE: "0" * 64})
    assert "model.safetensors is damaged or was exchanged" in client(code)["error"]
    repo = hub.repos["me/net"]
    name = repo.commit("main", {CONFIG: files[CONFIG]}, repo.refs["main"])
    del repo.commits[name][EXITS]
    assert client(code)["error"].endswith("exits.safetensors is missing.")


def test_downloads_are_cached_resumed_and_checked(hub: HubServer, client: Client, served: Served) -> None:
    client('sd.push_to_hub(make_model(), "me/net"); sd.push_to_hub(make_model(1), "me/net"); answer()')
    first = next(name for name, tree in hub.repos["me/net"].commits.items() if CONFIG in tree)
    hub.cut_after = 100_000
    code = """
    model = make_model()
    newest, first = sd.from_pretrained("me/net"), sd.from_pretrained("me/net", revision="COMMIT")
    answer(newest=same(newest, make_model(1)), first=same(first, model))
    """.replace("COMMIT", first)
    assert client(code) == {"newest": True, "first": True}
    assert hub.cut_after is None  # the connection did break, and the rest was fetched
    hub.requests.clear()
    assert client(code) == {"newest": True, "first": True}
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]

    (weights,) = served.home.glob(f"hub/models--me--net/snapshots/{hub.repos['me/net'].refs['main']}/{EXITS}")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.resolve().write_bytes(damaged)
    code = """
    offline = same(sd.from_pretrained("me/net", revision="COMMIT"), make_model())
    damaged, new = refused(sd.from_pretrained, "me/net"), refused(sd.from_pretrained, "me/new")
    answer(offline=offline, damaged=damaged, new=new)
    """
    answer = client(code.replace("COMMIT", first), HF_HUB_OFFLINE="1")
    assert answer["offline"]
    assert answer["damaged"].startswith("ValueError: ")
    assert "exits.safetensors is damaged or was exchanged" in answer["damaged"]
    assert answer["new"].startswith(f"HubError: Loading me/new failed: {hub.url} cannot be reached, and what is not in")


def test_a_run_is_pushed_from_its_folder_to_a_private_repository(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in ("report.json", "report.md", "report.png", "recipe.yaml", "metrics.jsonl"):
        run.mkdir(exist_ok=True)
        (run / name).write_text(name)
    torch.manual_seed(0)
    model = sd.wrap("resnet18", num_classes=7, image_size=64, model_kwargs={"channels": [16, 32, 64, 80]}).eval()
    edited = f"{model_card(model)}\nTrained on a rainy day.\n"
    sd.save_pretrained(model, run / "model", card=edited)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    push = f"""
    from timm_selfdistill.cli import main as cli
    answer(status=cli(["push", {str(run)!r}, "me/run", *%s]))
    """
    assert client(push % ["--private", "--message", "From a run"]) == {"status": 0}
    files = hub.files("me/run")
    assert set(files) - {".gitattributes"} == FILES_OF_A_RUN
    assert files[BACKBONE] == (run / "model" / BACKBONE).read_bytes()
    assert 'from_pretrained("me/run")' in files[CARD].decode()
    assert files[CARD].decode().endswith("\nTrained on a rainy day.\n")
    assert hub.repos["me/run"].private

    (run / "report.md").write_text("changed")
    before[run / "report.md"] = b"changed"
    assert client(push % ["--pr"]) == {"status": 0}
    assert hub.files("me/run")["report.md"] == b"report.md"
    (pull_request,) = set(hub.repos["me/run"].refs) - {"main"}
    assert hub.files("me/run", pull_request)["report.md"] == b"changed"

    answer = client(
        f"""
        answer(
            stranger=refused(sd.from_pretrained, "me/run", token="hf_other"),
            nobody=refused(sd.from_pretrained, "me/run", token=False),
            wrong=refused(sd.from_pretrained, "me/run", token="hf_wrong"),
            other_place=refused(sd.push_to_hub, make_model(), "you/net"),
            wrong_push=refused(sd.push_to_hub, make_model(), "me/net", token="hf_wrong"),
            no_branch=refused(sd.push_to_hub, make_model(), "me/run", revision="v9"),
            owner=same(sd.from_pretrained("me/run"), sd.from_pretrained({str(run / "model")!r})),
        )
        """
    )
    for name in ("stranger", "nobody"):
        assert answer[name].startswith("HubError: Loading me/run failed: there is no such repository, or it is private")
    assert "the token is missing or not valid: log in with `hf auth login`" in answer["wrong"]
    assert answer["other_place"].startswith("HubError: Pushing to you/net failed: the token may not do that")
    assert "the token is missing or not valid: log in with `hf auth login`" in answer["wrong_push"]
    assert answer["no_branch"] == "HubError: Pushing to me/run failed: it has no branch, tag or commit 'v9'."
    assert answer["owner"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_calibrate_wrote_goes_with_the_settings_only(hub: HubServer, client: Client, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = sd.wrap("resnet18", num_classes=7, image_size=64, model_kwargs={"channels": [16, 32, 64, 80]}).eval()
    sd.save_pretrained(model, run / "model")
    written = {"calibration.json", "calibration.md", "calibration.png"}
    for name in written:
        (run / name).write_text(name)
    push = f"""
    from timm_selfdistill.cli import main as cli
    answer(status=cli(["push", {str(run)!r}, "me/run"]))
    """
    assert client(push) == {"status": 0}
    assert not written & set(hub.files("me/run"))

    settings = sd.EarlyExitConfig((0.9, float("inf"), 0.7), temperatures=(1.5, 1.0, 0.5))
    save_early_exit(run / "model", settings)
    assert client(push) == {"status": 0}
    assert written <= set(hub.files("me/run"))
    assert 'sd.load_early_exit("me/run")' in hub.files("me/run")[CARD].decode()
    answer = client('answer(settings=sd.load_early_exit("me/run").config.to_json())')
    assert answer == {"settings": settings.to_json()}


def test_commands_take_a_repository_in_place_of_a_folder(hub: HubServer, client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (80, 70), "red").save(tmp_path / "red.png")
    model = sd.wrap("resnet18", num_classes=3, image_size=64, model_kwargs={"channels": [16, 32, 64, 80]}).eval()
    settings = {"label_names": ("ape", "bat", "cat"), "data_config": {"input_size": (3, 64, 64)}}
    sd.save_pretrained(model, tmp_path / "model", **settings)
    save_early_exit(tmp_path / "model", sd.EarlyExitConfig((float("inf"), 0.0, 0.9)))
    answer = client(
        f"""
        import contextlib, io, os
        from timm_selfdistill.cli import main as cli
        os.chdir({str(tmp_path)!r})
        with contextlib.redirect_stdout(io.StringIO()) as said:
            pushed = cli(["push", "model", "me/net"])
            predicted = cli(["predict", "me/net", "red.png", "--json"])
            exported = cli(["export", "me/net", "--exit", "0", "--format", "torch-export"])
        exit_0 = torch.export.load("exit-0.pt2").module()
        x = torch.randn(1, 3, 64, 64)
        local = sd.from_pretrained("model")
        with torch.no_grad():
            close = torch.allclose(exit_0(x), local.forward_exit(x, 0), atol=1e-4)
        lines = said.getvalue().splitlines()
        prediction = next(json.loads(line) for line in lines if line.startswith("{{"))
        answer(statuses=[pushed, predicted, exported], prediction=prediction, close=close)
        """
    )
    assert answer["statuses"] == [0, 0, 0]
    assert answer["prediction"]["class"] in ("ape", "bat", "cat")
    assert answer["prediction"]["exit"] == 1  # the first that the pushed settings ask is sure at once
    assert answer["close"]


def test_a_push_that_somebody_else_overtook_changes_nothing(hub: HubServer, client: Client) -> None:
    client('sd.push_to_hub(make_model(), "me/net"); answer()')
    repo = hub.repos["me/net"]
    hub.meanwhile = lambda: repo.commit("main", {"theirs.txt": b"theirs"}, repo.refs["main"])
    code = 'answer(error=refused(sd.push_to_hub, make_model(1), "me/net"))'
    error = client(code)["error"]
    assert error.startswith(
        "HubError: Pushing to me/net failed: somebody else pushed to it meanwhile, so nothing was ch"
    )
    before = hub.files("me/net")
    assert before["theirs.txt"] == b"theirs"
    hub.requests.clear()
    assert client(code)["error"] is None
    assert not [request for request in hub.requests if request.startswith("PUT")]  # the weights were sent before
    after = hub.files("me/net")
    assert after["theirs.txt"] == b"theirs"
    assert after[BACKBONE] != before[BACKBONE]


def test_a_hub_that_is_not_there_is_an_error_that_says_so(hub: HubServer, client: Client) -> None:
    nowhere = "http://127.0.0.1:9"
    answer = client(
        """
        answer(push=refused(sd.push_to_hub, make_model(), "me/net"), load=refused(sd.from_pretrained, "me/net"))
        """,
        HF_ENDPOINT=nowhere,
    )
    for error, doing in ((answer["push"], "Pushing to me/net"), (answer["load"], "Loading me/net")):
        assert error.startswith(f"HubError: {doing} failed: {nowhere} cannot be reached, and what is not in the cache")


def test_a_recipe_pushes_the_run_when_it_is_done(hub: HubServer, client: Client, tmp_path: Path) -> None:
    settings = ["epochs=1", "batch_size=16", "data.max_train=32", "data.max_eval=10", "data.image_size=16"]
    settings += ["precision='no'", "push_to_hub={repo: me/digits, private: true}", f"output_dir={tmp_path / 'run'}"]
    code = f"""
    import contextlib, io
    from timm_selfdistill.cli import main as cli
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli(["train", "digits", *{settings!r}])
    answer(status=status, errors=errors.getvalue().splitlines()[-1:])
    """
    answer = client(code, HF_TOKEN="hf_wrong")
    assert answer["status"] == 2
    assert answer["errors"][0].startswith("error: Pushing to me/digits failed: the token is missing or not valid")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]

    hub.meanwhile = lambda: hub.repos["me/digits"].commit(
        "main", {"theirs.txt": b""}, hub.repos["me/digits"].refs["main"]
    )
    answer = client(code)
    assert answer["status"] == 2
    assert "somebody else pushed to it meanwhile" in answer["errors"][0]
    run = tmp_path / "run"
    again = f"The run is complete in {run}; push it again by: timm-selfdistill push {run} me/digits"
    assert answer["errors"][0].endswith(again)
    assert (tmp_path / "run" / "model" / EXITS).is_file()

    assert client(code)["status"] == 0  # the finished run is not trained again
    files = hub.files("me/digits")
    assert set(files) - {".gitattributes", "theirs.txt"} == FILES_OF_A_RUN
    assert hub.repos["me/digits"].private
    card = files[CARD].decode()
    assert "model-index:" in card
    assert "![Accuracy of every exit over its compute](report.png)" in card


def test_a_recipe_pushes_in_the_background_while_it_trains(hub: HubServer, client: Client, tmp_path: Path) -> None:
    settings = ["epochs=5", "batch_size=16", "data.max_train=32", "data.max_eval=10", "data.image_size=16"]
    settings += ["precision='no'", "baseline=false", "schedule.warmup_epochs=0", f"output_dir={tmp_path / 'run'}"]
    settings += ["push_to_hub={repo: me/digits, every: 2, license: cc-by-4.0}"]
    # The first push in the background meets somebody else's commit; the second, and the last, do not.
    hub.meanwhile = lambda: hub.repos["me/digits"].commit(
        "main", {"theirs.txt": b""}, hub.repos["me/digits"].refs["main"]
    )
    code = f"""
    import contextlib, io
    from timm_selfdistill.cli import main as cli
    from timm_selfdistill.train import publish
    in_background = publish.in_background
    def at_once(work, name):
        future = in_background(work, name)
        future.exception()
        return future
    publish.in_background = at_once
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli(["train", "digits", *{settings!r}])
    answer(status=status, errors=errors.getvalue())
    """
    answer = client(code)
    assert answer["status"] == 0, answer["errors"]
    assert "somebody else pushed to it meanwhile, so nothing was changed" in answer["errors"]
    assert "Training goes on." in answer["errors"]
    repo = hub.repos["me/digits"]
    trees = [tree for tree in repo.commits.values() if CARD in tree]
    assert len(trees) == 2
    during, after = trees
    assert set(during) - {".gitattributes", "theirs.txt"} == {CONFIG, BACKBONE, EXITS, CARD, "recipe.yaml"}
    assert "this is the model after epoch 4 of 5" in during[CARD].decode()
    assert "license: cc-by-4.0" in during[CARD].decode()
    assert set(after) - {".gitattributes", "theirs.txt"} == FILES_OF_A_RUN
    assert during[BACKBONE] != after[BACKBONE]
    assert "Training goes on" not in after[CARD].decode()
    assert not (tmp_path / "run" / ".pushing").exists()


def test_a_push_that_stalls_is_given_up_on_a_signal(hub: HubServer, served: Served) -> None:
    hub.stalled = True
    code = """
from timm_selfdistill.stop import Interrupted, StopSignals, end_program
try:
    with StopSignals():
        sd.push_to_hub(make_model(), "me/net")
except Interrupted as interruption:
    end_program(interruption.exit_status)
"""
    process = served.forks.start(code, HF_TOKEN="hf_owner")
    while not any(request.startswith("PUT") for request in hub.requests):
        assert process.poll() is None, process.wait()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    # It does not end by itself, as the server does not answer.
    status, out, _ = process.wait(60)
    assert (status, out) == (75, "")
    assert hub.stalled


# Before anything is sent.


def test_a_licence_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"A licence is named as on the Hub, such as apache-2\.0"):
        remote.push_folder(tmp_path, "me/net", license="Apache 2")


@pytest.mark.parametrize("repo_id", ["net", "me/net/more", "me/", "me /net", "", "https://hub/me/net"])
def test_a_name_that_is_no_repositorys_is_refused(repo_id: str, tmp_path: Path) -> None:
    model = sd.wrap("resnet18", num_classes=7, image_size=32, model_kwargs={"channels": [16, 32, 64, 80]})
    with pytest.raises(ValueError, match="A repository on the Hub is named namespace/name, such as me/my-net"):
        sd.push_to_hub(model, repo_id)


def test_a_damaged_folder_is_not_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = sd.wrap("resnet18", num_classes=7, image_size=32, model_kwargs={"channels": [16, 32, 64, 80]})
    sd.save_pretrained(model, tmp_path)
    (tmp_path / EXITS).write_bytes(b"torn")
    assert cli(["push", str(tmp_path), "me/net"]) == 2
    assert "exits.safetensors is damaged or was exchanged" in capsys.readouterr().err
    assert cli(["push", str(tmp_path / "nowhere"), "me/net"]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"revision='v1' is one of a repository on the Hub, but .* is a folder"):
        sd.from_pretrained(tmp_path, revision="v1")


def test_a_full_disk_is_not_taken_for_a_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "snapshot_download", fill)
    with pytest.raises(sd.HubError, match=r"^Loading me/net failed: \[Errno 28\] No space left on device\.$"):
        sd.from_pretrained("me/net")


TOKEN = "hf_" + "aB3" * 11


def failing(error: Exception) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"Illegal header value b'Bearer {TOKEN}\\n'"),
        OSError(f"no route to https://me:{TOKEN}@huggingface.co"),
        ConnectionError("Illegal header value b'Bearer secret-token\\n'"),
    ],
)
def test_no_error_holds_a_token(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "snapshot_download", failing(error))
    with pytest.raises(sd.HubError) as caught:
        sd.from_pretrained("me/net", token="secret-token\n")
    shown = "".join(traceback.format_exception(caught.value))
    assert "***" in str(caught.value)
    assert TOKEN not in shown
    assert "secret-token" not in shown.replace('token="secret-token', "")  # this file's own line
    # What holds none is told with its cause.
    monkeypatch.setattr(remote, "snapshot_download", failing(OSError("disk")))
    with pytest.raises(sd.HubError) as caught:
        sd.from_pretrained("me/net")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_token_is_used_without_the_line_break_it_was_read_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(remote, "snapshot_download", lambda *args, **kwargs: seen.append(kwargs["token"]) or "nowhere")
    for token in ("secret-token\r\n", None, False):
        with pytest.raises(ValueError, match="holds no model"):
            sd.from_pretrained("me/net", token=token)
    assert seen == ["secret-token", None, False]


def test_nothing_that_is_pushed_tells_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run of an earlier version too, whose recipe and card hold the paths."""
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    run, data = home / "secret-client" / "run", home / "secret-client" / "imgs"
    data.mkdir(parents=True)
    recipe = load_recipe(
        {
            "model": {"name": "test_resnet", "num_classes": 3},
            "data": {"path": str(data), "image_size": 64},
            "output_dir": str(run),
        }
    )
    model = sd.wrap("test_resnet", num_classes=3, image_size=64).eval()
    card = model_card(model, Training(str(data), False, None, recipe.to_yaml()))
    card += f"\nKept in {run} and {home}/notes, token {TOKEN}.\n"
    sd.save_pretrained(model, run / "model", card=card)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "report.json").write_text(json.dumps({"dataset": str(data)}))
    (run / "report.md").write_text(f"Accuracy on {data}.\n")
    pushed: dict[str, bytes] = {}

    class Api:
        def __init__(self, **kwargs: object) -> None:
            pass

        def create_repo(self, *args: object, **kwargs: object) -> None:
            pass

        def repo_info(self, *args: object, **kwargs: object) -> Any:
            return SimpleNamespace(sha="0")

        def preupload_lfs_files(self, *args: object, **kwargs: object) -> None:
            pass

        def create_commit(self, repo_id: str, operations: list[Any], **kwargs: object) -> Any:
            for operation in operations:
                with operation.as_file() as file:
                    pushed[operation.path_in_repo] = file.read()
            return SimpleNamespace(pr_url=None, commit_url="there")

    monkeypatch.setattr(remote, "HfApi", Api)
    assert remote.push_folder(run, "me/net") == "there"
    assert set(pushed) == {CONFIG, BACKBONE, EXITS, CARD, "recipe.yaml", "report.json", "report.md"}
    for name, content in pushed.items():
        for secret in ("secret-client", "alice", str(tmp_path), TOKEN):
            assert secret.encode() not in content, name
    shared = load_recipe(mapping_of(pushed["recipe.yaml"].decode()))
    assert (shared.data.path, shared.output_dir) == ("imgs", "runs/recipe")
    assert b" on `imgs`" in pushed[CARD]
    assert b"Kept in run and notes, token ***." in pushed[CARD]
    assert json.loads(pushed["report.json"]) == {"dataset": "imgs"}


def mapping_of(text: str) -> Any:
    value, problems = parse(text)
    assert not problems
    return value
