"""Embedding tables."""

import torch
from torch import nn


def embedding(symbols: int, width: int) -> nn.Embedding:
    """Return an embedding table of shape (symbols, width) without values.

    The model sets them. The constructor of nn.Embedding would draw values, which on the meta device imports torch's
    compiler.
    """
    return nn.Embedding.from_pretrained(torch.empty(symbols, width), freeze=False)
