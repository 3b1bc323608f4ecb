"""Weights in the formats of the authors' code and of transformers: import and export.

    FILE ─ read ─▶ Source ─ config_of ─▶ model section ─ to_byteloom ─▶ weights by Byteloom's names ─▶ export folder
    RUN  ─▶ weights by Byteloom's names ─ from_byteloom ─▶ FILE

No file can run code: torch files are read with weights_only, and NumPy's without pickle.
"""

from pretrain.training.weights.foreign.conversion import export_foreign, import_foreign
from pretrain.training.weights.foreign.source import ForeignFileError

__all__ = ["ForeignFileError", "export_foreign", "import_foreign"]
