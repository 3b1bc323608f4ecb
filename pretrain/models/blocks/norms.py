"""Normalization layers."""

from torch import nn

from pretrain.models.initial import Initial


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimension (Ba et al. 2016), which begins as the identity map."""

    def own_initial(self, parameter: str) -> Initial:
        """Return the constant 1 for the weight and the constant 0 for the bias."""
        return Initial(mean=float(parameter == "weight"))


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dimension (Zhang and Sennrich 2019), times a weight from 1 on."""

    def __init__(self, width: int) -> None:
        """Make the norm of `width` channels."""
        super().__init__(width, eps=1e-5)

    def own_initial(self, parameter: str) -> Initial:
        """Return the constant 1 for the weight."""
        return Initial(mean=1.0)
