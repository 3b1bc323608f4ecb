"""Shades of bytes: in a terminal, in a page, and of what a person types to a model."""

import os
import pty
import re
import select
import signal
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import byteloom
from pretrain.cli.app import app
from pretrain.evaluation.surprise import characters_of, surprise_page, visible
from tests import commands
from tests.conftest import recipe_tree

TEXT = "a ü 𝄞\t\x1b[31m\n\x9b".encode() + b"\x9b\x00"
SHOWN = "a ü 𝄞→   \\x1b[31m⏎\n\\u009b\\x9b\\x00"


@given(st.binary(max_size=40), st.randoms())
def test_characters_have_the_bytes_and_the_bits_of_a_text(data: bytes, random):
    bits = [random.uniform(0, 12) for _ in data]
    characters = list(characters_of(data, bits))
    assert sum(each.size for each in characters) == len(data)
    assert sum(each.bits * each.size for each in characters) == pytest.approx(sum(bits))
    assert all(each.shade == min(8, int(each.bits)) for each in characters)


@given(st.characters())
def test_nothing_that_is_shown_controls_a_terminal(character: str):
    assert all(each.isprintable() or each == "\n" for each in visible(character))


def test_page_shows_the_text_and_the_bits():
    page = surprise_page("<file>", "a summary", characters_of(TEXT, [1.25] * len(TEXT)))
    body = page.split("<pre>")[1].split("</pre>")[0]
    assert unescape(re.sub("<[^>]+>", "", body)) == SHOWN
    assert body.count('class="s1" title="1.25 bits"') == len(list(characters_of(TEXT, [1.25] * len(TEXT))))
    assert "<title>&lt;file&gt;</title>" in page


@pytest.fixture(scope="module")
def run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surprise")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    return byteloom.train(recipe, run={"root": folder}, train={"steps": 2}, validation={"shards": None})


def colored(*arguments: object, typed: str = "") -> str:
    """Return the output of a command that writes true colors."""
    environment = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": "200"}
    done = CliRunner().invoke(app, [str(each) for each in arguments], input=typed, env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[?\d;]*[a-z]", "", text)


@pytest.mark.slow
def test_surprise_shows_the_bits_of_a_file(run: Path, tmp_path: Path):
    (tmp_path / "file").write_bytes(TEXT)
    shown = colored("surprise", run, tmp_path / "file", "--device", "cpu")
    assert plain(shown).split("and more\n")[1] == f"{SHOWN}\n"
    assert "\x1b[30;48;2;" in shown or "\x1b[37;48;2;" in shown
    colored("surprise", run, tmp_path / "file", "--device", "cpu", "--html", tmp_path / "page.html")
    mean = byteloom.load(run, device="cpu").bits(TEXT, mode="sliding").mean()
    assert f"{len(TEXT)} bytes, {mean:.4f} bits per byte" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_chat_shades_what_is_typed_and_continues_it(run: Path):
    shown = colored("chat", run, "--bytes", 5, "--temperature", 0, "--device", "cpu", typed="def \nif \\\nx\n\n")
    model = byteloom.load(run, device="cpu")
    document, expected = b"", ""
    for typed in (b"def ", b"if \nx", b""):
        document += typed
        added = b"".join(model.generate(document, bytes=5, temperature=0))
        document += added
        expected += "".join(each.text for each in characters_of(typed, np.zeros(len(typed)))) + f"{_shown(added)}\n"
    assert plain(shown).split("and more\n")[1] == expected


@pytest.mark.slow
def test_ctrl_c_ends_a_continuation_and_ctrl_d_the_chat(run: Path):
    keyboard, terminal = pty.openpty()
    arguments = ["chat", run, "--bytes", 1_000_000, "--temperature", 0, "--device", "cpu"]
    with commands.start(arguments, stdin=terminal, stdout=terminal, stderr=terminal) as chat:
        try:
            read_until(keyboard, "> ")
            os.write(keyboard, b"def \n")
            read_until(keyboard, "\ndef  ")  # the text once more, which the continuation follows
            chat.send_signal(signal.SIGINT)
            read_until(keyboard, "\n> ")
            os.write(keyboard, b"\x04")
            assert chat.wait(60) == 0
        finally:
            chat.kill()


def read_until(terminal: int, end: str) -> None:
    """Read from a terminal until a text has come."""
    found = b""
    while end not in plain(found.decode(errors="replace").replace("\r", "")):
        assert select.select([terminal], [], [], 60)[0], found
        found += os.read(terminal, 4096)


def _shown(data: bytes) -> str:
    return "".join(each if each in "\n\t" else visible(each) for each in data.decode("utf-8", "surrogateescape"))
