"""Vectors of patches mapped to their positions by linear maps, one for each place in a patch (AU-Net)."""

from torch import Tensor, nn

from pretrain.models.patching.chunks import gather


class MultiLinear(nn.Module):
    """Multi-linear up-sampling of AU-Net (Videau et al. 2025, arXiv:2506.14761).

    A position gets U y + V_j y: y is the vector of its patch, and j is its place in the patch, modulo the number of
    maps. All maps are applied to each patch, so shapes are static.
    """

    def __init__(self, inputs: int, outputs: int, places: int) -> None:
        """Make the maps.

        Args:
            inputs: channels of a patch.
            outputs: channels of a position.
            places: number of maps V.
        """
        super().__init__()
        self.places = places
        self.shared = nn.Linear(inputs, outputs, bias=False)
        self.by_place = nn.Linear(inputs, places * outputs, bias=False)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the maps of all places; see `FusesMatrices`."""
        return {"by_place.weight": self.places}

    def forward(self, x: Tensor, numbers: Tensor, ages: Tensor) -> Tensor:
        """Map (rows, k, inputs) vectors of patches to (rows, n, outputs) of positions.

        Args:
            x: vectors of patches.
            numbers: (rows, n) patch of each position.
            ages: (rows, n) positions since the start of this patch.
        """
        mapped = self.by_place(x).unflatten(-1, (self.places, -1)) + self.shared(x)[:, :, None]
        return gather(mapped.flatten(1, 2), numbers * self.places + ages % self.places)
