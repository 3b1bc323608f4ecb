"""Callbacks and trackers registered by another package: each is a class and a config node."""

import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from byteloom.core.registries.registry import RegistryError
from byteloom.core.retries import RetryPolicy
from pretrain.cli.app import app
from pretrain.config.errors import ConfigError
from pretrain.config.explanation import explain
from pretrain.config.loading import load
from pretrain.config.schema import Config, recipe_schema
from pretrain.distributed.world import World
from pretrain.tracking import (
    Journal,
    RunDescription,
    Tracker,
    TrackingConfig,
    open_recorder,
    outbox,
    register_tracker,
)
from pretrain.tracking.base import TRACKERS
from pretrain.training.callbacks import CALLBACKS, Callback, register_callback
from pretrain.training.loop import train
from pretrain.training.run import TrainingRun
from tests.conftest import recipe_tree
from tests.distributed.ranks import on_ranks

STEPS = 4


class WeightNormConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Norm of all weights."""

    every: int = Field(default=1, ge=1)
    """Steps between two measurements."""


class WeightNorm(Callback):
    """Callback that measures the norm of all weights, and records its events."""

    events: list[str]

    def __init__(self, config: WeightNormConfig) -> None:
        self.every = config.every
        type(self).events = []

    def on_start(self, run: TrainingRun) -> None:
        self.events.append(f"start after {run.step}")

    def before_step(self, run: TrainingRun) -> None:
        self.events.append("before")

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        assert "train/bits_per_byte" in numbers and "weight_norm/l2" not in numbers
        self.events.append(f"after {run.step}")

    def measure(self, run: TrainingRun) -> dict[str, float]:
        if run.step % self.every:
            return {}
        own = [f.data.square().sum().item() for f in run.engine.owned_fragments() if f.name.startswith("model/")]
        return {"l2": math.sqrt(run.world.sum(sum(own))[0])}

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        with pytest.raises(TypeError):
            numbers["train/bits_per_byte"] = 0.0  # type: ignore[index]
        self.events.append(f"numbers of {run.step}")

    def on_stop(self, run: TrainingRun) -> None:
        self.events.append("stop")

    def on_end(self, run: TrainingRun, status: str) -> None:
        self.events.append(status)


class LinesConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Config of a file of losses."""

    file: str = "lines.json"
    """Name of the file in the run folder."""
    fails_at: int | None = None
    """Step whose numbers the tracker refuses."""


class Lines(Tracker):
    """Tracker that writes the losses to a file when it is closed."""

    def __init__(self, config: LinesConfig, run: RunDescription) -> None:
        self.thread = threading.current_thread().name
        self.config = config
        self.path = run.folder / config.file
        self.losses: dict[int, float] = {}

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        if step == self.config.fails_at:
            raise OSError("no space left")
        self.losses[step] = numbers["train/bits_per_byte"]

    def close(self, status: str) -> None:
        self.path.write_text(json.dumps({"status": status, "losses": self.losses, "thread": self.thread}))


@pytest.fixture
def registered() -> Iterator[None]:
    """Register the callback and the tracker above for one test."""
    register_callback("weight_norm", WeightNormConfig)(WeightNorm)
    register_tracker("lines", LinesConfig)(Lines)
    yield
    CALLBACKS.remove("weight_norm")
    TRACKERS.remove("lines")


