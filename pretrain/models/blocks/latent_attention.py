"""Blocks of Perceiver IO: attention whose queries and keys can be narrower than its values, and a feed-forward layer.

Jaegle et al. 2021, arXiv:2107.14795, with the widths of the authors' code (deepmind-research/perceiver). One block
serves as cross-attention, in which it reads inputs, and as self-attention, in which positions read each other.
"""

from torch import Tensor, nn

from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.transformer import PreNorm, linear_weights


class LatentAttention(nn.Module):
    """Multi-head attention whose queries and keys have another width than its values. All maps have biases."""

    def __init__(self, width: int, input_width: int, heads: int, query_key_width: int) -> None:
        """Build the maps.

        Args:
            width: channels of the positions that read, of the values and of the output.
            input_width: channels of what they read.
            heads: attention heads; they divide the width of values, and that of queries and keys.
            query_key_width: channels of the queries and of the keys of all heads.
        """
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, query_key_width)
        self.key = nn.Linear(input_width, query_key_width)
        self.value = nn.Linear(input_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, inputs: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend from positions to inputs.

        Args:
            x: (rows, n, width)
            inputs: (rows, m, input_width)
            visible: (rows, 1, 1, m) booleans: inputs that are seen, such as those without padding. None: all.

        Returns:
            (rows, n, width)
        """
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.query(x), self.key(inputs), self.value(inputs))
        )
        mixed = attention(q, k, v, visible)
        merged: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return merged

    def flops(self, n: int, m: int) -> int:
        """Return the operations of all matrix products of n positions that read m inputs."""
        of_inputs = linear_weights(self.key) + linear_weights(self.value)
        of_positions = linear_weights(self.query) + linear_weights(self.output)
        pairs = 2 * n * m * (self.key.out_features + self.value.out_features)
        return 2 * (n * of_positions + m * of_inputs) + pairs


class LatentBlock(PreNorm):
    """Pre-norm block of Perceiver IO. It reads inputs, which have a norm of their own, or its own positions."""

    attention: LatentAttention

    def __init__(
        self,
        width: int,
        attention: LatentAttention,
        feed_forward: FeedForward,
        dropout: float = 0.0,
        *,
        input_width: int | None = None,
        adds_queries: bool = True,
    ) -> None:
        """Build the norms around the two layers.

        Args:
            width: channels of the residual stream.
            attention: attention layer.
            feed_forward: feed-forward layer.
            dropout: share of the output of each layer that is dropped in training.
            input_width: channels of the inputs. None: the block reads its own positions.
            adds_queries: whether the output of attention is added to what makes the queries. Perceiver IO's output
                queries are positions, and what they read is not added to them.
        """
        super().__init__(width, attention, feed_forward, dropout)
        self.input_norm = None if input_width is None else LayerNorm(input_width)
        self.adds_queries = adds_queries

    def forward(self, x: Tensor, inputs: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape.

        Args:
            x: residual stream, or queries.
            inputs: (rows, m, input_width) what is read. None: x.
            visible: (rows, 1, 1, m) booleans: inputs that are seen. None: all.
        """
        queries: Tensor = self.attention_norm(x)
        if self.input_norm is not None:
            assert inputs is not None
            inputs = self.input_norm(inputs)
        attended = self.attention(queries, queries if inputs is None else inputs, visible)
        return self.add(x if self.adds_queries else x.new_zeros(()), attended)

    def flops(self, n: int, m: int) -> int:
        """Return the operations of all matrix products of n positions that read m inputs."""
        return self.attention.flops(n, m) + 2 * n * linear_weights(self.feed_forward)
