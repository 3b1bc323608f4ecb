"""Ratio loss: it keeps the number of patches near a target, where a model learns where patches start."""

from torch import Tensor


def ratio_loss(starts: Tensor, probability: Tensor, target: float) -> Tensor:
    """Return the ratio loss (H-Net, arXiv:2507.07955, section 2.2), elementwise.

    It is N/(N-1) ((N-1) F G + (1-F)(1-G)). It is 1 wherever F or G is 1/N, which is a saddle and not a minimum. Only G
    has a gradient.

    Args:
        starts: F, share of positions at which a patch starts.
        probability: G, mean probability of a start.
        target: N > 1, positions of a patch.
    """
    return 1 + (target * starts - 1) * (target * probability - 1) / (target - 1)
