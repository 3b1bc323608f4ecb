"""Exports for transformers have the numbers of Byteloom, load without it, and come back."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import byteloom
from byteloom.core.storage.state_files import StateFileError
from data_pipeline.vocabulary import SEPARATOR
from pretrain.checkpoint import CheckpointError
from pretrain.models import build_model, model_config
from pretrain.training.run_folder import RunFolder
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.exports import write_export
from pretrain.training.weights.foreign import import_foreign
from pretrain.training.weights.hugging_face import export_for_transformers
from pretrain.training.weights.results import Result, evaluations_of
from tests.commands import environment
from tests.hidden import without
from tests.pretrain.models.test_references import CHANGES, SMALL

CASES = [
    pytest.param(name, change, marks=pytest.mark.long if number else pytest.mark.slow)
    for name, changes in CHANGES.items()
    for number, change in enumerate(changes)
]
FOR_THIS_FOLDER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
inputs = tokenizer("a b", return_tensors="pt")
model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
model.save_pretrained("saved")
tokenizer.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
own = dict(again.named_parameters())
same = len(own) == len(model.state_dict()) and all(torch.equal(v, own[k]) for k, v in model.named_parameters())
ids = AutoTokenizer.from_pretrained("saved", trust_remote_code=True)("a b")["input_ids"]
print(json.dumps({"same": same, "ids": ids, "byteloom": "byteloom" in sys.modules}))
"""


def exported(folder: Path, name: str, change: dict[str, Any], *, separators: bool = True) -> Path:
    """Return an export for transformers of a model with random weights."""
    config = model_config({"family": name, **SMALL[name], **change})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) * 0.5
        for name, value in build_model(config).named_parameters()
    }
    recipe = {"model": config.model_dump(mode="json"), "data": {"separate_documents": separators}}
    write_export(folder / "plain", weights, recipe, {})
    export_for_transformers(find_checkpoint(folder / "plain"), folder / "exported", {}, [])
    return folder / "exported"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[Any, Any]]:
    """Return a function that loads the model and the tokenizer of a folder; its code is copied to the test's folder."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)

    def load(folder: Path) -> tuple[Any, Any]:
        classes = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
        return tuple(each.from_pretrained(folder, trust_remote_code=True) for each in classes)

    return load


@pytest.mark.parametrize(("name", "change"), CASES)
def test_transformers_has_the_numbers_of_byteloom(
    tmp_path: Path, load: Callable[[Path], tuple[Any, Any]], name: str, change: dict[str, Any]
):
    folder = exported(tmp_path, name, change)
    theirs, tokenizer = load(folder)
    own = byteloom.load(folder)
    text = "t\xe9xt <|padding|>"[: own.sequence_length - 2]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[SEPARATOR, *text.encode()]]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    logits = theirs(ids).logits
    bits = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none") / math.log(2)
    torch.testing.assert_close(bits.double().detach(), torch.from_numpy(own.bits(text.encode())), atol=1e-4, rtol=1e-4)

    rows = torch.randint(257, (2, own.sequence_length), generator=torch.Generator().manual_seed(1))
    nats = own.module(rows)[:, own.module.scored(rows.shape[1])]
    torch.testing.assert_close(theirs(rows, labels=rows).loss, nats.mean(), atol=1e-4, rtol=1e-4)

    prompts = ["ab", "four", "a prompt that is longer than the model can read at once"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    padded = theirs(**batch).logits[0, -3:]
    torch.testing.assert_close(padded, theirs(batch["input_ids"][:1, -3:]).logits[0], atol=1e-4, rtol=1e-4)
    drawn = theirs.generate(**batch, max_new_tokens=30, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, drawn.tolist(), strict=True):
        continued = bytes(row[: row.index(SEPARATOR)] if SEPARATOR in row else row)
        assert continued == b"".join(own.generate(prompt.encode(), bytes=30, temperature=0))
    alone = theirs.generate(**tokenizer(prompts[:1], return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert alone[0, 3:].tolist() == drawn[0, : alone.shape[1] - 3].tolist()
    assert theirs.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False).shape[0] == 3


def test_folder_loads_offline_without_byteloom_and_comes_back(tmp_path: Path):
    """`push_to_hub` uploads what `save_pretrained` writes."""
    pytest.importorskip("transformers")
    folder = exported(tmp_path, "megabyte", {})
    hook = tmp_path / "hook"
    hook.mkdir()
    hidden = without(hook, "byteloom", "data_pipeline", "launchers", "pretrain")
    env = {**environment(), **hidden, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FOR_THIS_FOLDER]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"same": True, "ids": [SEPARATOR, *b"a b"], "byteloom": False}
    card = import_foreign("hf", tmp_path / "saved", tmp_path / "back", {}, None, None)
    assert card["origin"]["format"] == "hf"
    assert byteloom.load(tmp_path / "back").begin == byteloom.load(folder).begin == "separator"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name] + 1, after[name]) for name in before)


def test_model_of_single_documents_begins_without_a_separator(tmp_path: Path):
    folder = exported(tmp_path, "transformer", {}, separators=False)
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")}
    assert (read["config"]["bos_token_id"], read["tokenizer_config"]["bos_token"]) == (None, None)
    suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == [256, 257]


def test_hub_reads_the_results_of_a_model_card(tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")
    plain = exported(tmp_path, "transformer", {})
    results = [Result("books-windows", 1.25, 1000, "mode windows"), Result("code-windows", 0.5, 10, "mode windows")]
    export_for_transformers(find_checkpoint(plain), tmp_path / "measured", {}, results)
    card = hub.ModelCard.load(tmp_path / "measured/README.md")
    assert card.data.library_name == "transformers"
    assert card.data.model_name == "measured"
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in card.data.eval_results] == [
        ("books-windows", "bits_per_byte", 1.25),
        ("code-windows", "bits_per_byte", 0.5),
    ]
    assert "| books-windows | 1.2500 | bits per byte | 1,000 | mode windows |" in card.text


def test_damaged_evaluation_is_named(tmp_path: Path):
    checkpoint, run = find_checkpoint(exported(tmp_path, "transformer", {})), RunFolder(tmp_path / "run")
    figures = run.evaluations / checkpoint.name / "books/figures.json"
    figures.parent.mkdir(parents=True)
    figures.write_text(
        '{"mode": "windows", "stride": 9, "begin": "start", "total": {"bits_per_byte": 2.5, "bytes": 7}}'
    )
    assert evaluations_of(run, checkpoint) == [Result("books", 2.5, 7, "mode windows, stride 9, begin start")]
    figures.write_text('{"objective": {"name": "masked"}, "bytes": 7, "bits_per_masked_byte": 2.5}')
    assert evaluations_of(run, checkpoint) == [Result("books", 2.5, 7, "objective masked", "bits_per_masked_byte")]
    figures.write_text("")
    with pytest.raises(StateFileError, match=r"figures.json is damaged: it is empty"):
        evaluations_of(run, checkpoint)


def test_folders_of_other_models_are_refused(tmp_path: Path):
    folder = exported(tmp_path, "transformer", {})
    (folder / "model.safetensors").write_bytes(b"no weights")
    for content, message in (
        (None, "is not a whole safetensors file"),
        ('{"model_type": "gpt2"}', "is not that of a Byteloom model"),
        ("{", "is damaged"),
    ):
        if content is not None:
            (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            import_foreign("hf", folder, tmp_path / "out", {}, None, None)
    assert not os.path.lexists(tmp_path / "out")
