"""Patches that follow the data: where they start, and vectors of patches instead of positions.

    positions   start  T    h    e    ·    c    a    t        what each position reads
    starts        1    0    0    0    1    0    0    0        boundary flags, functions of what was read so far
    patch         0    0    0    0    1    1    1    1        newest patch that a position may use

Position i reads the id before i and predicts id i, so a patch that starts at i helps to predict id i and later ids.

A row has at most `capacity` patches, a constant of the model. After them, it continues without new ones: every
byte is scored, shapes are static, and a prefix has the patches that it has in the whole row.
"""