@pytest.fixture
def recipe(registered: None, tmp_path: Path, corpus_folder: Path) -> Path:
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "plain", "root": str(tmp_path)}
    tree["validation"] = {}
    tree["train"] = {"steps": STEPS, "global_batch": 6, "micro_batch": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def numbers_of(config: Config) -> list[dict[str, float]]:
    assert train(config) == 0
    lines = (Path(config.run.root) / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_callback_and_tracker_observe_a_run_and_change_no_loss(recipe: Path):
    observers = ["run.name=observed", "callbacks.weight_norm.every=2", "tracking.trackers.lines={}"]
    observed, plain = numbers_of(load(recipe, observers)), numbers_of(load(recipe))
    assert observed[0].keys() == {"step", "time", "weight_norm/l2"} and observed[0]["step"] == 0
    assert json.loads((recipe.parent / "observed/lines.json").read_text())["thread"] == "tracker lines"
    losses = {line["step"]: line["train/bits_per_byte"] for line in observed[1:]}
    assert losses == {line["step"]: line["train/bits_per_byte"] for line in plain}
    assert [line["step"] for line in observed if "weight_norm/l2" in line] == [0, 2, 4]
    steps = [event for step in range(1, STEPS + 1) for event in ("before", f"after {step}", f"numbers of {step}")]
    assert WeightNorm.events == ["start after 0", "numbers of 0", *steps, "stop", "FINISHED"]


@pytest.mark.slow
def test_what_a_failing_tracker_missed_is_delivered_later(
    recipe: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outbox, "FINAL_POLICY", RetryPolicy(1, 0.0, 30.0))
    config = load(recipe, ["tracking.enabled=false", "tracking.trackers.lines={fails_at: 2}"])
    losses = {str(line["step"]): line["train/bits_per_byte"] for line in numbers_of(config)}
    run = Path(config.run.root) / "plain"
    journal = run / "metrics.jsonl"
    messages = [record.message for record in caplog.records if "tracker lines" in record.message]
    assert messages == [
        f"tracker lines: no space left. Training continues; the numbers are safe in {journal}",
        f"{STEPS} steps did not reach tracker lines; they are safe in {journal}, and `byteloom track {run}` sends them",
    ]
    assert json.loads((run / "lines.json").read_text())["status"] == "RUNNING"
    state = json.loads((run / "trackers/lines.json").read_text())
    state["config"]["fails_at"] = None  # the disk has space again
    (run / "trackers/lines.json").write_text(json.dumps(state))
    done = CliRunner().invoke(app, ["track", str(run)])
    assert done.exit_code == 0, done.output
    written = json.loads((run / "lines.json").read_text())
    assert (written["status"], written["losses"]) == ("FINISHED", losses)


def test_damaged_samples_keep_no_number_from_a_tracker(
    registered: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "samples/step-00000001").mkdir(parents=True)
    (tmp_path / "samples/step-00000001/samples.json").write_text("{")
    config = TrackingConfig(enabled=False, trackers={"lines": {}})
    description = RunDescription("run", "abc", {}, {}, -1, 1, "manual", tmp_path)
    recorder = open_recorder(config, Journal(tmp_path / "metrics.jsonl", None), description)
    for step in (1, 2):
        recorder.log(step, {"train/bits_per_byte": 8.0 / step})
    recorder.close("FINISHED")
    written = json.loads((tmp_path / "lines.json").read_text())
    assert (written["status"], written["losses"]) == ("FINISHED", {"1": 8.0, "2": 4.0})
    [message] = caplog.messages
    assert message.startswith(f"tracker lines does not get samples: {tmp_path}/samples/step-00000001/samples.json is")


class StopOnOneRank(WeightNorm):
    """Callback that requests a stop after step 2, only on rank 1."""

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        super().after_step(run, numbers)
        if run.step == 2 and run.world.rank == 1:
            run.stop.request(signal.SIGTERM)


def train_until_stopped(world: World, recipe: Path) -> tuple[int, list[str]]:
    register_callback("weight_norm", WeightNormConfig)(StopOnOneRank)
    code = train(load(recipe, ["callbacks.weight_norm={}"]), world)
    return code, StopOnOneRank.events


@pytest.mark.slow
def test_all_ranks_call_all_events_and_stop_together_when_one_requests_it(recipe: Path):
    """The request comes after the ranks have voted on step 3, so they stop after it."""
    results = on_ranks(2, train_until_stopped, recipe)
    steps = [event for step in (1, 2, 3) for event in ("before", f"after {step}", f"numbers of {step}")]
    events = ["start after 0", "numbers of 0", *steps, "before", "stop", "KILLED"]
    assert results == [(128 + signal.SIGTERM, events)] * 2
    lines = (recipe.parent / "plain/metrics.jsonl").read_text().splitlines()
    assert [(line["step"], line["weight_norm/l2"] > 0) for line in map(json.loads, lines)] == [
        (0, True),
        (1, True),
        (2, True),
        (3, True),
    ]
    assert (recipe.parent / "plain/checkpoints/step-00000003").exists()


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "callbacks.weigth_norm={}",
            "callbacks.weigth_norm: weigth_norm is not the name of a callback (did you mean weight_norm?)",
        ),
        (
            "callbacks.weight_norm.evry=2",
            "callbacks.weight_norm.evry is not a field of WeightNormConfig (did you mean every?)",
        ),
        ("callbacks.weight_norm.every=0", "callbacks.weight_norm.every is 0; it must be at least 1"),
        ("callbacks.weight_norm=null", "callbacks.weight_norm is null; it must be a section, such as {every: …}"),
        (
            "tracking.trackers.linse={}",
            "tracking.trackers.linse: linse is not the name of a tracker (did you mean lines?)",
        ),
    ],
)
def test_wrong_name_or_field_is_refused_with_the_nearest_name(recipe: Path, override: str, fault: str):
    with pytest.raises(ConfigError) as raised:
        load(recipe, [override])
    assert str(raised.value) == f"override {override}: {fault}"


