"""Check that a JPEG has the compressed data of every block, and no more.

libjpeg fills missing blocks with grey, skips bytes that it does not need, and only warns; Pillow hides the warnings.
The check decodes variants of the file (ITU-T T.81, annex B, has the markers):

    with filler at the end of each segment of compressed data   other pixels ─▶ the decoder ran out of data
    with other bytes in the last SEGMENT_TAIL of the only segment  same pixels ─▶ the decoder did not use them

The second variant exists only for a file of one segment: baseline, without restart markers. Damage that changes no
length is not noticed.

Of the runs of zeros in a scan of a progressive file, the first variant finds about two in three. No sound rule finds
the others: Pillow does not tell how many bytes a scan used; zeros are what an encoder writes for an even area, as bits
of a refinement or as codes of blocks without change; and other bytes at the end of a scan of an even area often change
no pixel, because bright pixels cannot become brighter.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

SCAN_MARKER, END_MARKER = 0xDA, 0xD9
RESTART_MARKERS = range(0xD0, 0xD8)
JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff]")
"""A marker in compressed data, where FF 00 stands for the byte FF."""
FILLER = bytes(range(1, 65))
"""Compressed data of some blocks, whatever they show."""
SEGMENT_TAIL = 16
"""Bytes at the end of a segment that certainly belong to some block."""


class _Part(NamedTuple):
    """A marker with its parameters, or a segment of compressed data."""

    content: bytes
    is_data: bool
    marker: int = 0
    """Code of the marker that ends a segment."""


def jpeg_fault(content: bytes, shows_the_same: Callable[[bytes], bool]) -> str | None:
    """Return what is wrong with the compressed data of a JPEG; None if nothing is.

    Args:
        content: the file.
        shows_the_same: returns whether a variant of the file has the same pixels.
    """
    parts = list(_parts(content))
    segments = [part for part in parts if part.is_data]
    restarts = [part.marker for part in segments if part.marker in RESTART_MARKERS]
    if len(segments) == len(restarts) + 1 and any(m != RESTART_MARKERS[n % 8] for n, m in enumerate(restarts)):
        return "a part of its compressed data is missing"
    if not shows_the_same(b"".join(p.content + FILLER * p.is_data for p in parts)):
        return "a part of its compressed data is missing"
    # Data in which every code has the same meaning, as of one colour, changes no pixel at all.
    if len(segments) == 1 and all(
        shows_the_same(_with_other_tail(parts, size)) != is_all
        for size, is_all in ((SEGMENT_TAIL, False), (len(content), True))
    ):
        return "it has compressed data that is not used"
    return None


def _parts(content: bytes) -> Iterator[_Part]:
    """Yield the parts of a file up to its end marker, which is added if it is missing."""
    yield _Part(content[:2], False)
    at = 2
    while at + 4 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF or marker == END_MARKER:
            break
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        yield _Part(content[at:end], False)
        at = end
        while marker == SCAN_MARKER or marker in RESTART_MARKERS:  # compressed data follows
            found = JPEG_MARKER.search(content, at)
            end, ending = (found.start(), found[0][-1]) if found else (len(content), END_MARKER)
            yield _Part(content[at:end], True, ending)
            at, marker = end, END_MARKER
            if found and ending in RESTART_MARKERS:
                yield _Part(found[0], False)
                at, marker = found.end(), ending
    yield _Part(bytes((0xFF, END_MARKER)), False)


def _with_other_tail(parts: list[_Part], size: int) -> bytes:
    """Return a file with other bytes at the end of its segments."""
    changed = list[bytes]()
    for part in parts:
        if not part.is_data:
            changed.append(part.content)
            continue
        plain = bytearray(part.content.replace(b"\xff\x00", b"\xff"))
        for index in range(max(0, len(plain) - size), len(plain)):
            plain[index] ^= 0x55
        changed.append(bytes(plain).replace(b"\xff", b"\xff\x00"))
    return b"".join(changed)
