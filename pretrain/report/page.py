"""The page of a report: HTML with the numbers, uPlot and its own style and script inside.

Every plot has a table of its numbers, for screen readers and for readers without JavaScript.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from byteloom.core.faults import hide_queries
from byteloom.core.text import count, printable
from pretrain.report.events import Event
from pretrain.report.numbers import NumberTable, at_time, sampled
from pretrain.report.plots import Plot, plots_of
from pretrain.report.run_data import RunData, StoredEvaluation
from pretrain.report.samples import samples_section
from pretrain.terminal.losses import is_loss, unit_of
from pretrain.terminal.patches import overflow_remarks
from pretrain.terminal.progress import duration, size
from pretrain.tracking.mlflow.store import shown

TABLE_ROWS = 25
"""Most rows of each run in the table behind a plot."""
COURSE_LENGTH = 200
"""Longest sentence about a plot that is shown; a screen reader reads a longer one too."""
CURVE_POINTS = 500
"""Most points of a curve by position."""
AXES = (("bytes", "bytes"), ("step", "steps"), ("seconds", "time"))
"""Value and label of each choice of the horizontal axis."""
FLOPS_AXIS = ("flops", "FLOPs")
"""The same, of a page that compares recipes."""


@dataclass(frozen=True)
class Comparison:
    """Table of the recipes that runs are of."""

    title: str
    remark: str
    """Sentence above the table."""
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    """One a recipe; the first cell is its name."""
    groups: Mapping[str, int]
    """Number of the recipe of each run, by the run's name. Runs of one recipe have one colour."""
    flops_per_byte: Mapping[str, float]
    """FLOPs of training for each byte, by the run's name."""


