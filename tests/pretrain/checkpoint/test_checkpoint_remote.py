"""Checkpoints at a URL, on a real local S3 server: the same promise, by a marker that comes last and goes first."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from typer.testing import CliRunner

from pretrain.checkpoint import CheckpointError, CheckpointStore, Url, bucket, read, read_metadata, verify
from pretrain.checkpoint.bucket import BucketHome
from pretrain.checkpoint.fence import Fence, FencedError
from pretrain.cli.app import app
from pretrain.distributed.fragments import Fragment, whole
from tests.s3 import s3_server

SERVER = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A local S3 server with a bucket."""
    with s3_server(SERVER):
        yield


@pytest.fixture
def url(server: None, request: pytest.FixtureRequest) -> str:
    """An empty home."""
    return f"s3://{SERVER}/runs/{request.node.name}"


def keys(url: str) -> list[str]:
    """Of the objects below a URL."""
    prefix = url.removeprefix(f"s3://{SERVER}/") + "/"
    found = boto3.client("s3").list_objects_v2(Bucket=SERVER, Prefix=prefix).get("Contents", ())
    return sorted(entry["Key"].removeprefix(prefix) for entry in found)


def remove(url: str, key: str) -> None:
    boto3.client("s3").delete_object(Bucket=SERVER, Key=f"{url.removeprefix(f's3://{SERVER}/')}/{key}")


def data_of(url: str, step: int) -> str:
    return next(key for key in keys(url) if key.startswith(f"step-{step:08d}/") and key.endswith("rank-00000.bin"))


def values(step: int) -> torch.Tensor:
    return torch.arange(1000.0) + step


def fragments(tensor: torch.Tensor) -> list[Fragment]:
    return [whole("model/a", tensor)]


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, fragments(values(step)), {"step": step})


def loaded(store: CheckpointStore) -> int:
    """The step of what the store loads, whose values are those that were saved."""
    live = torch.zeros(1000)
    metadata = store.load(lambda checkpoint: fragments(live), set_aside=True)
    assert metadata is not None
    assert torch.equal(live, values(metadata.state["step"]))
    return int(metadata.state["step"])


def test_what_is_loaded_is_what_was_saved(url: str):
    store = CheckpointStore(url, keep=2)
    assert store.load(lambda checkpoint: []) is None
    save(store, 1, 2, 3)
    assert store.committed() == [Url(f"{url}/step-{step:08d}") for step in (2, 3)]
    assert loaded(CheckpointStore(url, keep=2)) == 3
    assert verify(f"{url}/step-00000003").state == {"step": 3}
    assert {key.partition("/")[0] for key in keys(url)} == {"step-00000002", "step-00000003"}


def test_a_large_file_goes_in_parts(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    tensor = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    path = CheckpointStore(url, keep=1).save(1, fragments(tensor), {})
    target = torch.zeros(2_000_000)
    read(read_metadata(path), [Fragment("model/a", (3_000_000,), 500_000, target)])
    assert torch.equal(target, tensor[500_000:2_500_000])


def test_a_rank_may_own_nothing(url: str):
    path = CheckpointStore(url, keep=1).save(1, [Fragment("model/a", (0,), 0, torch.empty(0))], {})
    assert verify(path).tensors["model/a"].shape == (0,)


def test_what_has_no_marker_is_no_checkpoint_and_is_swept(url: str):
    """A kill before the marker was made, and one after it was deleted."""
    store = CheckpointStore(url, keep=5)
    save(store, 1, 2, 3)
    remove(url, "step-00000003/metadata.json")
    remove(url, "step-00000001/metadata.json")
    again = CheckpointStore(url, keep=5)
    assert loaded(again) == 2
    again.sweep()
    assert {key.partition("/")[0] for key in keys(url)} == {"step-00000002"}


def test_an_invalid_one_is_set_aside_with_its_reason(url: str):
    store = CheckpointStore(url, keep=5)
    save(store, 1, 2)
    remove(url, data_of(url, 2))
    assert loaded(store) == 1
    reason = boto3.client("s3").get_object(
        Bucket=SERVER, Key=f"{url.removeprefix(f's3://{SERVER}/')}/step-00000002/invalid.txt"
    )
    assert b"rank-00000.bin is missing" in reason["Body"].read()
    store.sweep()
    save(store, 2)
    assert loaded(store) == 2
    remove(url, data_of(url, 1))
    remove(url, data_of(url, 2))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in s3://.* is valid"):
            store.load(lambda checkpoint: fragments(torch.zeros(1000)), set_aside=True)


def start(url: str, run: Path) -> tuple[Fence, CheckpointStore]:
    """A start of a run, on a machine with a run folder of its own."""
    fence = Fence(run / "generation", Url(url) / "generation")
    fence.mark = fence.claim()
    store = CheckpointStore(url, keep=3, fence=fence.check_everywhere)
    store.sweep()
    return fence, store


def test_only_the_newest_start_commits_wherever_it_runs(url: str, tmp_path: Path):
    fence, old = start(url, tmp_path / "one")
    save(old, 1)
    _, new = start(url, tmp_path / "other")
    assert fence.holds  # its own run folder knows nothing of it
    with pytest.raises(FencedError, match="start 2 of this run has taken over from this one, start 1"):
        fence.check_everywhere()
    with pytest.raises(CheckpointError, match="has taken over"):
        save(old, 2)
    assert loaded(new) == 1
    save(new, 2)


def test_a_marker_that_was_held_up_while_another_start_took_over_marks_nothing(url: str, tmp_path: Path):
    """The old start has looked at the fence, and is cut off; the new one begins; then the old one's marker comes."""
    _, old = start(url, tmp_path / "one")
    save(old, 1, 2)
    bucket = BucketHome(Url(url))
    marker = bucket.read("step-00000002/metadata.json")
    remove(url, "step-00000002/metadata.json")
    _, new = start(url, tmp_path / "other")
    bucket.commit("step-00000002", "", marker)
    save(new, 2)
    assert loaded(new) == 2
    with pytest.raises(OSError):
        bucket.commit("step-00000002", "", marker)
    assert loaded(new) == 2


def test_a_server_that_is_away_has_damaged_nothing(url: str, monkeypatch: pytest.MonkeyPatch):
    save(CheckpointStore(url, keep=3), 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="EndpointConnectionError"):
        CheckpointStore(url, keep=3).load(lambda checkpoint: [], set_aside=True)
    monkeypatch.undo()
    assert "step-00000001/metadata.json" in keys(url)


def said(*arguments: object) -> str:
    """What the command says, run in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_goes_on_from_its_home_in_a_new_run_folder(url: str, recipe: Path, tmp_path: Path):
    options = (f"run.root={tmp_path}", f"checkpoint.home={url}", "validation.shards=null")
    said("train", recipe, *options, "train.steps=4")
    run = tmp_path / "run"
    assert not (run / "checkpoints").exists()
    assert [fact["step"] for fact in json.loads(said("checkpoint", "list", run, "--json"))] == [4]
    shutil.rmtree(run)
    said("train", recipe, *options, "train.steps=5")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [5]
    assert [fact["step"] for fact in json.loads(said("checkpoint", "list", f"{url}/run", "--json"))] == [4, 5]


def test_a_url_that_nothing_opens_is_told():
    with pytest.raises(CheckpointError, match="Protocol not known: nosuch"):
        CheckpointStore("nosuch://bucket/run", keep=1)
