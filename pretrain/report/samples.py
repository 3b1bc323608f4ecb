"""The samples of runs as a section of the page: text, hexadecimal, pictures and sounds."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pretrain.report.run_data import RunData
from pretrain.tracking.samples import MEDIA_TYPES, Sample, SampleSet, as_text, is_text

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
    parts = [_faint(f"Temperature {found.temperature:g}. The prompt is underlined.")]
    for sample in found.samples:
        media, used = _media(folder, sample, found.step, media_bytes)
        media_bytes -= used
        content = f'<pre class="sample">{_part("u", sample.prompt)}{_part("span", sample.continuation)}</pre>'
        body = f"{media}<details><summary>Bytes</summary>{content}</details>" if media else content
        parts.append(f"<h3>{escape(sample.source)}</h3>{body}")
    return "".join(parts), media_bytes


def _part(tag: str, content: bytes) -> str:
    """Return an element with bytes; hexadecimal has lines of its own."""
    kind = "" if is_text(content) else ' class="hex"'
    return f"<{tag}{kind}>{escape(as_text(content))}</{tag}>"


def _media(folder: Path, sample: Sample, step: int, most: int) -> tuple[str, int]:
    """Return a picture or a sound as HTML, and its bytes; only a sentence if it is too large or cannot be read."""
    if sample.file is None:
        return "", 0
    try:
        content = (folder / sample.file).read_bytes()
    except OSError as error:  # a start that repeats the step has removed it, or a copy of the run lacks it
        return f"<p>{escape(f'{folder / sample.file} cannot be read: {error.strerror}')}.</p>", 0
    if len(content) > most:
        return f"<p>{escape(str(folder / sample.file))} is too large for this page.</p>", 0
    kind = MEDIA_TYPES[Path(sample.file).suffix]
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    label = escape(f"Sample of step {step}, {sample.source}", quote=True)
    if kind.startswith("image"):
        given, written = len(sample.prompt), len(sample.continuation)
        caption = f"{given:,} bytes of the prompt, then {written:,} of the continuation. Missing pixels are black."
        return f'<img class="sample" src="{source}" alt="{label}">{_faint(caption)}', len(content)
    sound = f'<audio controls src="{source}" aria-label="{label}"></audio>'
    return sound + _faint("The sound is the continuation, without the prompt."), len(content)


def _faint(sentence: str) -> str:
    return f'<p class="faint">{sentence}</p>'
