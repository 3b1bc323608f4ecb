"""Text for people."""

import io
import sys

import pytest

from byteloom.core.text import escape_unknown_characters


def test_characters_that_an_encoding_lacks_are_printed_as_escapes(monkeypatch: pytest.MonkeyPatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    escape_unknown_characters()
    print("a │ 中 \udc80", end="", flush=True)
    assert out.buffer.getvalue() == rb"a \u2502 \u4e2d \udc80"
