"""Model card in the format of the Hugging Face Hub: YAML with measured results, then a page.

https://huggingface.co/docs/hub/model-cards
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pretrain.training.weights.results import Result


def model_card(card: Mapping[str, Any], results: Sequence[Result], name: str) -> str:
    """Return the content of README.md.

    Args:
        card: of the export.
        results: of `byteloom eval`. If there are none, the last values of the run's journal take their place.
        name: of the model.
    """
    journal = [Result(f"{part} (training journal)", value) for part, value in card.get("bits_per_byte", {}).items()]
    shown = list(results) or journal
    head = yaml.safe_dump(_metadata(card, shown, name), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{_page(card, shown, name)}"


def _metadata(card: Mapping[str, Any], results: Sequence[Result], name: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["byteloom", "byte-level", card["architecture"].replace("_", "-")],
    }
    if results:
        measured = [
            {
                "task": {"type": "text-generation", "name": "Byte modeling"},
                "dataset": {"name": result.dataset, "type": _slug(result.dataset)},
                "metrics": [
                    {"type": result.metric, "name": result.mode or _in_words(result.metric), "value": result.loss}
                ],
            }
            for result in results
        ]
        about["model-index"] = [{"name": name, "results": measured}]
    return about


def _in_words(metric: str) -> str:
    return metric.replace("_", " ")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _page(card: Mapping[str, Any], results: Sequence[Result], name: str) -> str:
    origin = [f"{card['parameters']:,} parameters, stored in {card['dtype']}."]
    if "step" in card:
        origin.append(f"Run `{card['run']}`, step {card['step']:,}, {card['sequences']:,} sequences read.")
        origin.append(f"Corpus fingerprint `{card['corpus']['fingerprint']}`.")
    elif "origin" in card:
        origin.append(f"Imported from `{card['origin']['file']}` ({card['origin']['format']}).")
    return PAGE.format(
        name=name,
        family=card["architecture"],
        origin="\n".join(origin),
        results=_table(results) or "No results were measured.",
        length=card["model"]["sequence_length"],
    )


def _table(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [
        f"| {each.dataset} | {each.loss:.4f} | {_in_words(each.metric)} "
        f"| {'' if each.bytes is None else f'{each.bytes:,}'} | {each.mode or ''} |"
        for each in results
    ]
    return "\n".join(["| data | loss | unit | bytes | scoring |", "| --- | --- | --- | --- | --- |", *rows])


PAGE = """\
# {name}

A byte model of the family `{family}`, trained with Byteloom. It reads and writes raw bytes, without a vocabulary:
ids 0 to 255 are bytes, 256 separates documents, 257 pads rows. It reads {length:,} ids at once.

{origin}

## Use with transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

The code in this folder runs the model in plain torch, without caches. It is meant for agreement, not for speed.

## Use with Byteloom

`byteloom generate`, `byteloom eval` and `byteloom.load` take this folder.

## Results

{results}

Bits per byte are the mean negative log-likelihood of the bytes. Results of different scoring are not comparable.
"""
