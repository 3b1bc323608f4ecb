"""Check of the pages of an Ogg (RFC 3533), which libsndfile does not make.

    page: "OggS", version, flags, …, number of segments, the size of each ─▶ segments ─▶ next page

A page that begins a stream comes before all pages of data, unless several sounds stand in one file. The last page ends
its stream, unless the file was cut between two pages.
"""

import os
from collections.abc import Iterator

PAGE_MARK = b"OggS"
HEADER_BYTES = 27
MOST_SEGMENTS = 255
BEGINS, ENDS = 2, 4
"""Flags of the first and the last page of a stream."""


def ogg_fault(descriptor: int) -> str | None:
    """Return what is wrong with the pages of a file; None if nothing is. Two small reads a page at most."""
    flags, has_data = None, False
    for flags in _flags_of_pages(descriptor):
        if flags & BEGINS and has_data:
            return "it holds several sounds, one after the other"
        has_data = has_data or not flags & BEGINS
    if flags is not None and not flags & ENDS:
        return "it is cut short: its last page is not marked as the end of the sound"
    return None


def _flags_of_pages(descriptor: int) -> Iterator[int]:
    """Yield the flags of each whole page, up to bytes that belong to no page."""
    size, at = os.fstat(descriptor).st_size, 0
    while (head := os.pread(descriptor, HEADER_BYTES + MOST_SEGMENTS, at)).startswith(PAGE_MARK):
        if len(head) < HEADER_BYTES:
            return
        count = head[HEADER_BYTES - 1]
        at += HEADER_BYTES + count + sum(head[HEADER_BYTES : HEADER_BYTES + count])
        if at > size:
            return
        yield head[5]
