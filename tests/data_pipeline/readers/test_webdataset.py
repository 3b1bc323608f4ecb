"""WebDataset shards that another program wrote: samples, braces, and the output of commands."""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from byteloom.core.storage.state_files import StateFileError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import BadDocumentError, CorpusError
from data_pipeline.preparation.plan import UNIT, Plan
from data_pipeline.readers import ReadOptions, documents_in, is_container
from data_pipeline.sources.listing import Selection, list_files
from data_pipeline.sources.source_file import Skipped, SourceFile
from tests.conftest import prepare_corpus, prepare_options

READING = ReadOptions(reader="webdataset")
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def write_shard(path: Path, first: int, count: int = 3) -> Path:
    """Write a shard with WebDataset's own writer. Each sample has a picture, a caption and a class."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            sample = {"txt": f"caption {number}", "cls": number, "png": png(PIXELS + number % 200)}
            writer.write({"__key__": f"{number:06d}", **sample})
    return path


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def files(*sources: Path | str) -> list[SourceFile]:
    found = list(list_files([str(source) for source in sources], Selection()))
    assert all(isinstance(file, SourceFile) for file in found)
    return found


def read(file: SourceFile, options: ReadOptions = READING) -> dict[str, bytes | str]:
    """Return the documents of a shard by key, and the reason for each skipped sample."""
    assert is_container(file, options)
    found = list(documents_in(file, options))  # documents can be kept
    assert len({one.key for one in found}) == len(found)
    return {one.key: one.reason if isinstance(one, Skipped) else b"".join(one.read()) for one in found}


def test_each_sample_is_a_document_of_its_members(tmp_path: Path):
    [shard] = files(write_shard(tmp_path / "000.tar", 0))
    expected = {
        f"000.tar/{n:06d}": f"caption {n}{n}".encode() + (PIXELS + n).astype(np.uint8).tobytes() for n in range(3)
    }
    in_the_order_of_the_tar = read(shard)
    assert {key: sorted(content) for key, content in in_the_order_of_the_tar.items()} == {
        key: sorted(content) for key, content in expected.items()
    }
    named = ReadOptions(reader="webdataset", members=("txt", "CLS", "png"))
    assert read(shard, named) == expected
    assert {one.modality for one in documents_in(shard, named)} == {"binary"}
    captions = ReadOptions(reader="webdataset", members=("txt",))
    assert read(shard, captions) == {f"000.tar/{n:06d}": f"caption {n}".encode() for n in range(3)}
    assert {one.modality for one in documents_in(shard, captions)} == {"text"}


def test_pictures_and_sound_of_a_sample_are_decoded_by_their_suffixes(tmp_path: Path):
    sound = np.arange(-50, 50, dtype=np.int16)
    flac, jpeg = io.BytesIO(), io.BytesIO()
    soundfile.write(flac, sound, 16_000, format="FLAC")
    Image.fromarray(np.full((4, 4, 3), 128, np.uint8)).save(jpeg, "JPEG")
    with webdataset.TarWriter(str(tmp_path / "000.tar")) as writer:
        writer.write({"__key__": "a", "txt": "caption", "flac": flac.getvalue(), "jpg": jpeg.getvalue()})
    [shard] = files(tmp_path / "000.tar")
    found = read(shard, ReadOptions(reader="webdataset", members=("txt", "jpg", "flac")))
    assert found == {"000.tar/a": b"caption" + bytes([128] * 48) + sound.tobytes()}


def test_webdataset_itself_groups_the_same_samples(tmp_path: Path):
    path = write_shard(tmp_path / "000.tar", 0)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [f"000.tar/{sample['__key__']}" for sample in samples] == list(read(files(path)[0]))


def test_samples_without_a_requested_member_are_skipped_by_name(tmp_path: Path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "whole", "txt": "text", "json": {}})
        writer.write({"__key__": "bare", "json": {}})
        writer.write({"__key__": "blank", "txt": ""})
    options = ReadOptions(reader="webdataset", members=("txt",))
    assert read(files(tmp_path / "a.tar")[0], options) == {
        "a.tar/whole": b"text",
        "a.tar/bare": "no field",
        "a.tar/blank": "empty",
    }


def test_members_without_a_sample_are_skipped_by_name(tmp_path: Path):
    for name in ("README", "0.txt", "__meta__"):
        (tmp_path / name).write_text(name)
    (tmp_path / "1.txt").symlink_to("0.txt")
    names = ["README", "__meta__", "0.txt", "1.txt"]
    subprocess.run(["tar", "cf", "a.tar", *names], cwd=tmp_path, check=True)
    assert read(files(tmp_path / "a.tar")[0]) == {"a.tar/README": "no key", "a.tar/0": b"0.txt", "a.tar/1.txt": "link"}


def test_damaged_shard_yields_its_complete_samples_and_then_the_error(tmp_path: Path):
    path = write_shard(tmp_path / "000.tar", 0, count=5)
    path.write_bytes(path.read_bytes()[:-12_000])
    found = []
    with pytest.raises(BadDocumentError, match=f"{path} is damaged or cut short"):
        found.extend(documents_in(files(path)[0], READING))
    assert 1 <= len(found) < 5


def test_two_members_with_one_name_are_an_error(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for content in (b"one", b"two"):
            header = tarfile.TarInfo("0.txt")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with pytest.raises(BadDocumentError, match=r"a\.tar: 0\.txt: duplicate file name"):
        read(files(tmp_path / "a.tar")[0])


def test_braces_expand_to_many_sources(tmp_path: Path):
    for number in range(3):
        write_shard(tmp_path / f"{number:03d}.tar", 3 * number)
    shards = files(tmp_path / "{000..002}.tar")
    assert [(shard.source, shard.key) for shard in shards] == [(0, "000.tar"), (0, "001.tar"), (0, "002.tar")]
    with pytest.raises(CorpusError, match=r"no such file or folder: .*003\.tar"):
        files(tmp_path / "{000..003}.tar")
    with pytest.raises(CorpusError, match="cannot expand the braces"):
        files(tmp_path / "{000..001.tar")
    (tmp_path / "{a,b}").write_text("this file has such a name")
    assert [file.key for file in files(tmp_path / "{a,b}")] == ["{a,b}"]


class TestCommands:
    def test_the_output_of_a_command_is_a_shard(self, tmp_path: Path):
        path = write_shard(tmp_path / "000.tar", 0)
        [shard] = files(f"pipe:cat {path}")
        assert shard.size is None
        by_file = {key.removeprefix("000.tar/"): content for key, content in read(files(path)[0]).items()}
        for options in (READING, ReadOptions()):
            by_command = read(shard, options)
            assert {key.rpartition("/")[2]: content for key, content in by_command.items()} == by_file
            assert {key.count("/") for key in by_command} == {1}

    def test_a_command_that_fails_is_an_error_after_its_samples(self, tmp_path: Path):
        [shard] = files(f"pipe:cat {write_shard(tmp_path / '000.tar', 0)}; exit 3")
        found = []
        with pytest.raises(BadDocumentError, match="ended with status 3"):
            found.extend(documents_in(shard, READING))
        assert len(found) == 3

    def test_command_that_is_not_read_to_its_end_is_not_an_error(self, tmp_path: Path):
        path = write_shard(tmp_path / "000.tar", 0, count=400)
        documents = documents_in(files(f"pipe:cat {path}")[0], READING)
        next(documents)
        documents.close()

    def test_command_does_not_read_the_standard_input_of_this_process(self, tmp_path: Path):
        with pytest.raises(BadDocumentError, match="damaged or cut short"):
            read(files("pipe:cat")[0])

    def test_other_readers_do_not_run_commands(self, tmp_path: Path):
        [shard] = files(f"pipe:touch {tmp_path}/ran")
        with pytest.raises(CorpusError, match="which only --reader webdataset reads"):
            is_container(shard, ReadOptions(reader="lines"))
        assert not (tmp_path / "ran").exists()

    def test_no_folder_and_no_plan_can_add_a_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "t").mkdir()
        (tmp_path / "t/pipe:touch ran").write_text("the content")
        corpus = prepare_corpus(["t"], tmp_path / "out")
        assert [part.key for part in corpus.read(0).slices] == ["t/pipe:touch ran"]
        planned = Plan(tmp_path, {"sources": ["t"]}, prepare_options(), [])
        np.save(tmp_path / "units.npy", np.array([(0, 1, 0, 0)], UNIT))
        (tmp_path / "files.jsonl").write_text('[["pipe:touch ran", "key", null, true, null]]\n')
        with pytest.raises(StateFileError, match="a command that is not a source"):
            list(planned.files_of(0))
        assert not (tmp_path / "ran").exists()


def test_a_corpus_is_prepared_from_shards_and_commands(tmp_path: Path):
    for number in range(3):
        write_shard(tmp_path / f"{number:03d}.tar", 3 * number)
    sources = [f"{tmp_path}/{{000..001}}.tar", f"pipe:cat {tmp_path}/002.tar"]
    corpus: Corpus = prepare_corpus(sources, tmp_path / "out", reader="webdataset", members=("txt",))
    keys = sorted(part.key.rpartition("/")[2] for block in range(len(corpus)) for part in corpus.read(block).slices)
    assert keys == [f"{number:06d}" for number in range(9)]
