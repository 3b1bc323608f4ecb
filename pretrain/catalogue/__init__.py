"""Catalogue of Transformers: what papers say of their models, and which of them Byteloom has recipes for.

    models/*.yaml ─▶ entries.py: typed and checked ─▶ lineage.py: forest of `extends` ─▶ text, picture.py: SVG

The models are those of Amatriain et al. 2023 (arXiv:2302.07730), and Transformers that Byteloom trains.
"""

from pretrain.catalogue.entries import Entry, Grouping, Result, grouped, read_catalogue
from pretrain.catalogue.lineage import lineage

__all__ = ["Entry", "Grouping", "Result", "grouped", "lineage", "read_catalogue"]
