"""Sources on the Hugging Face Hub: read from a server, and without a network from the cache."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import CorpusError
from data_pipeline.sources import hub_cache
from data_pipeline.sources.roots import root_of
from tests.commands import environment, start_cold
from tests.hub_server import HubServer


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return the folder of a dataset with 90 documents in two files."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# A data set\n")
    texts = [f"document {number} " * (number % 7 + 1) for number in range(90)]
    pq.write_table(pa.table({"text": texts[:50]}), folder / "data/train-00000.parquet")
    (folder / "data/more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[50:]))
    return folder


def test_a_dataset_is_the_same_corpus_from_the_hub_and_from_the_cache(repository: Path, tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    words = ["prepare", "hf://datasets/owner/name", "--include", "data/*", "--out"]
    with HubServer(repository, "owner/name") as server:
        env = {**environment(), "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        with start_cold([*words, "online"], env, cwd=tmp_path) as command:
            assert command.wait() == 0
        assert any("/resolve/main/data/more.jsonl" in request for request in server.requests)
        download = "import huggingface_hub as hub; hub.snapshot_download('owner/name', repo_type='dataset')"
        subprocess.run([sys.executable, "-c", download], env=env, check=True)
    with start_cold([*words, "offline"], {**env, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path) as command:
        assert command.wait() == 0
    found = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.suffix in (".tar", ".npy")}
        for name in ("online", "offline")
    ]
    assert found[0] and found[0] == found[1]
    [manifest] = (tmp_path / "offline").rglob("manifest.json")
    assert json.loads(manifest.read_text())["documents"] == 90


def test_what_the_cache_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("hf://datasets/owner/name", "hf://datasets/owner/name@v1/data/x.jsonl"):
        with pytest.raises(CorpusError, match=f"{source} is not in the cache of huggingface_hub"):
            root_of(0, source)
    with pytest.raises(CorpusError, match="hf://datasets/owner names no repository of the Hub"):
        root_of(0, "hf://datasets/owner")


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("hf://datasets/a/b", ("dataset", "a/b", None, None)),
        (
            "hf://datasets/a/b@refs/convert/parquet/c/d.parquet",
            ("dataset", "a/b", "refs/convert/parquet", "c/d.parquet"),
        ),
        ("hf://datasets/a/b@refs%2Fpr%2F1/c", ("dataset", "a/b", "refs%2Fpr%2F1", "c")),
        ("hf://a/b@v1.0/c/d", (None, "a/b", "v1.0", "c/d")),
    ],
)
def test_parts_of_a_hub_url(url: str, parts: tuple[str | None, ...]):
    found = hub_cache.HUB_URL.fullmatch(url)
    assert found is not None and found.groups() == parts
