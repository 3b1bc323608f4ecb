"""Layers that know which part of the rows they have; see pretrain/distributed/context.py."""

from torch import Tensor, nn

from pretrain.distributed.context import WHOLE_ROWS, Context


class InContext(nn.Module):
    """Base of the layers whose tensors may be parts of rows."""

    context: Context = WHOLE_ROWS
    """This rank's part of the rows. The model sets it."""


class Dropout(InContext, nn.Dropout):
    """Dropout of (rows, n, width) values; see `Context.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the values. In training, some of them are 0."""
        return self.context.dropout(input, self.p) if self.training else input


def set_context(module: nn.Module, context: Context) -> None:
    """Set the context of all layers within a module."""
    for layer in module.modules():
        if isinstance(layer, InContext):
            layer.context = context
