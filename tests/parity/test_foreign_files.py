"""Foreign files that are damaged, of another kind, or do not fit are refused in one line, and run no code."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.foreign import export_foreign, import_foreign
from tests.commands import run_here
from tests.parity.test_parity import CASES, trained_like, write_file


def refusal(form: str, file: Path, *words: object) -> str:
    """Return the error of an import, which leaves no folder."""
    out = file.parent / "out"
    code, output = run_here("import", form, file, "--out", out, *words)
    assert code == 1
    assert not out.exists()
    *_, line = output.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def changed(file: Path, change: Callable[[Any], object]) -> Path:
    """Change the content of a foreign file."""
    if file.suffix == ".npz":
        with np.load(file) as stored:
            content: Any = dict(stored)
        change(content)
        np.savez(file, **content)
    else:
        content = torch.load(file)
        change(content)
        torch.save(content, file)
    return file


class Trap:
    """Object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        """Take the file to make."""
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a call that makes the file."""
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path: Path):
    trap = Trap(tmp_path / "sprung")
    torch.save({"model": trap}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(trap))
    np.savez(tmp_path / "params.npz", value=np.array([trap], dtype=object))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    for name in ("torch.pt", "plain.pt", "module.pt"):
        assert "torch.save(model.state_dict(), FILE)" in refusal("nanogpt", tmp_path / name)
        assert "torch.save(model.state_dict(), FILE)" in refusal("transformer-xl", tmp_path / name)
    assert "is no .npz file of arrays" in refusal("perceiver-ar", tmp_path / "params.npz")
    assert not trap.path.exists()


def test_refusal_of_another_file_does_not_suggest_to_run_its_code(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(bytes.fromhex("89504e470d0a1a0a0000000d49484452"))
    for form in ("nanogpt", "transformer-xl", "perceiver-ar"):
        message = refusal(form, tmp_path / "picture.png")
        assert "or it is damaged" in message
        assert "weights_only" not in message and "pickle" not in message


@pytest.mark.parametrize("name", ["nanogpt", "perceiver_ar"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no such file",
        lambda content: bytes(len(content)),
        lambda content: content[: len(content) // 2],
        lambda content: content[:-40],
    ],
)
def test_damaged_file_is_refused(name: str, damage: Callable[[bytes], bytes], tmp_path: Path):
    file = write_file(name, tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(CASES[name].form, file).startswith(f"{file} is no ")


def test_missing_file_and_existing_places_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        import_foreign("nanogpt", tmp_path / "none.pt", tmp_path / "out", {}, None, None)
    file = write_file("nanogpt", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        import_foreign("nanogpt", file, tmp_path / "out", {}, None, None)
    (tmp_path / "out").rmdir()
    import_foreign("nanogpt", file, tmp_path / "out", {}, None, None)
    with pytest.raises(FileExistsError):
        export_foreign("nanogpt", find_checkpoint(tmp_path / "out"), file)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (
            "nanogpt",
            lambda content: content["model"].pop("_orig_mod.transformer.h.1.ln_2.weight"),
            "has no transformer.h.1.ln_2.weight",
        ),
        (
            "nanogpt",
            lambda content: content["model"].update({"transformer.h.0.mlp.c_proj.weight": torch.zeros(8, 31)}),
            "transformer.h.0.mlp.c_proj.weight has shape [8, 31], not [8, 32]",
        ),
        (
            "nanogpt",
            lambda content: content["model"]["_orig_mod.transformer.wpe.weight"].fill_(torch.nan),
            "has 96 values that are NaN or infinite, in transformer.wpe.weight",
        ),
        (
            "nanogpt",
            lambda content: content["model"].update({"lora.weight": torch.zeros(2)}),
            "has tensors that no such model has: lora.weight",
        ),
        ("nanogpt", lambda content: content["model_args"].pop("n_head"), "does not say model.heads"),
        ("nanogpt", lambda content: content["model"].clear(), "has no transformer.wte.weight"),
        (
            "nanogpt",
            lambda content: content.update(symbols=[*range(257), "z"]),
            "a symbol is 'z', which is no id from 0 to 257",
        ),
        (
            "nanogpt",
            lambda content: content["model"].update({"_orig_mod.lm_head.weight": torch.zeros(258, 8)}),
            "lm_head.weight differs from the embedding; Byteloom ties them",
        ),
        (
            "perceiver_ar",
            lambda content: content.update(arguments='{"initial_query_offsetting": true}'),
            "initial_query_offsetting is True; Byteloom has models with False only",
        ),
        ("perceiver_ar", lambda content: content.update(arguments="[1]"), "arguments is no JSON object"),
        ("perceiver_ar", lambda content: content.update(arguments="{"), "is no .npz file of arrays"),
        (
            "perceiver_ar",
            lambda content: content.update({"perceiver_ar/~/logits/w": np.zeros((8, 259), np.int8)}),
            "perceiver_ar/~/logits/w is in int8; write it as float32",
        ),
        (
            "perceiver_ar",
            lambda content: content.pop("perceiver_ar/~/cross_attention_1/dense/linear/w"),
            "has no cross_attention_1/dense/linear/w",
        ),
    ],
)
def test_file_that_does_not_fit_is_refused(name: str, change: Callable[[Any], object], fault: str, tmp_path: Path):
    file = changed(write_file(name, tmp_path), change)
    message = refusal(CASES[name].form, file)
    assert message.startswith(str(file)) and fault in message


def test_file_of_another_format_is_refused(tmp_path: Path):
    assert "has no r_w_bias" in refusal("transformer-xl", write_file("nanogpt", tmp_path))
    assert "has no transformer.wte.weight" in refusal("nanogpt", write_file("transformer_xl", tmp_path))


@pytest.mark.parametrize(
    ("lines", "words", "fault"),
    [
        (["1"] * 65, [], "two symbols are the id 1"),
        (["1", "2"], [], "has 65 symbols, but 2 are named"),
        (["1", "x"], [], "line 2: 'x' is neither a byte (0 to 255) nor <eos>"),
        ([str(n) for n in range(100, 165)], [], "no separator, newline or space; say by --start"),
        ([str(n) for n in range(65)], ["--start", "99"], "has no symbol 99; say by --start"),
        ([str(n) for n in range(65)], ["train.steps=3"], "train is not a field of the model"),
        ([str(n) for n in range(65)], ["model.biases=false"], "takes model.biases=true"),
        ([str(n) for n in range(65)], ["model.layers=3"], "has no transformer.h.2.ln_1.weight"),
        ([str(n) for n in range(65)], ["model.depth=3"], "model.depth: Extra inputs are not permitted"),
    ],
)
def test_wrong_symbols_and_fields_are_refused(lines: list[str], words: list[str], fault: str, tmp_path: Path):
    (tmp_path / "symbols").write_text("\n".join(lines))
    file = write_file("nanogpt_small", tmp_path)
    assert fault in refusal("nanogpt", file, "--symbols", tmp_path / "symbols", *words)


def test_model_that_a_format_cannot_express_is_not_exported(tmp_path: Path):
    own = trained_like("transformer", tmp_path, positions="learned", activation="gelu", window=None, biases=True)
    for form, fault in (
        ("nanogpt", "the head has biases, and nanoGPT's has none"),
        ("perceiver-ar", "perceiver-ar has models of the family perceiver_ar; this is a transformer"),
    ):
        code, output = run_here("export", own, "--as", form, "--out", tmp_path / "file")
        assert code == 1 and fault in output
    (tmp_path / "second").mkdir()
    other = trained_like("transformer", tmp_path / "second", positions="learned", window=None)
    code, output = run_here("export", other, "--as", "nanogpt", "--out", tmp_path / "file")
    assert code == 1 and "model.activation is relu; nanogpt has models with gelu only" in output
    assert not list(tmp_path.glob("file*"))
