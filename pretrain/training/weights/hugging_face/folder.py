"""Export for transformers: an export of Byteloom that is also a repository of the Hub.

    model*.safetensors, card.json          as in every export
    config.json, generation_config.json    what transformers reads
    configuration_, modeling_, tokenization_byteloom.py, tokenizer_config.json
    model.py, layers.py                    forward pass in plain torch, which modeling_byteloom.py calls
    README.md                              model card in the Hub's format

It needs no Byteloom where it is loaded. `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`

Heads of multi-byte prediction are left out, because transformers does not speculate with them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.checkpoint import Metadata
from pretrain.evaluation.beginning import Beginning
from pretrain.models import build_model, family, model_config
from pretrain.models.references import files_of
from pretrain.objectives import Visibility
from pretrain.training.weights.exports import export, without_further_heads
from pretrain.training.weights.finding import trained_objective, trained_separators
from pretrain.training.weights.foreign.source import ForeignFileError
from pretrain.training.weights.frozen_models import frozen_model
from pretrain.training.weights.hugging_face.model_card import model_card
from pretrain.training.weights.results import Result

CODE = Path(__file__).parent / "code"
ONE_REFERENCE = "from pretrain.models.references.transformer import Model"
"""Import of modeling_byteloom.py, in place of which an export imports its own model.py."""
SEPARATOR_TOKEN, PADDING_TOKEN = "<|separator|>", "<|padding|>"


def export_for_transformers(
    checkpoint: Metadata, out: Path, losses: dict[str, float], results: Sequence[Result]
) -> dict[str, Any]:
    """Write a verified checkpoint's weights to a new folder that transformers loads, all or nothing; return the card.

    Args:
        checkpoint: verified: of a run, or an export.
        out: the new folder.
        losses: of the run after the checkpoint's step, by the scored corpus.
        results: measured results for the model card.

    Raises:
        ForeignFileError: the model is no causal language model, it runs another model, or its family has no forward
            pass in plain torch.
        FileExistsError: the folder exists already.
        OSError: it cannot be written.
    """
    checkpoint = without_further_heads(checkpoint)
    config = model_config(checkpoint.state["config"]["model"])
    objective = trained_objective(checkpoint)
    if Visibility.causal not in objective.entry.visibilities:
        raise ForeignFileError(
            f"hf is for causal language models, and {checkpoint.folder} is a {config.family} of objective.name "
            f"{objective.name}; `byteloom checkpoint export` writes its weights"
        )
    if frozen_model(config) is not None:
        raise ForeignFileError(
            f"the patches of {checkpoint.folder} are made by another model, which a folder for transformers has no "
            "place for; `byteloom checkpoint export` writes both"
        )
    reference = family(config.family).reference
    if reference is None:
        raise ForeignFileError(f"the family {config.family} has no forward pass in plain torch, which exports carry")

    def files(card: dict[str, Any]) -> dict[str, str]:
        return {
            **files_of(reference, in_package=True),
            **{path.name: _code(path) for path in CODE.glob("*_byteloom.py")},
            **{name: json.dumps(content, indent=2) for name, content in _json_files(checkpoint).items()},
            "README.md": model_card(card, results, out.name),
        }

    return export(checkpoint, out, losses, files)


def _code(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace(ONE_REFERENCE, "from .model import Model")


def _json_files(checkpoint: Metadata) -> dict[str, dict[str, Any]]:
    """Return the content of the files that transformers reads, by their names."""
    config = model_config(checkpoint.state["config"]["model"])
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in build_model(config).named_parameters()}
    section = config.model_dump(mode="json")
    follows = Beginning.auto.resolved(checkpoint.state["config"]["data"]) is Beginning.separator
    ids = {"bos_token_id": SEPARATOR if follows else None, "eos_token_id": SEPARATOR, "pad_token_id": PADDING}
    never = [PADDING] if trained_separators(checkpoint) else [SEPARATOR, PADDING]
    length = section["sequence_length"]
    return {
        "config.json": {
            "architectures": ["ByteloomForCausalLM"],
            "model_type": "byteloom",
            "auto_map": {
                "AutoConfig": "configuration_byteloom.ByteloomConfig",
                "AutoModelForCausalLM": "modeling_byteloom.ByteloomForCausalLM",
            },
            "vocab_size": VOCABULARY,
            "max_position_embeddings": length,
            **ids,
            "tie_word_embeddings": False,
            "use_cache": False,
            "dtype": "float32",
            "byteloom": section,
            "parameter_shapes": shapes,
        },
        "generation_config.json": {**ids, "use_cache": False, "do_sample": True, "suppress_tokens": never},
        "tokenizer_config.json": {
            "tokenizer_class": "ByteloomTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_byteloom.ByteloomTokenizer", None]},
            "bos_token": SEPARATOR_TOKEN if follows else None,
            "eos_token": SEPARATOR_TOKEN,
            "pad_token": PADDING_TOKEN,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": length,
        },
    }
