"""Conversion of ids to rows of the stream."""

import numpy as np

from data_pipeline.stream.rows import Rows
from data_pipeline.vocabulary import PADDING, SEPARATOR


def rows_of(ids: np.ndarray) -> Rows:
    row_bytes = np.where(ids < SEPARATOR, ids, 0).astype(np.uint8)
    return Rows(row_bytes, np.flatnonzero(ids == SEPARATOR), ids == PADDING if PADDING in ids else None)
