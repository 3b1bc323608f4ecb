"""HTML page of the patches of a text. It needs no network and no script."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate

from pretrain.evaluation.patches.figures import Agreement, StageFigures
from pretrain.evaluation.patches.segments import Segment

HUES = 4
"""Colors that patches take in turn: of the outermost stage, or of the last one if there are several."""

STYLE = """
:root { color-scheme: light dark; --line: #8a8a8a; --bar: #4477aa;
  --c00: #cfe3f7; --c01: #e6f1fc; --c10: #fbdcc0; --c11: #fdeee0;
  --c20: #d3ecc9; --c21: #e9f6e4; --c30: #e6d6f1; --c31: #f3ebf9; }
@media (prefers-color-scheme: dark) { :root { --line: #9a9a9a; --bar: #77aadd;
  --c00: #1e3f5c; --c01: #142b40; --c10: #5c3a1c; --c11: #402812;
  --c20: #254a1c; --c21: #193313; --c30: #47305a; --c31: #31213f; } }
body { max-width: 80rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; }
pre span { border-left: 1px solid var(--line); padding: 2px 0; print-color-adjust: exact; }
pre .s0 { border-left: 0; }
pre .s2 { border-left: 3px solid var(--line); }
pre .s3 { border-left: 3px double var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
td .bar { display: block; height: 0.7rem; background: var(--bar); }
td.wide { width: 16rem; }
"""


def patches_page(
    title: str,
    summary: str,
    remarks: Sequence[str],
    segments: Iterable[Segment],
    figures: Mapping[str, StageFigures],
) -> str:
    """Return the page of a text. Each patch names its bytes, its place and its bits under the pointer.

    Args:
        title: heading of the page.
        summary: sentence below it.
        remarks: further sentences, each a paragraph.
        segments: of the text that is shown.
        figures: of the whole text, by stage.
    """
    colors = "".join(
        f"pre .c{hue}{shade}{{background:var(--c{hue}{shade})}}" for hue in range(HUES) for shade in (0, 1)
    )
    body = "".join(_span(segment, *color) for segment, color in colored(segments, len(figures)))
    if len(figures) > 1:
        remarks = [*remarks, f"A color is a patch of stage {len(figures) - 1}; its shades are patches of stage 0."]
    tables = "".join(f'<div class="scroll">{each}</div>' for each in _tables(figures))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{colors}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p>{escape(summary)}. <a href="#figures">Figures</a></p>
{"".join(f"<p>{escape(remark)}</p>" for remark in remarks)}
<pre>{body}</pre>
<section id="figures">
{tables}
</section>
</main></body>
</html>
"""


def colored(segments: Iterable[Segment], stages: int) -> Iterable[tuple[Segment, tuple[int, int]]]:
    """Return segments with a color each: a hue below HUES, and a shade, 0 or 1.

    Neighbouring patches differ. The hue is that of the patch of the last stage, and the shade alternates within it.
    """
    segments = list(segments)
    hues = accumulate(segment.stages >= stages for segment in segments)
    shades = accumulate((segment.stages < stages for segment in segments), lambda shade, inner: (1 - shade) * inner)
    return zip(segments, ((hue % HUES, int(shade)) for hue, shade in zip(hues, shades, strict=True)), strict=True)


def _span(segment: Segment, hue: int, shade: int) -> str:
    bits = "" if segment.bits is None else f", {segment.bits:.2f} bits each"
    bytes_ = f"{segment.size} bytes" if segment.size != 1 else "1 byte"
    return (
        f'<span class="c{hue}{shade} s{min(segment.stages, 3)}" '
        f'title="byte {segment.first:,}: {bytes_}{bits}">{escape(segment.text)}</span>'
    )


def _tables(figures: Mapping[str, StageFigures]) -> Iterable[str]:
    """Yield the tables: patches by stage, agreement of each stage, sizes of each stage."""
    headings, rows = stage_rows(figures)
    yield _table("Patches", headings, rows)
    for stage, own in figures.items():
        named = f", stage {stage}" if len(figures) > 1 else ""
        yield _table(f"Agreement of starts with places of the text{named}", *agreement_rows(own))
        most = max(own.sizes.values())
        body = "".join(
            f"<tr><td>{name}</td><td>{own.sizes[name]:,}</td><td>{own.sizes[name] / own.patches:.1%}</td>"
            f'<td class="wide"><span class="bar" style="width:{own.sizes[name] / most:.1%}"></span></td></tr>'
            for name in classes_of([own])
        )
        heads = "<tr><th>bytes</th><th>patches</th><th>share</th><th></th></tr>"
        yield f"<table><caption>Sizes of patches{named}</caption><thead>{heads}</thead><tbody>{body}</tbody></table>"


def stage_rows(figures: Mapping[str, StageFigures]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table of stages, without columns that no stage has."""
    rows = [
        {
            "stage": stage,
            "patches": f"{own.patches:,}",
            "bytes each": f"{own.bytes_per_patch:.2f}",
            "deviation": f"{own.deviation:.2f}",
            "median": f"{own.median:g}",
            "longest": f"{own.longest:,}",
            "enrichment": "" if own.enrichment is None else f"{own.enrichment:.2f}",
            "windows over capacity": "" if own.full_windows is None else f"{own.full_windows:.1%}",
        }
        for stage, own in figures.items()
    ]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return names, [[row[name] for name in names] for row in rows]


def agreement_rows(figures: StageFigures) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table of agreement of a stage."""
    headings = ["starts at", "precision", "by chance", "recall", "recall by chance"]
    rows = []
    for kind, exact in figures.exact.items():
        if exact.chance_of_precision == 1:  # every byte is a character
            continue
        rows.append([kind, *_shares(exact)])
        rows.append([f"{kind}, within a byte", *_shares(figures.near[kind])])
    return headings, rows


def classes_of(figures: Iterable[StageFigures]) -> list[str]:
    """Return the classes of size, without the last ones in which no stage has a patch."""
    by_class = list(zip(*(each.sizes.items() for each in figures), strict=True))
    while by_class and not any(count for _, count in by_class[-1]):
        by_class.pop()
    return [own[0][0] for own in by_class]


def _shares(agreement: Agreement) -> list[str]:
    shares = (
        agreement.precision,
        agreement.chance_of_precision,
        agreement.recall,
        agreement.chance_of_recall,
    )
    return ["" if math.isnan(share) else f"{share:.1%}" for share in shares]


def _table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
