"""Rules by which patches start, in plain Python, that model.py uses."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.models.references.layers import PADDING, SEPARATOR

NEWLINE = 10


def is_word(byte: int) -> bool:
    """Return whether a byte is a digit, a letter or a continuation of UTF-8."""
    return 0x80 <= byte <= 0xBF or (byte < 0x80 and chr(byte).isalnum())


def starts_of(patcher: dict[str, Any], capacity: int, read: list[int], *, across_documents: bool = True) -> list[int]:
    """Return the positions at which patches start, given what each position of a row reads."""
    if patcher["name"] == "entropy":
        wanted = entropy_starts(patcher, entropies_of(patcher, read, across_documents), read)
    elif patcher["name"] == "fixed":
        wanted = [place % patcher["size"] == 0 for place in range(len(read))]
    else:
        wanted = [place > 0 and not is_word(id) and is_word(read[place - 1]) for place, id in enumerate(read)]
    starts = [place for place, id in enumerate(read) if (wanted[place] and id != PADDING) or id == SEPARATOR]
    return starts[:capacity]


def entropies_of(patcher: dict[str, Any], read: list[int], across_documents: bool) -> list[float]:
    """Return the entropy of the prediction at each position, in nats, by the model in another export."""
    folder = Path(__file__).parent / patcher["model"]  # or the place itself, if it is absolute
    spec = importlib.util.spec_from_file_location("entropy_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    spec.loader.exec_module(module)
    config, weights = module.load(folder)
    resets, is_stored = patcher.get("reset_at_newlines", False), patcher.get("entropies") == "corpus"
    has_contexts = resets or is_stored  # an entropy then depends on its line or document alone
    if (has_contexts or not across_documents) and "attention_across_documents" in config:
        config["attention_across_documents"] = False
    model = module.Model(config, weights)
    if has_contexts:
        begun = [SEPARATOR if resets and id == NEWLINE else id for id in read]
        logits: Tensor = model.logits(torch.tensor([[*begun, PADDING]]))[0, 1:]
    else:
        logits = model.logits(torch.tensor([[*read[1:], PADDING]]))[0]
    probabilities = logits.log_softmax(-1)
    entropies = -(probabilities.exp() * probabilities).sum(-1)
    return (entropies.half() if is_stored else entropies).tolist()


def entropy_starts(patcher: dict[str, Any], entropies: list[float], read: list[int]) -> list[bool]:
    """Return where the entropies meet the condition of a rule."""
    found, since, length = [], 0, 0
    for place, (id, entropy) in enumerate(zip(read, entropies, strict=True)):
        since = 0 if id == SEPARATOR else since + 1
        high = patcher["threshold"] is None or entropy > patcher["threshold"]
        risen = patcher["increase"] is None or entropy - entropies[max(place - 1, 0)] > patcher["increase"]
        if patcher["rule"] == "global":
            begins = high and since >= 1
        else:
            begins = since == 1 or (high and risen and since >= {"monotonic": 2, "combined": 3}[patcher["rule"]])
        length = 0 if begins or id == SEPARATOR else length + 1
        longest = patcher["max_patch_length"]
        found.append(begins or (longest is not None and length % longest == 0))
    return found