@pytest.mark.slow
def test_recipe_with_callbacks_is_read_back_and_fits_the_schema(recipe: Path, tmp_path: Path):
    config = load(recipe, ["callbacks.weight_norm.every=3"])
    assert config.as_tree()["callbacks"] == {"weight_norm": {"every": 3}}
    (tmp_path / "again.yaml").write_text(config.as_yaml())
    assert load(tmp_path / "again.yaml") == config
    schema = recipe_schema()
    jsonschema.validate(config.as_tree(), schema)
    for wrong in ({"weight_norm": {"evry": 3}}, {"other": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config.as_tree() | {"callbacks": wrong}, schema)


def test_fields_of_a_callback_are_explained(registered: None):
    assert "callbacks.weight_norm.every: int, default 1, at least 1" in explain("callbacks")
    assert "Steps between two measurements." in explain("callbacks.weight_norm.every")
    assert explain("callbacks.weight_norm").startswith("callbacks.weight_norm: Norm of all weights.")


def test_second_callback_of_a_name_is_refused(registered: None):
    with pytest.raises(RegistryError, match="the callback weight_norm is registered twice"):
        register_callback("weight_norm", WeightNormConfig)(WeightNorm)
    with pytest.raises(RegistryError, match="every run has a callback named validation"):
        register_callback("validation", WeightNormConfig)(WeightNorm)


ENTRY_POINT_MODULE = """
from pydantic import BaseModel

from pretrain.training.callbacks import Callback, register_callback


class QuietConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    volume: int = 0


@register_callback("quiet", QuietConfig)
class Quiet(Callback):
    def __init__(self, config: QuietConfig) -> None:
        pass
"""


def test_callback_of_an_installed_package_is_found_by_its_entry_point(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    site = tmp_path / "site"
    (site / "quiet-1.dist-info").mkdir(parents=True)
    (site / "quiet_callback.py").write_text(ENTRY_POINT_MODULE)
    (site / "quiet-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: quiet\nVersion: 1\n")
    (site / "quiet-1.dist-info/entry_points.txt").write_text(
        "[byteloom.callbacks]\nquiet = quiet_callback\nbroken = there_is_no_such_module\n"
    )
    monkeypatch.syspath_prepend(site)
    assert load(recipe, ["callbacks.quiet.volume=3"]).as_tree()["callbacks"] == {"quiet": {"volume": 3}}
    with pytest.raises(
        ConfigError, match=r"the entry point broken = there_is_no_such_module of quiet .* cannot be imp"
    ):
        load(recipe, ["callbacks.broken={}"])
    assert "callbacks.quiet.volume: int, default 0" in explain("callbacks")
    assert "the entry point broken = there_is_no_such_module of quiet" in caplog.text
    CALLBACKS.remove("quiet")
