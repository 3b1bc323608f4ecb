"""Weights for transformers and the Hugging Face Hub: export and import.

Neither needs transformers. `code` holds the files that run where the folder is loaded.
"""

from pretrain.training.weights.hugging_face.folder import export_for_transformers

__all__ = ["export_for_transformers"]
