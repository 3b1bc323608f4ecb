"""The command of lm_eval, with the model `byteloom`."""

import sys
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate

import byteloom.harness


def main(arguments: Sequence[str]) -> None:
    """Run the command of lm_eval.

    Args:
        arguments: words after `lm_eval`.
    """
    assert byteloom.harness.model_registry  # registered by the import
    sys.argv[:] = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
