"""Exports that are damaged, written by hand or untrusted: checks of their files, names and permissions."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import CheckpointError, CheckpointStore, Metadata, read, verify
from pretrain.distributed.fragments import Fragment, whole
from pretrain.models import build_model, model_config
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.exports import export
from tests.conftest import recipe_tree
from tests.hidden import without


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder with one checkpoint, of a model with its initial values."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    tree: Any = recipe_tree(Path("corpus"))
    tree["data"]["mixture"] = {}
    model = build_model(model_config(tree["model"]))
    tensors = [whole(f"model/{name}", parameter.detach()) for name, parameter in model.named_parameters()]
    state = {"config": tree, "reading": {"step": 3, "next_sequence": 18}, "fingerprint": "f", "environment": {}}
    CheckpointStore(folder / "checkpoints", keep=None).save(3, tensors, state)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """Return a folder of a new export, which a test may damage."""
    export(find_checkpoint(run), tmp_path / "export", {})
    return tmp_path / "export"


def change_card(folder: Path, change: Callable[[Any], object]) -> None:
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@contextmanager
def umask(mask: int) -> Iterator[None]:
    earlier = os.umask(mask)
    try:
        yield
    finally:
        os.umask(earlier)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_export_has_the_permissions_of_the_umask(run: Path, tmp_path: Path, mask: int):
    with umask(mask):
        export(find_checkpoint(run), tmp_path / "export", {})
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o777 & ~mask
    for name in ("model.safetensors", "card.json"):
        assert (tmp_path / "export" / name).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.slow
def test_export_has_a_model_that_runs_without_byteloom(run: Path, tmp_path: Path):
    checkpoint = find_checkpoint(run)
    card = export(checkpoint, tmp_path / "export", {})
    (tmp_path / "text").write_bytes(bytes(range(256)) * 4)
    hidden = without(tmp_path / "hook", "byteloom", "data_pipeline", "launchers", "pretrain")
    command = [sys.executable, tmp_path / "export/model.py", tmp_path / "text"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=hidden, cwd=tmp_path)
    model = build_model(model_config(card["model"])).eval()
    read(checkpoint, [whole(f"model/{name}", parameter.detach()) for name, parameter in model.named_parameters()])
    length = model.sequence_length
    with torch.no_grad():
        nats = model(torch.arange(length)[None] % 256)[0].mean().item()
    assert done.stdout == f"{nats / math.log(2):.4f} bits per byte over {length} bytes\n"


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "..\\x", "a\0b", "link"],
)
def test_card_may_name_only_files_in_its_own_folder(folder: Path, name: str):
    for elsewhere in (folder.parent / "x", folder / "sub/model.safetensors"):
        elsewhere.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "model.safetensors", elsewhere)
    (folder / "link").symlink_to(folder.parent / "x")
    change_card(folder, lambda card: card.update(files={name: None}))
    assert refusal(folder) == (
        f"{folder}/card.json names the file {json.dumps(name)}; a card may name only files in its own folder"
    )


@pytest.mark.slow
def test_export_may_be_reached_by_a_link(folder: Path):
    (folder.parent / "link").symlink_to(folder)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")  # a link within the folder
    find_checkpoint(folder.parent / "link")


def test_non_finite_values_are_refused_with_tensor_and_count(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    first, second = sorted(tensors)[:2]
    tensors[first].view(-1)[1:4] = torch.nan
    tensors[second].view(-1)[0] = -torch.inf
    save_file(tensors, folder / "model.safetensors")
    change_card(folder, lambda card: card["files"].update({"model.safetensors": None}))
    message = refusal(folder)
    assert message.startswith(f"{folder}/model.safetensors has values that are NaN or infinite, in ")
    assert f"{first} (3)" in message and f"{second} (1)" in message


def with_header(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a safetensors file with a changed header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def names_in(header: dict[str, Any]) -> list[str]:
    return sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


def overlap(header: dict[str, Any]) -> None:
    header[names_in(header)[1]]["data_offsets"][0] -= 4


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "shorter than the length of a header": lambda content: content[:5],
    "a header longer than the file": lambda content: struct.pack("<Q", 1 << 40) + content[8:],
    "a header longer than memory": lambda content: b"\xff" * 8 + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"x" * 50 + content[58:],
    "zero bytes": lambda content: bytes(len(content)),
    "cut off": lambda content: content[:-4],
    "bytes beyond the last tensor": lambda content: content + bytes(8),
    "an offset outside the file": lambda content: with_header(
        content, lambda header: header[names_in(header)[-1]].update(data_offsets=[1 << 40, (1 << 40) + 4])
    ),
    "tensors that overlap": lambda content: with_header(content, overlap),
    "a shape of another size": lambda content: with_header(
        content, lambda header: header[names_in(header)[0]].update(shape=[3])
    ),
    "a tensor that is text": lambda content: with_header(
        content, lambda header: header.update({names_in(header)[0]: 7})
    ),
    "a tensor without a shape": lambda content: with_header(
        content, lambda header: header[names_in(header)[0]].pop("shape")
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_or_damaged_weight_file_is_refused_in_one_line(folder: Path, damage: Callable[[bytes], bytes]):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    change_card(folder, lambda card: card["files"].update({"model.safetensors": None}))
    assert refusal(folder).startswith(f"{path} is not a whole safetensors file: ")


def test_missing_weight_file_and_repeated_tensor_are_refused(folder: Path):
    change_card(folder, lambda card: card["files"].update({"more.safetensors": None}))
    message = refusal(folder)
    assert (
        message == f"{folder}/more.safetensors cannot be read: No such file or directory; {folder}/card.json names it"
    )
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    assert refusal(folder).endswith("is in an earlier file too")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (b"\0" * 9, "it holds only zero bytes"),
        (b"[]", "it is [], but it should be an object"),
        (b"{}", "format is missing in it"),
        (b'{"format": "byteloom-export/1"}', "files is missing in it"),
        (b'{"format": "byteloom-export/1", "files": {}, "recipe": {"model": {}}}', "files is {}, but"),
        (b'{"format": "byteloom-export/1", "files": {"a": null}, "recipe": {}}', "recipe.model is missing in it"),
    ],
)
def test_damaged_card_is_refused_in_one_line(folder: Path, content: bytes, fault: str):
    (folder / "card.json").write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder}/card.json is damaged: {fault}")
    assert message.endswith("; take the export again from its run, by byteloom checkpoint export")


def test_card_of_another_format_or_model_is_refused_in_one_line(folder: Path):
    change_card(folder, lambda card: card["recipe"]["model"].update(width=3))
    assert "recipe.model" in refusal(folder) and "this version builds no such model" in refusal(folder)
    change_card(folder, lambda card: card.update(format="byteloom-export/9"))
    assert "has format 'byteloom-export/9'; this version reads 'byteloom-export/1'" in refusal(folder)


def test_handwritten_card_needs_only_the_model_of_the_recipe(folder: Path):
    change_card(folder, lambda card: card.update(recipe={"model": card["recipe"]["model"]}))
    config = find_checkpoint(folder).state["config"]
    assert (config["validation"]["shards"], config["data"]["remote"], config["engine"]["precision"]) == (
        None,
        {},
        "fp32",
    )


def test_export_to_a_full_disk_is_refused_in_one_line_and_leaves_no_files(run: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        with pytest.raises(OSError, match=rf"{disk}/export cannot be written: .*No space left on device"):
            export(find_checkpoint(run), disk / "export", {})
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def all_fragments(metadata: Metadata) -> list[Fragment]:
    return [whole(name, torch.empty(stored.shape)) for name, stored in metadata.tensors.items()]


def test_run_without_a_valid_checkpoint_cannot_be_exported_and_its_folder_stays(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = copy / "checkpoints/step-00000003/rank-00000.bin"
    content = np.fromfile(data, np.uint8)
    content[0] ^= 1
    content.tofile(data)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(copy)
    assert str(caught.value) == f"no checkpoint in {copy}/checkpoints is valid; name another checkpoint, or an export"
    with pytest.raises(
        CheckpointError, match="restore one from a copy, or remove that folder to train from the beginning"
    ):
        CheckpointStore(copy / "checkpoints", keep=None).load(all_fragments, set_aside=True)
    assert verify(run / "checkpoints/step-00000003").name == "step-00000003"