def page_of(runs: Sequence[RunData], now: float, comparison: Comparison | None = None) -> str:
    """Return the page of runs.

    Args:
        runs: one or more.
        now: time of the report, in seconds since 1970.
        comparison: the recipes that the runs are of.
    """
    title = f"Byteloom: {comparison.title if comparison else ', '.join(run.name for run in runs)}"
    plots = plots_of(runs)
    sections = {
        "Comparison": _comparison(comparison),
        "Summary": _summary(runs),
        "Training": _training(runs, plots, AXES if comparison is None else (*AXES, FLOPS_AXIS)),
        "Events": _events(runs),
        "Recipe": _recipe(runs),
        "Corpora": _corpora(runs),
        "Evaluations": _evaluations(runs),
        "Samples": samples_section(runs),
        "Problems": _problems(runs),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in sections)
    bodies = "\n".join(
        f'<section id="{name.lower()}" aria-labelledby="h-{name.lower()}"><h2 id="h-{name.lower()}">{name}</h2>\n{body}'
        "</section>"
        for name, body in sections.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_asset("uplot.css")}
{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#{next(iter(sections)).lower()}">Skip to the {next(iter(sections)).lower()}</a>
<header>
<h1>{_text(title)}</h1>
<p class="faint">Made on {_moment(now)}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<noscript><p>The plots need JavaScript. The tables below each plot have the numbers.</p></noscript>
</header>
<main>
{bodies}
</main>
<footer><p>Plots by uPlot, whose licence follows.</p><details><summary>Licence of uPlot</summary>
<pre>{_text(_asset("uplot.LICENSE"))}</pre></details></footer>
<script type="application/json" id="data">{_json(_data(runs, plots, comparison))}</script>
<script>{_asset("uplot.js")}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _data(runs: Sequence[RunData], plots: Sequence[Plot], comparison: Comparison | None) -> dict[str, Any]:
    """Return the numbers of the page as page.js reads them."""
    groups = comparison.groups if comparison else {}
    costs = comparison.flops_per_byte if comparison else {}
    drawn: list[dict[str, Any]] = [plot.as_json() for plot in plots]
    if any(run.events for run in runs):
        drawn.append({"id": "events-plot"})
    for number, (_, evaluation) in enumerate(_stored(runs)):
        curves = evaluation.curves.items()
        drawn += [_curves(f"curve-{number}-{kind}", kind, points) for kind, points in curves if points]
    return {
        "runs": [
            {
                "name": run.name,
                "group": groups.get(run.name, number),
                "tables": {name: _with_flops(table, costs.get(run.name)) for name, table in run.tables.items()},
                "events": [
                    {"kind": each.kind, "reason": _shown(each.reason), **_place(run, each, costs.get(run.name))}
                    for each in run.events
                ],
            }
            for number, run in enumerate(runs)
        ],
        "plots": drawn,
    }


def _curves(identity: str, kind: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    places, values = zip(*sampled(points, CURVE_POINTS), strict=True)
    series = {"label": "bits per byte", "x": places, "y": values}
    return {
        "id": identity,
        "unit": "bits per byte",
        "format": "bits",
        "place": f"position in the {kind}",
        "series": [series],
    }


def _with_flops(table: NumberTable, cost: float | None) -> NumberTable:
    """Return a table with the FLOPs trained; as it is if the FLOPs of a byte are not given."""
    return table if cost is None else {**table, "flops": [cost * (trained or 0) for trained in table["bytes"]]}


def _place(run: RunData, event: Event, cost: float | None = None) -> dict[str, float]:
    """Return where an event lies on each axis."""
    train = run.tables.get("train", {"step": [], "bytes": [], "seconds": []})
    place = at_time(train, round(event.time - run.began, 3))
    return place if cost is None else {**place, "flops": cost * place["bytes"]}


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    numbers = range(1, len(comparison.headings))
    table = _table(comparison.headings, comparison.rows, caption="Recipes, lowest loss first", numbers=numbers)
    return f"<p>{_text(comparison.remark)}</p>{_scrolling(table)}"


def _summary(runs: Sequence[RunData]) -> str:
    """Return the table of facts, a column for each run."""
    facts: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for name, value in _facts(run).items():
            facts.setdefault(name, [""] * len(runs))[number] = value
    rows = [[name, *values] for name, values in facts.items() if any(values)]
    table = _table(["fact", *(run.name for run in runs)], rows, caption="Facts of each run", headed=True)
    return _scrolling(table)


def _facts(run: RunData) -> dict[str, str]:
    status, train, config = run.status, run.tables.get("train", {}), run.flat_config
    trained = train.get("bytes") or []
    is_done = status.step == status.steps  # the last report of a run is made before its process ends
    mean_speed = _mean(train.get("bytes_per_second", []))
    mfu = _mean(train.get("mfu", []))
    return {
        "state": "finished" if is_done else " ".join(filter(None, (status.state, status.reason))),
        "last reason": status.why,
        "step": f"{status.step:,}" + (f" of {status.steps:,}" if status.steps else ""),
        "bytes trained": size(trained[-1] or 0) if trained else "",
        "training loss": _bits(status.loss, status.metric),
        "validation loss": _bits(status.validation_loss, status.metric),
        "model": config.get("model.family", ""),
        "parameters": f"{run.parameters:,}" if run.parameters is not None else "",
        "sequence length": f"{config['model.sequence_length']:,} bytes" if "model.sequence_length" in config else "",
        "global batch": count(config["train.global_batch"], "sequence") if "train.global_batch" in config else "",
        "bytes per patch": ", ".join(f"{own['bytes_per_patch']:.2f}" for own in status.patches.values()),
        "mean speed": f"{size(mean_speed)}/s" if mean_speed is not None else "",
        "mean MFU": f"{100 * mfu:.1f} %" if mfu is not None else "",
        "began": _moment(run.began) if run.began else "",
        "time since then": duration(train["seconds"][-1] or 0) if trained else "",
        "starts": f"{status.starts} and {count(status.restarts, 'restart')}" if status.starts else "",
        "newest checkpoint": f"step {status.checkpoint_step:,}" if status.checkpoint_step is not None else "",
        "recipe": status.recipe or "",
        "continues": "; ".join(f"{each['name']} at step {each['step']}" for each in status.ancestry),
        "folder": status.run,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _training(runs: Sequence[RunData], plots: Sequence[Plot], axes: Sequence[tuple[str, str]]) -> str:
    if not plots:
        return "<p>No step is done yet.</p>"
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{value}"{" checked" * (value == "bytes")}> {label}</label>'
        for value, label in axes
    )
    controls = (
        f'<div class="controls"><fieldset><legend>Horizontal axis</legend>{choices}</fieldset>'
        '<button type="button" id="reset">Show all</button></div>'
        '<p class="faint"><span class="pointer">Drag in a plot to zoom all of them; a double click shows all. </span>'
        "A dashed line is a stop, a later start or a fault. A point of a long run is the mean of neighbouring steps."
        "</p>"
    )
    figures = "\n".join(_figure(runs, plot, is_wide=plot.id == "plot-loss") for plot in plots)
    return f'{controls}<div class="plots">{figures}</div>'


def _figure(runs: Sequence[RunData], plot: Plot, *, is_wide: bool) -> str:
    return _plot(plot.id, plot.title, _course(runs, plot), _numbers(runs, plot), is_wide=is_wide)


def _plot(identity: str, title: str, course: str, table: str, *, is_wide: bool = False, status: str = "") -> str:
    """Return the element of a plot: its title, a sentence, the place of the canvas, and the table of its numbers."""
    return (
        f'<figure id="{identity}" class="{"wide" if is_wide else ""}"><figcaption><h3>{_text(title)}</h3>'
        f"{f'<p>{_text(course)}</p>' if len(course) <= COURSE_LENGTH else ''}</figcaption>"
        f'<div class="canvas" role="img" aria-label="{_text(f"{title}. {course}")}"></div>{status}'
        f'<details><summary>Numbers of this plot</summary><div class="scroll">{table}</div></details></figure>'
    )


def _course(runs: Sequence[RunData], plot: Plot) -> str:
    """Return the first and the last value of each series, as a sentence."""
    parts = []
    for each in plot.series:
        values = [value for value in runs[each.run].tables[each.table][each.column] if value is not None]
        if values:
            first, last = _value(values[0], plot.format), _value(values[-1], plot.format)
            parts.append(f"{each.label}: {first}" if len(values) == 1 else f"{each.label}: from {first} to {last}")
    return "; ".join(parts) + "."


def _numbers(runs: Sequence[RunData], plot: Plot) -> str:
    """Return the table behind a plot. Series of one table of a run share its rows."""
    tables: dict[tuple[int, str], list[Any]] = {}
    for each in plot.series:
        tables.setdefault((each.run, each.table), []).append(each)
    parts = []
    for (number, name), own in tables.items():
        table = runs[number].tables[name]
        rows = [
            [
                f"{table['step'][row]:,}",
                size(table["bytes"][row] or 0),
                duration(table["seconds"][row] or 0),
                *(_value(table[each.column][row], plot.format) for each in own),
            ]
            for row in sampled(range(len(table["step"])), TABLE_ROWS)
        ]
        headings = ["step", "bytes", "time", *(each.label for each in own)]
        parts.append(_table(headings, rows, caption=f"{runs[number].name}: {plot.title}", numbers=range(len(headings))))
    return "".join(parts)


def _events(runs: Sequence[RunData]) -> str:
    if not any(run.events for run in runs):
        return ""
    rows = []
    for run in runs:
        for each in run.events:
            place = _place(run, each)
            rows.append((each.time, [run.name, _moment(each.time), f"{place['step']:,}", each.kind, each.reason]))
    cells = [row for _, row in sorted(rows, key=lambda row: row[0])]
    table = _table(["run", "time", "step", "event", "reason"], cells, caption="Events, oldest first", numbers=(2,))
    counts: dict[str, int] = {}
    for run in runs:
        for each in run.events:
            counts[each.kind] = counts.get(each.kind, 0) + 1
    course = ", ".join(f"{number} {kind}" for kind, number in counts.items()) + "."
    status = '<p class="status faint" role="status">Point at an event to read its reason.</p>'
    return _plot("events-plot", "Events of the runs", course, table, is_wide=True, status=status)


def _recipe(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        names = dict.fromkeys(name for run in runs for name in run.flat_config)
        rows = [[name, *(_field(run, name) for run in runs)] for name in names]
        different = [row for row in rows if len(set(row[1:])) > 1]
        headings = ["field", *(run.name for run in runs)]
        parts.append(_scrolling(_table(headings, different, caption="Fields that differ", headed=True)))
    for run in runs:
        for ancestor in run.status.ancestry:
            rows = [[change] for change in ancestor["changes"]]
            parts.append(_scrolling(_table([f"{run.name} differs from {ancestor['name']}"], rows)))
        if run.config_text:
            parts.append(
                f"<details><summary>Recipe of {_text(run.name)}</summary><pre>{_text(run.config_text)}</pre></details>"
            )
    return "".join(parts)


def _corpora(runs: Sequence[RunData]) -> str:
    headings = ["run", "source", "corpus", "documents", "bytes", "stored", "ratio", "modalities", "coverage"]
    rows = [
        [
            run.name,
            each.source,
            each.location,
            f"{each.documents:,}" if each.documents is not None else "not readable from here",
            size(each.raw_bytes) if each.raw_bytes is not None else "",
            size(each.stored_bytes) if each.stored_bytes is not None else "",
            f"{each.raw_bytes / each.stored_bytes:.2f}" if each.raw_bytes and each.stored_bytes else "",
            each.modalities,
            each.coverage,
        ]
        for run in runs
        for each in run.corpora
    ]
    return _scrolling(_table(headings, rows, caption="Corpora", numbers=range(3, 7)), is_broad=True) if rows else ""


def _stored(runs: Sequence[RunData]) -> list[tuple[RunData, StoredEvaluation]]:
    return [(run, evaluation) for run in runs for evaluation in run.evaluations]


def _evaluations(runs: Sequence[RunData]) -> str:
    parts = []
    for number, (run, evaluation) in enumerate(_stored(runs)):
        figures = evaluation.figures
        if "objective" in figures:
            parts.append(_loss(run, evaluation))
            continue
        groups = {**dict(sorted(figures["groups"].items())), "all": figures["total"]}
        rows = [
            [name, _value(score["bits_per_byte"], "bits"), f"{score['bytes']:,}", f"{score['documents']:,}"]
            for name, score in groups.items()
        ]
        title = f"{run.name}, {evaluation.name}"
        how = (
            f"Mode {figures['mode']}, windows of {figures['sequence_length']:,} bytes, stride {figures['stride']:,}, "
            f"beginning of documents: {figures['begin']}."
        )
        headings = ["documents of", "bits per byte", "bytes", "documents"]
        parts.append(f"<h3>{_text(title)}</h3><p class='faint'>{_text(how)}</p>")
        parts.append(_scrolling(_table(headings, rows, caption=f"Evaluation {title}", numbers=(1, 2, 3))))
        curves = "".join(
            _plot(
                f"curve-{number}-{kind}",
                f"Bits per byte by position in the {kind}",
                f"From {points[0][1]:.4f} at position 0 to {points[-1][1]:.4f} at position {points[-1][0]:,.0f}.",
                _table(
                    ["position", "bits per byte"],
                    [[f"{place:,.0f}", f"{value:.4f}"] for place, value in sampled(points, TABLE_ROWS)],
                    caption=f"{title} by position",
                    numbers=(0, 1),
                ),
            )
            for kind, points in evaluation.curves.items()
            if points
        )
        parts.append(f'<div class="plots">{curves}</div>')
    return "".join(parts)


def _loss(run: RunData, evaluation: StoredEvaluation) -> str:
    """Return the part about the loss of an objective that is not causal."""
    figures, title = evaluation.figures, f"{run.name}, {evaluation.name}"
    metric = next(name for name in figures if is_loss(name))
    how = f"Objective {figures['objective']['name']}, rows of {figures['sequence_length']:,} ids."
    row = [_value(figures[metric], "bits"), f"{figures['bytes']:,}", f"{figures['documents']:,}"]
    headings = [unit_of(metric), "scored bytes", "documents"]
    table = _scrolling(_table(headings, [row], caption=f"Evaluation {title}", numbers=(0, 1, 2)))
    return f"<h3>{_text(title)}</h3><p class='faint'>{_text(how)}</p>{table}"


def _problems(runs: Sequence[RunData]) -> str:
    lines = [f"{run.name}: {line}" for run in runs for line in (*overflow_remarks(run.status.patches), *run.problems)]
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Iterable[int] = (),
    headed: bool = False,
) -> str:
    """Return a table.

    Args:
        headings: of the columns.
        rows: cells.
        caption: what the table shows; empty for none.
        numbers: columns that are aligned at the right.
        headed: whether the first cell of a row is its heading.
    """
    kinds = ["number" if column in set(numbers) else "" for column in range(len(headings))]

    def cell(column: int, text: str) -> str:
        attributes = ' class="number"' if kinds[column] else ""
        if headed and column == 0:
            return f'<th scope="row"{attributes}>{_text(text)}</th>'
        return f"<td{attributes}>{_text(text)}</td>"

    head = "".join(
        f'<th scope="col"{" class=number" if kind else ""}>{_text(text)}</th>'
        for text, kind in zip(headings, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(cell(column, text) for column, text in enumerate(row))}</tr>" for row in rows)
    named = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scrolling(table: str, *, is_broad: bool = False) -> str:
    """Return a table that scrolls where it is wider than the page.

    Args:
        table: the table.
        is_broad: whether the last column holds sentences, and needs room.
    """
    return f'<div class="scroll{" broad" * is_broad}">{table}</div>'


def _value(value: float | None, kind: str) -> str:
    """Return a value in a format of page.js."""
    if value is None:
        return ""
    if kind == "bits":
        return f"{value:.4f}"
    if kind == "bytes":
        return size(value)
    if kind == "rate":
        return f"{size(value)}/s"
    return {"share": f"{100 * value:.3g} %", "seconds": f"{value:.3g} s"}.get(kind, f"{value:.4g}")


def _bits(value: float | None, metric: str) -> str:
    return "" if value is None else f"{value:.4f} {metric.replace('_', ' ')}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _field(run: RunData, name: str) -> str:
    """Return a config field of a run as JSON; nothing if its recipe has no such field."""
    return json.dumps(run.flat_config[name], ensure_ascii=False) if name in run.flat_config else ""


def _text(text: str) -> str:
    return escape(_shown(text))


def _shown(text: str) -> str:
    """Return a text without passwords and signatures in its URLs: a page is passed on."""
    return printable(shown(hide_queries(text)))


def _json(value: Mapping[str, Any]) -> str:
    """Return JSON that can be inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("pretrain.report").joinpath("assets", name).read_text(encoding="utf-8")
