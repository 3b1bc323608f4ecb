"""The page on scale: its numbers are those that `benchmarks/roofline.py` counts."""

import re

import pytest

from benchmarks.roofline import PAGE, tables

TOLERANCE = 0.1
"""Changes of a model's operations by less than this leave the page as it is."""


@pytest.mark.slow
def test_tables_of_the_page_are_within_10_percent_of_what_is_counted():
    page = PAGE.read_text(encoding="utf-8")
    for name, counted in tables().items():
        (written,) = re.findall(f"<!-- roofline: {name} -->\n(.*?)<!-- end -->", page, re.S)
        cells, own = ([cell.strip() for cell in re.split(r"\||\n", text)] for text in (written.strip(), counted))
        assert len(cells) == len(own), "run python benchmarks/roofline.py --write"
        for cell, other in zip(cells, own, strict=True):
            is_number = re.fullmatch(r"[\d,.]+", other)
            expected = pytest.approx(float(other.replace(",", "")), rel=TOLERANCE, abs=0.02) if is_number else other
            assert (float(cell.replace(",", "")) if is_number else cell) == expected, (
                "run benchmarks/roofline.py --write"
            )
