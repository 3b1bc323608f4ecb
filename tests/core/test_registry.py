"""Registries: names, nearest names, and entry points of other packages."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byteloom.core.registry import Registry, RegistryError

GROUP = "byteloom.test_things"
THINGS: Registry[int] = Registry("thing", GROUP)

Offer = Callable[..., None]


@pytest.fixture
def things() -> Registry[int]:
    """A registry of two own entries."""
    THINGS.__init__("thing", GROUP)  # type: ignore[misc]
    THINGS.register("one", 1)
    THINGS.register("two", 2)
    return THINGS


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Install a package that has an entry point, on the import path of this test."""

    def install(package: str, name: str, code: str) -> None:
        place = tmp_path / package
        info = place / f"{package}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {package}_module\n")
        (place / f"{package}_module.py").write_text(code)
        monkeypatch.syspath_prepend(str(place))
        sys.modules.pop(f"{package}_module", None)

    return install


def registering(name: str, value: int) -> str:
    """Return the source of a module that registers an entry."""
    return f"from tests.core.test_registry import THINGS\nTHINGS.register({name!r}, {value})\n"


def test_own_entries_are_there_in_their_order(things: Registry[int]):
    assert things.names() == ["one", "two"]
    assert things.entries() == {"one": 1, "two": 2}


def test_a_name_that_is_taken_is_refused(things: Registry[int]):
    with pytest.raises(RegistryError, match="two things are registered as one"):
        things.register("one", 3)


def test_an_unknown_name_is_refused_with_the_nearest(things: Registry[int]):
    with pytest.raises(RegistryError, match=r"twoo is not the name of a thing \(did you mean two\?\)"):
        things.get("twoo")


def test_an_entry_point_is_imported_when_its_name_is_asked_for(things: Registry[int], offer: Offer):
    offer("theirs", "three", registering("three", 3))
    assert things.names() == ["one", "two", "three"]
    assert "theirs_module" not in sys.modules
    assert things.get("three") == 3


def test_a_broken_entry_point_is_an_error_for_its_own_name_alone(
    things: Registry[int], offer: Offer, caplog: pytest.LogCaptureFixture
):
    offer("broken", "bad", "raise OSError('no licence')")
    assert things.get("one") == 1
    with pytest.raises(RegistryError, match=r"bad = broken_module .* cannot be imported: OSError: no licence"):
        things.get("bad")
    assert things.entries() == {"one": 1, "two": 2}
    assert "no licence" in caplog.text


def test_an_entry_point_cannot_take_the_name_of_an_own_entry(things: Registry[int], offer: Offer):
    offer("greedy", "one", registering("one", 9))
    with pytest.raises(RegistryError, match=r"one = greedy_module of greedy .* two things are registered as one"):
        things.get("one")


def test_two_packages_cannot_have_one_name(things: Registry[int], offer: Offer):
    offer("first", "four", registering("four", 4))
    offer("second", "four", registering("four", 5))
    with pytest.raises(RegistryError, match="first and second both have a thing named four"):
        things.get("four")


def test_an_entry_point_that_registers_nothing_is_refused(things: Registry[int], offer: Offer):
    offer("empty", "five", "")
    with pytest.raises(RegistryError, match="registers no thing of this name"):
        things.get("five")
