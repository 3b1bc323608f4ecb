"""Checkpoints at a URL on a real local S3 server, whose marker is written last and deleted first."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from byteloom.core.faults import is_of_storage
from byteloom.core.retries import RetryPolicy
from pretrain.checkpoint import CheckpointError, CheckpointStore, Url, read, read_metadata, verify
from pretrain.checkpoint.homes import bucket
from pretrain.checkpoint.homes.bucket import BucketHome
from pretrain.checkpoint.homes.fence import Fence, FencedError, Note
from pretrain.cli.app import app
from pretrain.distributed.fragments import Fragment, whole
from tests.s3 import faulty_proxy, s3_client, s3_server

SERVER = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """Run a local S3 server with a bucket."""
    with s3_server(SERVER):
        yield


@pytest.fixture
def url(server: None, request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty home of checkpoints."""
    return f"s3://{SERVER}/runs/{request.node.name}"


def keys(url: str) -> list[str]:
    """Return the keys of the objects below a URL."""
    prefix = url.removeprefix(f"s3://{SERVER}/") + "/"
    found = s3_client().list_objects_v2(Bucket=SERVER, Prefix=prefix).get("Contents", ())
    return sorted(entry["Key"].removeprefix(prefix) for entry in found)


def remove(url: str, key: str) -> None:
    s3_client().delete_object(Bucket=SERVER, Key=f"{url.removeprefix(f's3://{SERVER}/')}/{key}")


def data_of(url: str, step: int) -> str:
    return next(key for key in keys(url) if key.startswith(f"step-{step:08d}/") and key.endswith("rank-00000.bin"))


def values(step: int) -> torch.Tensor:
    return torch.arange(1000.0) + step


def fragments(tensor: torch.Tensor) -> list[Fragment]:
    return [whole("model/a", tensor)]


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, fragments(values(step)), {"step": step})


def loaded_step(store: CheckpointStore) -> int:
    """Load the newest checkpoint, check its values, and return its step."""
    live = torch.zeros(1000)
    metadata = store.load(lambda checkpoint: fragments(live), set_aside=True)
    assert metadata is not None
    assert torch.equal(live, values(metadata.state["step"]))
    return int(metadata.state["step"])


@pytest.mark.slow
def test_load_returns_the_saved_tensors(url: str):
    store = CheckpointStore(url, keep=2)
    assert store.load(lambda checkpoint: []) is None
    save(store, 1, 2, 3)
    assert store.committed() == [Url(f"{url}/step-{step:08d}") for step in (2, 3)]
    assert loaded_step(CheckpointStore(url, keep=2)) == 3
    assert verify(f"{url}/step-00000003").state == {"step": 3}
    assert {key.partition("/")[0] for key in keys(url)} == {"step-00000002", "step-00000003"}


@pytest.mark.slow
def test_large_file_is_uploaded_in_parts(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    tensor = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    path = CheckpointStore(url, keep=1).save(1, fragments(tensor), {})
    target = torch.zeros(2_000_000)
    read(read_metadata(path), [Fragment("model/a", (3_000_000,), 500_000, target)])
    assert torch.equal(target, tensor[500_000:2_500_000])


@pytest.mark.slow
def test_rank_may_own_no_elements(url: str):
    path = CheckpointStore(url, keep=1).save(1, [Fragment("model/a", (0,), 0, torch.empty(0))], {})
    assert verify(path).tensors["model/a"].shape == (0,)


@pytest.mark.slow
def test_folder_without_a_marker_is_not_a_checkpoint_and_is_swept(url: str):
    """One kill was before the marker was written, another after it was deleted."""
    store = CheckpointStore(url, keep=5)
    save(store, 1, 2, 3)
    remove(url, "step-00000003/metadata.json")
    remove(url, "step-00000001/metadata.json")
    again = CheckpointStore(url, keep=5)
    assert loaded_step(again) == 2
    again.sweep()
    assert {key.partition("/")[0] for key in keys(url)} == {"step-00000002"}


@pytest.mark.slow
def test_invalid_checkpoint_is_quarantined_with_its_reason(url: str):
    store = CheckpointStore(url, keep=5)
    save(store, 1, 2)
    remove(url, data_of(url, 2))
    assert loaded_step(store) == 1
    reason = s3_client().get_object(
        Bucket=SERVER, Key=f"{url.removeprefix(f's3://{SERVER}/')}/step-00000002/invalid.txt"
    )
    assert b"rank-00000.bin is missing" in reason["Body"].read()
    store.sweep()
    save(store, 2)
    assert loaded_step(store) == 2
    remove(url, data_of(url, 1))
    remove(url, data_of(url, 2))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in s3://.* is valid"):
            store.load(lambda checkpoint: fragments(torch.zeros(1000)), set_aside=True)


def start(url: str, run: Path) -> tuple[Fence, CheckpointStore]:
    """Start a run on a machine with its own run folder."""
    fence = Fence(run / "generation", Url(url) / "generation")
    fence.mark = fence.claim()
    store = CheckpointStore(url, keep=3, fence=fence.check_everywhere)
    store.sweep()
    return fence, store


@pytest.mark.slow
def test_only_the_newest_start_commits_on_any_machine(url: str, tmp_path: Path):
    fence, old = start(url, tmp_path / "one")
    save(old, 1)
    _, new = start(url, tmp_path / "other")
    assert fence.holds  # its own run folder has no mark of the newer start
    with pytest.raises(FencedError, match="start 2 of this run has taken over from this one, start 1"):
        fence.check_everywhere()
    with pytest.raises(CheckpointError, match="has taken over"):
        save(old, 2)
    assert loaded_step(new) == 1
    save(new, 2)


@pytest.mark.slow
def test_delayed_marker_of_an_older_start_commits_nothing(url: str, tmp_path: Path):
    """The older start checks the fence and is delayed, a newer start begins, and then the older marker arrives."""
    _, old = start(url, tmp_path / "one")
    save(old, 1, 2)
    bucket = BucketHome(Url(url))
    marker = bucket.read("step-00000002/metadata.json")
    remove(url, "step-00000002/metadata.json")
    _, new = start(url, tmp_path / "other")
    bucket.commit("step-00000002", "", marker)
    save(new, 2)
    assert loaded_step(new) == 2
    with pytest.raises(OSError):
        bucket.commit("step-00000002", "", marker)
    assert loaded_step(new) == 2


@pytest.mark.slow
def test_unreachable_server_does_not_quarantine_checkpoints(url: str, monkeypatch: pytest.MonkeyPatch):
    save(CheckpointStore(url, keep=3), 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(bucket, "BUCKET_POLICY", RetryPolicy(attempts=2, backoff_seconds=0.001, deadline_seconds=60.0))
    monkeypatch.setattr(bucket, "S3_ATTEMPTS", 1)
    with pytest.raises(CheckpointError, match="EndpointConnectionError"):
        CheckpointStore(url, keep=3).load(lambda checkpoint: [], set_aside=True)
    monkeypatch.undo()
    assert "step-00000001/metadata.json" in keys(url)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "busy", "broken", "expired"])
