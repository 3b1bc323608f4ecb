"""Speed of drawing first values, against torch's generators.

python benchmarks/initial.py [--quick] [--json PATH]

A value is a median of rounds in which the methods alternate, on one thread. `torch.randn` draws a normal distribution
that is not cut, and `trunc_normal_` is what version 1 of the first values used. A range is 1/1,024 of the values.
"""

import torch

from common.report import Metric, interleaved, options, report
from pretrain.models.initial import Initial, draw

VALUES, QUICK_VALUES = 1 << 24, 1 << 21
RANKS = 1024
ROUNDS = 5
RANDN_GOAL = 0.25


def main() -> None:
    chosen = options(__doc__)
    torch.set_num_threads(1)
    count = QUICK_VALUES if chosen.quick else VALUES
    values, initial = torch.empty(count), Initial(0.02)
    seconds = interleaved(
        {
            "draw": lambda: draw(initial, 0, "weight", 0, count),
            "range": lambda: draw(initial, 0, "weight", count // 2, count // 2 + count // RANKS),
            "randn": lambda: torch.randn(count),
            "trunc_normal_": lambda: torch.nn.init.trunc_normal_(values, 0.0, 0.02, -0.04, 0.04),
        },
        ROUNDS,
    )
    speed = {name: count / taken / 1e6 for name, taken in seconds.items()}
    whole = f"{speed['draw']:,.0f} million values a second"
    metrics = [
        Metric(
            "draw", speed["draw"] / speed["randn"], "of randn", f"{whole}; randn: {speed['randn']:,.0f}", RANDN_GOAL
        ),
        Metric("draw", speed["draw"] / speed["trunc_normal_"], "of trunc_normal_", whole),
        Metric(f"a range of 1/{RANKS:,}", seconds["range"] / seconds["draw"], "of the whole's time", "", None, "lower"),
    ]
    report("First values", metrics, chosen.json)


if __name__ == "__main__":
    main()
