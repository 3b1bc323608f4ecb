"""Normalization layers."""

from torch import nn

from pretrain.models.initial import Initial


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimension (Ba et al. 2016), which begins as the identity map."""

    def own_initial(self, parameter: str) -> Initial:
        """Return the constant 1 for the weight and the constant 0 for the bias."""
        return Initial(mean=float(parameter == "weight"))
