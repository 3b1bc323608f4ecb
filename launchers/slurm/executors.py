"""submitit, which is imported when something is submitted."""

import importlib
from types import ModuleType

from byteloom.core.packages import needed_by


def import_submitit() -> ModuleType:
    """Return submitit, with the modules of it that launchers use.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needed_by("a submission", "submitit"):
        importlib.import_module("submitit.slurm.slurm")
        return importlib.import_module("submitit")
