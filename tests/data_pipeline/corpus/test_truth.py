"""Manifest and index state exactly what the shards hold, and another corpus is never accepted in place of a corpus."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import BLOCK, LENGTHS
from data_pipeline.corpus.manifest import FIELDS, SHARD_FIELDS
from data_pipeline.corpus.tar import shard_name
from data_pipeline.errors import CorpusError
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.reading import open_streams
from tests.conftest import Run
from tests.data_pipeline.corpora import contents, faults, mend, write_corpus

INDEX = ("manifest.json", "lengths.npy", "index.npy")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("truth") / "original", blocks_per_shard=20)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("truth") / "other", block_bytes=5_000)


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and give it the digests that make it consistent."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in ("lengths", "index"):
        content = (folder / f"{name}.npy").read_bytes()
        manifest |= {f"{name}_bytes": len(content), f"{name}_blake3": blake3.blake3(content).hexdigest()}
    change(manifest)
    del manifest["manifest_sha256"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(manifest | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1))


def swap_shards(manifest: dict[str, Any]) -> None:
    shards = manifest["shards"]
    shards[1], shards[2] = shards[2], shards[1]


@pytest.mark.slow
def test_two_swapped_shards_are_found_and_repaired(copy: Path, original: Corpus, other: Corpus):
    forge(copy, swap_shards)
    before = contents(copy)
    said = "\n".join(faults(copy))
    assert f"{copy}/manifest.json lists {shard_name(2)} before {shard_name(1)}, out of order" in said
    assert f"{copy}/index.npy: {shard_name(2)}, block 0: its " in said
    with pytest.raises(CorpusError, match="is not a mirror of"):
        mend(copy, other)
    assert contents(copy) == before
    [said] = mend(copy)
    assert original.content_sha256 in said
    assert contents(copy) == contents(original.location)
    forge(copy, swap_shards)
    mend(copy, original)
    assert contents(copy) == contents(original.location)


def changed(value: Any) -> Any:
    if isinstance(value, int):
        return value + 1
    return value[::-1] if isinstance(value, str) else [*value, "audio"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(FIELDS.keys() - {"format", "shards", "manifest_sha256"}), "more"])
def test_each_wrong_field_of_a_manifest_is_recomputed(copy: Path, original: Corpus, name: str):
    forge(copy, lambda manifest: manifest.update({name: changed(manifest.get(name, 0))}))
    said = "\n".join(faults(copy))
    assert name.partition("_")[0] in said
    assert "--repair" in said
    mend(copy)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(SHARD_FIELDS.keys() - {"name", "sha256"}), "more"])
def test_each_wrong_field_of_an_entry_of_a_shard_is_recomputed(copy: Path, original: Corpus, name: str):
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][1][name] = changed(manifest["shards"][1].get(name, 0))

    forge(copy, change)
    said = "\n".join(faults(copy))
    assert f"says that {shard_name(1)} has {name} " in said or (name == "bytes" and "but was written with" in said)
    mend(copy)
    assert contents(copy) == contents(original.location)


@pytest.mark.parametrize("name", ["name", "sha256"])
def test_shard_that_disagrees_with_the_manifest_needs_a_mirror(copy: Path, original: Corpus, name: str):
    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["shards"][1]
        entry[name] = shard_name(9) if name == "name" else changed(entry[name])

    forge(copy, change)
    assert faults(copy)
    with pytest.raises(CorpusError, match="--mirror"):
        mend(copy)
    mend(copy, original)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", [*(("lengths", n) for n in LENGTHS.names or ()), *(("index", n) for n in BLOCK.names or ())]
)
def test_each_wrong_record_of_the_index_is_recomputed(copy: Path, original: Corpus, field: tuple[str, str]):
    file, name = field
    records = np.load(copy / f"{file}.npy")
    records[name][27] = records[name][27] ^ 1
    np.save(copy / f"{file}.npy", records)
    forge(copy, lambda manifest: None)
    assert f"{copy}/{file}.npy: {shard_name(1)}, block 7: its {name} is " in "\n".join(faults(copy))
    mend(copy)
    assert contents(copy) == contents(original.location)


@pytest.mark.parametrize("kind", ["cut", "header", "more"])
def test_index_with_other_bytes_than_its_records_is_damaged(copy: Path, original: Corpus, kind: str):
    path = copy / "index.npy"
    if kind == "cut":
        np.save(path, np.load(path)[:-1])
    elif kind == "header":
        records = np.load(path)
        with path.open("wb") as file:
            np.lib.format.write_array(file, records, version=(2, 0))
    else:
        path.write_bytes(path.read_bytes() + b"more")
    forge(copy, lambda manifest: None)
    assert "index.npy" in "\n".join(faults(copy))
    mend(copy)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["blocks", "content_sha256", "shards"])
@pytest.mark.parametrize("value", [None, "", -1, []])
def test_a_manifest_without_its_fields_is_damaged(copy: Path, original: Corpus, field: str, value: object):
    forge(copy, lambda manifest: manifest.update({field: value}))
    if (field, value) != ("content_sha256", ""):
        with pytest.raises(CorpusError, match=r"manifest.json is damaged: .*(field|no shard)"):
            Corpus(copy)
    assert faults(copy)
    mend(copy)
    assert contents(copy) == contents(original.location)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-0.tar", 7])
def test_manifest_cannot_name_a_file_outside_its_folder(copy: Path, name: object):
    forge(copy, lambda manifest: manifest["shards"][0].update(name=name))
    with pytest.raises(CorpusError, match="name"):
        Corpus(copy)
    assert faults(copy)


def test_a_manifest_of_another_corpus_is_named(copy: Path, original: Corpus, other: Corpus):
    """The index shows that no shard is missing."""
    shutil.copyfile(Path(other.location, "manifest.json"), copy / "manifest.json")
    [said] = faults(copy)  # and no advice to remove the shards
    assert said.startswith(f"{copy}/manifest.json is of another corpus: none of the 10 shards that it lists is here")
    assert "--repair" in said
    mend(copy)
    assert contents(copy) == contents(original.location)


def test_following_the_advice_about_an_index_of_another_corpus_works(copy: Path, original: Corpus, other: Corpus):
    for name in INDEX:
        shutil.copyfile(Path(other.location, name), copy / name)
    [said, *_] = faults(copy)
    assert "move them away and write them again from the shards with byteloom verify --repair" in said
    with pytest.raises(CorpusError, match=r"move it away with index\.npy"):
        mend(copy)
    for name in INDEX:
        (copy / name).rename(copy.parent / name)
    mend(copy)
    assert contents(copy) == contents(original.location)


def test_a_manifest_above_its_corpora_is_named(copy: Path, tmp_path: Path):
    for name in INDEX:
        shutil.copyfile(copy / name, tmp_path / name)
    [said] = faults(tmp_path)
    assert said.startswith(f"{tmp_path}/manifest.json is alone: none of the 5 shards that it lists is here")
    assert said.endswith(f"remove it. The corpora here are {copy}")


def test_a_manifest_without_any_shard_is_named(copy: Path):
    for shard in copy.glob("shard-*.tar"):
        shard.unlink()
    [said] = faults(copy)
    assert said.endswith(
        "is alone: none of the 5 shards that it lists is here; remove it, or restore the shards from a copy"
    )


def test_a_corpus_of_another_digest_is_refused(copy: Path, original: Corpus):
    assert Corpus(copy, digest=original.digest).digest == original.digest
    forge(copy, swap_shards)  # a change that no reader would notice
    with pytest.raises(CorpusError, match=f"{original.digest} is asked for"):
        Corpus(copy, digest=original.digest)


def test_a_recipe_pins_its_corpora(original: Corpus, other: Corpus):
    one = {"shards": original.location, "shards_sha256": original.digest}
    [source] = DataConfig.model_validate(one).sources().values()
    assert source.shards_sha256 == original.digest
    several = {"a": one, "b": {"shards": other.location, "shards_sha256": original.digest}}
    with pytest.raises(CorpusError, match=f"{other.location} has the digest {other.digest}"):
        open_streams(DataConfig.model_validate({"mixture": several}), 128)
    for wrong in ({**one, "shards_sha256": original.digest[1:]}, {"mixture": several, "shards_sha256": other.digest}):
        with pytest.raises(ValidationError, match="shards_sha256"):
            DataConfig.model_validate(wrong)


@pytest.mark.slow
def test_commands_print_the_digest_and_a_run_refuses_another_digest(
    original: Corpus, other: Corpus, byteloom: Run, recipe: Path
):
    assert byteloom("inspect", original.location, "--digest").stdout == f"{original.digest}\n"
    assert byteloom("verify", original.location).stderr.endswith(f"digest {original.digest}\n")
    for field in ("data", "validation", "validation.corpora.books"):
        overrides = [f"{field}.shards={other.location}", f"{field}.shards_sha256={original.digest}"]
        if field.startswith("validation.corpora"):
            overrides.append("validation.shards=null")
        refused = byteloom("train", recipe, *overrides, check=False)
        assert refused.returncode == 1
        assert f"{other.location} has the digest {other.digest}" in refused.stderr
