"""The card of media in the manifest of a corpus."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.repair import repair
from data_pipeline.corpus.verify import verify
from data_pipeline.media import MediaCard, common_card
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers import ReadOptions
from tests.conftest import Run

DRAW = np.random.default_rng(0)
IMAGE = MediaCard("image", "u8", 3, width=8, height=8, scan="raster")
SOUND = MediaCard("audio", "s16le", 2, 8000)


def picture(path: Path, width: int = 8, height: int = 8) -> None:
    Image.fromarray(DRAW.integers(0, 256, (height, width, 3), np.uint8)).save(path)


def sound(path: Path, rate: int = 8000, channels: int = 2) -> None:
    soundfile.write(path, DRAW.integers(-3000, 3000, (rate // 20, channels)).astype("<i2"), rate)


def card_of_files(source: Path, options: PrepareOptions | None = None) -> MediaCard | None:
    out = source.with_name("corpus")
    prepare([source], out, options or PrepareOptions())
    with Corpus(out) as corpus:
        return corpus.card


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def test_card_holds_what_all_images_have_in_common(source: Path):
    picture(source / "a.png")
    picture(source / "b.png")
    assert card_of_files(source) == IMAGE


@pytest.mark.parametrize("deduplicate", [False, True])
def test_card_omits_properties_that_differ(source: Path, deduplicate: bool):
    picture(source / "a.png")
    picture(source / "b.png", width=4)
    assert card_of_files(source, PrepareOptions(deduplicate=deduplicate)) == MediaCard(
        "image", "u8", 3, height=8, scan="raster"
    )


def test_card_holds_the_options_of_the_reader(source: Path):
    picture(source / "a.png", 20, 9)
    picture(source / "b.png", 9, 20)
    reading = ReadOptions(image_size=8, image_scan="patch", patch_size=48, image_filter="box")
    expected = MediaCard("image", "u8", 3, width=8, height=8, scan="patch", patch_size=48, filter="box")
    assert card_of_files(source, PrepareOptions(reading=reading)) == expected


@pytest.mark.parametrize("reading", [ReadOptions(), ReadOptions(audio_rate=4000, audio_channels=1)])
def test_card_of_sound(source: Path, reading: ReadOptions):
    sound(source / "a.wav")
    sound(source / "b.flac")
    expected = SOUND if reading.audio_rate is None else MediaCard("audio", "s16le", 1, 4000)
    assert card_of_files(source, PrepareOptions(reading=reading)) == expected


@pytest.mark.parametrize("reader", ["auto", "webdataset"])
def test_members_of_a_tar_have_a_card(source: Path, reader: str):
    with tarfile.open(source / "a.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            picture(source.parent / name)
            tar.add(source.parent / name, name)
    assert card_of_files(source, PrepareOptions(reading=ReadOptions(reader=reader))) == IMAGE


def test_each_part_has_its_own_card(source: Path):
    for number in range(12):
        picture(source / f"{number}.png", width=8 + number)
    prepare([source], source.with_name("corpus"), PrepareOptions(holdout=0.1, seed=1))
    cards = {}
    for part in ("train", "validation"):
        with Corpus(source.with_name("corpus") / part) as corpus:
            cards[part] = corpus.card, corpus.manifest["documents"]
    for card, documents in cards.values():
        assert card is not None and (card.width is not None) == (documents == 1)


def test_a_mirror_restores_the_card_of_a_lost_manifest(source: Path):
    picture(source / "a.png")
    card_of_files(source)
    folder = source.with_name("corpus")
    mirror = shutil.copytree(folder, source.with_name("mirror"))
    (folder / "manifest.json").unlink()
    repair(folder, str(mirror), 1, lambda *_: None)
    assert (folder / "manifest.json").read_bytes() == (mirror / "manifest.json").read_bytes()


def make_unreadable(manifest: Path, damage: str) -> None:
    text = manifest.read_text()
    if damage == "removed":
        manifest.unlink()
    elif damage == "cut":
        manifest.write_text(text[: len(text) // 2])
    else:
        manifest.write_text(re.sub(rf'"{damage}": \d+', f'"{damage}": 99', text))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["removed", "cut", "documents", "width"])
@pytest.mark.parametrize("part", ["", "train"])
@pytest.mark.parametrize("has_report", [True, False])
def test_repair_finds_the_card_of_an_unreadable_manifest(source: Path, damage: str, part: str, has_report: bool):
    """The digest in the rest of the manifest, or in the report of `prepare`, proves the card."""
    for name in "abcdef":
        picture(source / f"{name}.png")
    out = source.with_name("corpus")
    prepare([source], out, PrepareOptions(holdout=0.3 if part else 0.0))
    if not has_report:
        (out / "report.json").unlink()
    manifest = out / part / "manifest.json"
    before = manifest.read_bytes()
    make_unreadable(manifest, damage)
    assert manifest.exists() != (damage == "removed")
    [message] = repair(out / part, None, 1, lambda *_: None)
    if has_report or damage == "documents":
        assert manifest.read_bytes() == before
        assert f"its media card ({IMAGE}) is that of " in message
    else:
        assert "media" not in json.loads(manifest.read_text())
        assert "its media card (layout of each image document) is lost, if it had one. Only a mirror has it" in message


@pytest.mark.parametrize("other", ["text", "sound"])
def test_a_corpus_of_several_kinds_has_no_card(source: Path, other: str):
    picture(source / "a.png")
    if other == "text":
        (source / "b.txt").write_text("a caption")
    else:
        sound(source / "b.wav")
    assert card_of_files(source) is None
    assert "media" not in json.loads((source.with_name("corpus") / "manifest.json").read_text())


def test_verify_and_repair_keep_the_card(source: Path):
    picture(source / "a.png")
    assert card_of_files(source) == IMAGE
    folder = source.with_name("corpus")
    before = (folder / "manifest.json").read_bytes()
    assert verify(folder, 1, lambda *_: None) == []
    (folder / "index.npy").write_bytes(b"damaged")
    repair(folder, None, 1, lambda *_: None)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_inspect_shows_the_card(source: Path, byteloom: Run):
    sound(source / "a.wav")
    card_of_files(source)
    folder = source.with_name("corpus")
    assert "audio, 8,000 Hz, 2 channels, s16le" in byteloom("inspect", folder).stdout
    assert json.loads(byteloom("inspect", folder, "--json").stdout)["media"] == SOUND.as_json()


CARDS = st.builds(
    MediaCard,
    st.just("image"),
    st.just("u8"),
    st.just(3),
    width=st.sampled_from([None, 4, 8]),
    height=st.sampled_from([None, 4, 8]),
    scan=st.sampled_from([None, "raster", "patch"]),
) | st.just(SOUND)


@pytest.mark.slow
@given(st.lists(CARDS | st.none(), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_common_card_does_not_depend_on_order_or_on_adding_itself(cards: list[MediaCard | None], order):
    found = common_card(cards)
    order.shuffle(cards)
    assert common_card(cards) == found == common_card([found, *cards])
    if found is not None:
        assert MediaCard.from_json(json.loads(json.dumps(found.as_json()))) == found


@pytest.mark.parametrize("stored", [None, [], {}, {"kind": "image", "sample_format": "s16le"}])
def test_a_damaged_card_is_refused(stored: object):
    with pytest.raises(ValueError):
        MediaCard.from_json(stored)
