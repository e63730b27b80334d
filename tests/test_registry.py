import pytest

from timm_selfdistill import registry
from timm_selfdistill.registry import Registry


class FakeEntryPoint:
    def __init__(self, name, value, loaded):
        self.name, self.value, self.loaded = name, value, loaded

    def load(self):
        if isinstance(self.loaded, BaseException):
            raise self.loaded
        return self.loaded


@pytest.fixture
def heads():
    return Registry("head", "timm_selfdistill.test")


@pytest.fixture
def install(monkeypatch):
    """A function that makes entry points look installed, in one group, and returns how often they were asked for."""

    def install_points(*points):
        asked = []

        def entry_points(group):
            asked.append(group)
            return points if group == "timm_selfdistill.test" else ()

        monkeypatch.setattr(registry, "entry_points", entry_points)
        return asked

    return install_points


def test_register_returns_the_entry_and_get_finds_it(heads):
    @heads.register("mine")
    class Mine:
        pass

    assert Mine.__name__ == "Mine"
    assert heads.get("mine") is Mine


def test_names_are_sorted(heads):
    for name in ("b", "c", "a"):
        heads.register(name)(object())
    assert heads.names() == ["a", "b", "c"]


def test_taken_name_is_refused_and_the_first_entry_kept(heads):
    heads.register("mine")("first")
    with pytest.raises(ValueError, match=r"head named 'mine' is already registered: 'first'"):
        heads.register("mine")("second")
    assert heads.get("mine") == "first"


def test_unknown_name_lists_the_known_ones_and_the_nearest(heads):
    heads.register("linear")("a")
    heads.register("bottleneck")("b")
    with pytest.raises(ValueError, match=r"Unknown head 'linaer'; known are bottleneck, linear; did you mean 'linear'"):
        heads.get("linaer")


def test_entry_points_are_loaded_once_and_found_by_name(heads, install):
    asked = install(FakeEntryPoint("third", "package:Third", "entry"))
    assert heads.get("third") == "entry"
    assert heads.names() == ["third"]
    assert asked == ["timm_selfdistill.test"]


@pytest.mark.filterwarnings("ignore:head 'broken'")
def test_broken_entry_point_is_reported_by_name_and_leaves_the_others(heads, install):
    install(
        FakeEntryPoint("broken", "package:Broken", ImportError("no module named gone")),
        FakeEntryPoint("whole", "package:Whole", "entry"),
    )
    assert heads.names() == ["whole"]
    assert heads.get("whole") == "entry"
    with pytest.raises(
        ValueError, match=r"'broken' is installed but cannot be loaded: package:Broken: no module named"
    ):
        heads.get("broken")


def test_broken_entry_point_warns(heads, install):
    install(FakeEntryPoint("broken", "package:Broken", ImportError("no module named gone")))
    with pytest.warns(UserWarning, match=r"head 'broken' cannot be loaded: package:Broken: no module named gone"):
        heads.names()


def test_entry_point_under_a_taken_name_warns_and_does_not_replace(heads, install):
    heads.register("mine")("first")
    install(FakeEntryPoint("mine", "package:Other", "second"))
    with pytest.warns(UserWarning, match=r"package:Other: A head named 'mine' is already registered"):
        assert heads.get("mine") == "first"


class Quits(BaseException):
    """What test runners raise to skip a module."""


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (SystemExit(3), r"it ends the process, by sys\.exit\(3\)"),
        (SystemExit(), r"it ends the process, by sys\.exit\(\)"),
        (Quits("skipped"), "skipped"),
        (ZeroDivisionError(), r"ZeroDivisionError\(\)"),
        (ValueError("\x1b[2J"), r"\\x1b\[2J"),
    ],
)
def test_an_entry_point_that_ends_the_process_is_named_and_skipped(heads, install, failure, reason):
    install(FakeEntryPoint("broken", "package:Broken", failure), FakeEntryPoint("whole", "package:Whole", "entry"))
    with pytest.warns(UserWarning, match=rf"head 'broken' cannot be loaded: package:Broken: {reason}"):
        assert heads.names() == ["whole"]
    with pytest.raises(ValueError, match=rf"'broken' is installed but cannot be loaded: package:Broken: {reason}"):
        heads.get("broken")


def test_a_signal_while_an_entry_point_is_loaded_is_no_fault_of_it(heads, install):
    class Stopped(BaseException):
        __module__ = "timm_selfdistill.stop"

    for signal in (KeyboardInterrupt(), Stopped()):
        heads = Registry("head", "timm_selfdistill.test")
        install(FakeEntryPoint("slow", "package:Slow", signal))
        with pytest.raises(type(signal)):
            heads.names()
