"""Plots of a report: which numbers each shows, for the page's JSON and for the tables behind the plots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.report.numbers import PLACES
from pretrain.report.run_data import RunData
from pretrain.terminal.losses import BITS_PER_BYTE, is_loss

KNOWN = {
    "loss": ("Loss", "bits per byte", "bits"),
    "learning-rate": ("Learning rate", "", "number"),
    "gradient-norm": ("Gradient norm", "", "number"),
    "speed": ("Speed", "", "rate"),
    "mfu": ("Model FLOPs utilization", "", "share"),
    "data-wait": ("Share of a step that waits for data", "", "share"),
    "phases": ("Phases of a step", "", "seconds"),
    "memory": ("Peak memory", "", "bytes"),
    "patches": ("Bytes per patch", "", "number"),
    "capacity": ("Capacity of patches: use, and what comes after it", "", "share"),
    "router": ("Router of patches", "", "share"),
    "ratio": ("Ratio loss of patches", "", "number"),
}
"""Title, unit and format of each plot that has a fixed place, in order."""
COLUMNS = {
    "train/bits_per_byte": ("loss", "train"),
    "learning_rate": ("learning-rate", ""),
    "gradient_norm": ("gradient-norm", ""),
    "bytes_per_second": ("speed", ""),
    "mfu": ("mfu", ""),
    "data_wait_share": ("data-wait", ""),
    "step_seconds": ("phases", "step"),
    "forward_backward_seconds": ("phases", "forward and backward"),
    "optimizer_seconds": ("phases", "optimizer"),
    "data_seconds": ("phases", "wait for data"),
    "communication_seconds": ("phases", "communication"),
    "peak_memory_bytes": ("memory", "largest rank"),
    "peak_memory_bytes/least": ("memory", "smallest rank"),
}
"""Plot of a number of metrics.jsonl, and its label there."""
OF_PATCHES = {
    "bytes_per_patch": "patches",
    "positions_per_patch": "patches",
    "capacity_used": "capacity",
    "overflow_rows": "capacity",
    "overflow_bytes": "capacity",
    "router_starts": "router",
    "router_probability": "router",
    "router_confidence": "router",
    "ratio_loss": "ratio",
}
"""Plot of a number patches/STAGE/NAME, by its name."""
NOT_SHOWN = {
    "forward_backward_seconds/least",
    "communication_seconds/least",
    "bytes_per_second/per_rank",
    "slowest_rank",
}
"""Numbers that the others imply, or that are no curve."""


@dataclass(frozen=True)
class Series:
    """A curve of a plot."""

    label: str
    run: int
    """Number of the run in the report."""
    order: int
    """Number of the series among those of the run in the plot."""
    table: str
    """Table of the run that holds it."""
    column: str


@dataclass
class Plot:
    """A plot of the page."""

    id: str
    """Id of its element."""
    title: str
    unit: str
    format: str
    """Format of its values; page.js has the formats."""
    series: list[Series] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the plot as page.js reads it."""
        return {
            "id": self.id,
            "unit": self.unit,
            "format": self.format,
            "series": [vars(each) for each in self.series],
        }


def plots_of(runs: Sequence[RunData]) -> list[Plot]:
    """Return the plots of the numbers of runs, those of KNOWN first."""
    plots = {key: Plot(f"plot-{key}", *how) for key, how in KNOWN.items()}
    for number, run in enumerate(runs):
        for table, column, key, label in _columns(run):
            plot = plots.setdefault(key, Plot(f"plot-{len(plots)}", key, "", "number"))
            order = sum(each.run == number for each in plot.series)
            shown = " ".join(filter(None, (run.name if len(runs) > 1 else "", label))) or plot.title
            plot.series.append(Series(shown, number, order, table, column))
    return [plot for plot in plots.values() if plot.series]


def _columns(run: RunData) -> Iterator[tuple[str, str, str, str]]:
    """Yield table, column, plot and label of each number of a run that is shown."""
    for table, columns in run.tables.items():
        for column, values in columns.items():
            if column in PLACES or column in NOT_SHOWN:
                continue
            group, _, name = column.rpartition("/")
            if column in COLUMNS:
                yield table, column, *COLUMNS[column]
            elif group.startswith("patches/") and name in OF_PATCHES:
                stage = group.removeprefix("patches/")
                label = "bytes" if name == "bytes_per_patch" else name.replace("_", " ")
                yield table, column, OF_PATCHES[name], f"stage {stage} {label}"
            elif column.endswith(f"/{BITS_PER_BYTE}"):
                yield table, column, "loss", column.removesuffix(f"/{BITS_PER_BYTE}").replace("/", " ")
            elif is_loss(column):
                place, _, metric = column.rpartition("/")
                yield table, column, f"Loss in {metric.replace('_', ' ')}", place.replace("/", " ")
            elif any(value not in (0, None) for value in values):
                yield (
                    table,
                    column,
                    (group or column).replace("_", " ").capitalize(),
                    name.replace("_", " ") if group else "",
                )
