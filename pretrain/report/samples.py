"""The samples of runs as a section of the page: text, hexadecimal, pictures and sounds."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pretrain.report.run_data import RunData
from pretrain.tracking.samples import MEDIA_TYPES, Sample, SampleSet, as_text

MEDIA_BYTES = 8_000_000
"""Most bytes of pictures and sounds in a page. Newer ones come first."""


def samples_section(runs: Sequence[RunData]) -> str:
    """Return the section: the samples of each run by step, newest first; nothing if there are none."""
    parts, left = list[str](), MEDIA_BYTES
    for run in runs:
        for number, (folder, found) in enumerate(run.samples):
            shown, left = _step(folder, found, left)
            title = f"{escape(run.name)}, step {found.step:,}"
            parts.append(f"<details{' open' * (number == 0)}><summary>{title}</summary>{shown}</details>")
    return "".join(parts)


def _step(folder: Path, found: SampleSet, media_bytes: int) -> tuple[str, int]:
    """Return the samples of a step as HTML, and the bytes of media that are left."""
    parts = [f'<p class="faint">Temperature {found.temperature:g}. The prompt is underlined.</p>']
    for sample in found.samples:
        media, used = _media(folder, sample, found.step, media_bytes)
        media_bytes -= used
        parts.append(
            f"<h3>{escape(sample.source)}</h3>{media}"
            f'<pre class="sample"><u>{escape(as_text(sample.prompt))}</u>{escape(as_text(sample.continuation))}</pre>'
        )
    return "".join(parts), media_bytes


def _media(folder: Path, sample: Sample, step: int, most: int) -> tuple[str, int]:
    """Return the element of a picture or a sound, and its bytes; nothing if there is none, or it is too large."""
    if sample.file is None:
        return "", 0
    content = (folder / sample.file).read_bytes()
    if len(content) > most:
        return f"<p>{escape(str(folder / sample.file))} is too large for this page.</p>", 0
    kind = MEDIA_TYPES[Path(sample.file).suffix]
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    label = escape(f"Sample of step {step}, {sample.source}", quote=True)
    if kind.startswith("image"):
        return f'<img class="sample" src="{source}" alt="{label}">', len(content)
    return f'<audio controls src="{source}" aria-label="{label}"></audio>', len(content)