def test_passing_fault_of_a_bucket_costs_no_checkpoint(url: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    """A third of the answers of a load fails."""
    monkeypatch.setattr(bucket, "BUCKET_POLICY", RetryPolicy(attempts=30, backoff_seconds=1e-6, deadline_seconds=60.0))
    draw = random.Random(0)
    save(CheckpointStore(url, keep=3), 1)
    found = torch.zeros(1000)
    with faulty_proxy(lambda path, _: fault if draw.random() < 1 / 3 else None) as proxy:
        assert CheckpointStore(url, keep=3).load(lambda checkpoint: fragments(found), set_aside=True) is not None
    assert torch.equal(found, values(1))
    assert proxy.injected[fault] >= 2


@pytest.mark.slow
def test_supervisor_can_tell_a_bucket_that_is_down(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket, "BUCKET_POLICY", RetryPolicy(attempts=2, backoff_seconds=0.001, deadline_seconds=60.0))
    monkeypatch.setattr(bucket, "S3_ATTEMPTS", 1)
    save(CheckpointStore(url, keep=3), 1)
    with faulty_proxy(lambda path, _: "busy"):
        with pytest.raises(CheckpointError) as of_save:
            save(CheckpointStore(url, keep=3), 2)
        with pytest.raises(CheckpointError) as of_load:
            CheckpointStore(url, keep=3).load(lambda checkpoint: [])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(CheckpointError) as of_nobody:
        save(CheckpointStore(url, keep=3), 2)
    assert all(is_of_storage(caught.value) for caught in (of_save, of_load, of_nobody))


def output_of(*arguments: object) -> str:
    """Run a command in this process and return its output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_run_resumes_from_its_home_in_a_new_run_folder(url: str, recipe: Path, tmp_path: Path):
    options = (f"run.root={tmp_path}", f"checkpoint.home={url}", "validation.shards=null")
    output_of("train", recipe, *options, "train.steps=4")
    run = tmp_path / "run"
    assert not (run / "checkpoints").exists()
    assert [fact["step"] for fact in json.loads(output_of("checkpoint", "list", run, "--json"))] == [4]
    shutil.rmtree(run)
    output_of("train", recipe, *options, "train.steps=5")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [5]
    assert [fact["step"] for fact in json.loads(output_of("checkpoint", "list", f"{url}/run", "--json"))] == [4, 5]


def test_url_with_an_unknown_protocol_is_refused():
    with pytest.raises(CheckpointError, match="Protocol not known: nosuch"):
        CheckpointStore("nosuch://bucket/run", keep=1)


@pytest.mark.slow
def test_quarantined_checkpoints_of_a_step_stay_when_a_later_one_is_deleted(url: str):
    store = CheckpointStore(url, keep=1)
    save(store, 1)
    for _ in range(2):
        CheckpointStore(url, keep=None).save(2, fragments(values(2)), {"reading": {"step": 3}})
        assert loaded_step(store) == 1
    quarantined = keys(url)
    save(store, 2, 3)
    store.sweep()
    assert [key for key in keys(url) if not key.startswith("step-00000003/")] == [
        key for key in quarantined if key.startswith("step-00000002/")
    ]
    assert len(quarantined) == 3 + 2 * 3 + 1  # of step 1; of each quarantined one; their reasons


@pytest.mark.slow
def test_post_mortem_is_no_checkpoint_of_a_home(url: str):
    store = CheckpointStore(url, keep=1)
    save(store, 1)
    for _ in range(2):
        store.save(2, fragments(values(2) / 0), {"step": 2})
    store.sweep()
    assert loaded_step(CheckpointStore(url, keep=1)) == 1
    assert verify(f"{url}/step-00000002.post-mortem").not_finite == {"model/a": 1000}
    assert len(keys(url)) == 6


@pytest.mark.slow
def test_note_of_an_owner_is_created_once(url: str):
    one, other = (Note(Url(url) / "owner.json") for _ in range(2))
    assert (one.create("one"), other.create("other"), other.read()) == (True, False, "one")
