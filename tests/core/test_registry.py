"""Registries: names, nearest names, and entry points of other packages."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byteloom.core.registries.registry import Registry, RegistryError

GROUP = "byteloom.test_things"
THINGS: Registry[int] = Registry("thing", GROUP)

InstallPackage = Callable[..., None]


@pytest.fixture
def things() -> Registry[int]:
    """Return a registry with two entries of our own."""
    THINGS.__init__("thing", GROUP)  # type: ignore[misc]
    THINGS.register("one", 1)
    THINGS.register("two", 2)
    return THINGS


@pytest.fixture
def install_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPackage:
    """Return a function that installs a package with an entry point on the import path of this test."""

    def install(package: str, name: str, code: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {package}_module\n")
        (folder / f"{package}_module.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(f"{package}_module", None)

    return install


def registering(name: str, value: int) -> str:
    """Return the source of a module that registers an entry."""
    return f"from tests.core.test_registry import THINGS\nTHINGS.register({name!r}, {value})\n"


def test_own_entries_keep_their_order(things: Registry[int]):
    assert things.names() == ["one", "two"]
    assert things.entries() == {"one": 1, "two": 2}


def test_second_entry_of_a_name_is_refused(things: Registry[int]):
    with pytest.raises(RegistryError, match="the thing one is registered twice"):
        things.register("one", 3)


def test_unknown_name_is_refused_with_the_nearest_name(things: Registry[int]):
    with pytest.raises(RegistryError, match=r"twoo is not the name of a thing \(did you mean two\?\)"):
        things.get("twoo")


def test_entry_point_is_imported_when_its_entry_is_requested(things: Registry[int], install_package: InstallPackage):
    install_package("foreign", "three", registering("three", 3))
    assert things.names() == ["one", "two", "three"]
    assert "foreign_module" not in sys.modules
    assert things.get("three") == 3


def test_broken_entry_point_fails_for_its_own_name_only(
    things: Registry[int], install_package: InstallPackage, caplog: pytest.LogCaptureFixture
):
    install_package("broken", "bad", "raise OSError('no licence')")
    assert things.get("one") == 1
    with pytest.raises(RegistryError, match=r"bad = broken_module .* cannot be imported: OSError: no licence"):
        things.get("bad")
    assert things.entries() == {"one": 1, "two": 2}
    assert "no licence" in caplog.text


def test_entry_point_cannot_replace_an_entry_of_our_own(things: Registry[int], install_package: InstallPackage):
    install_package("greedy", "one", registering("one", 9))
    with pytest.raises(RegistryError, match=r"one = greedy_module of greedy .* has the name of another thing"):
        things.get("one")


def test_two_packages_cannot_register_the_same_name(things: Registry[int], install_package: InstallPackage):
    install_package("first", "four", registering("four", 4))
    install_package("second", "four", registering("four", 5))
    with pytest.raises(RegistryError, match="first and second both have a thing named four"):
        things.get("four")


def test_entry_point_that_registers_nothing_is_refused(things: Registry[int], install_package: InstallPackage):
    install_package("empty", "five", "")
    with pytest.raises(RegistryError, match="registers no thing named five"):
        things.get("five")
