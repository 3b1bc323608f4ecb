"""Launcher of a terminal with ranks that need no model: `python -m tests.launchers.terminal RECIPE STEP_SECONDS`."""

import logging
import sys
from pathlib import Path

from launchers.local import run_processes
from launchers.supervision.plan import SuperviseConfig

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    recipe, limits = Path(sys.argv[1]), SuperviseConfig(step_seconds=float(sys.argv[2]))
    sys.exit(
        run_processes("tests.launchers.entry:start", recipe, 2, lambda rank: recipe.parent / f"{rank}.log", limits)
    )
