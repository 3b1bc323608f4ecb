"""Training with what a model carries from each row to the same row of the next batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import Loader, LoaderConfig, MicroBatch
from data_pipeline.stream.reading import Reading, open_streams
from data_pipeline.stream.record import Record
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import CheckpointStore, read, verify
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.engines import EngineConfig, NonFiniteError
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.models.families.transformer_xl import TransformerXL, TransformerXLConfig
from pretrain.optim import OptimizerConfig
from tests.pretrain.models.rows import rows_of
from tests.test_project import ROOT

T, ROWS, SEGMENTS = 16, 5, 4


def model(sequence_length: int = T, memory_length: int = T, **changes: object) -> TransformerXL:
    torch.manual_seed(0)
    fields = {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "initial_std": 0.3}
    sizes = {"sequence_length": sequence_length, "memory_length": memory_length}
    return TransformerXL(TransformerXLConfig.model_validate({**fields, **sizes, **changes}))


def engine(of: TransformerXL, micro_batch: int = ROWS, precision: str = "fp32") -> PyTorchEngine:
    config = EngineConfig(precision=precision, device="cpu")
    return PyTorchEngine(config, of, OptimizerConfig(), seed=3, global_batch=ROWS, micro_batch=micro_batch)


def lanes(length: int = SEGMENTS * T) -> np.ndarray:
    """Rows that go on through several steps, with separators and a hole in them."""
    ids = np.random.default_rng(0).integers(0, 256, (ROWS, length)).astype(np.int16)
    ids[0, [3, T + 2]] = ids[1, T - 1] = ids[2, T] = SEPARATOR
    ids[3, T + 5 : T + 9] = PADDING
    return ids


def micro_batches(ids: np.ndarray, size: int = ROWS) -> list[MicroBatch]:
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    return [MicroBatch(index, rows_of(part), part != PADDING) for index, part in enumerate(parts)]


def train(it: PyTorchEngine, ids: np.ndarray, size: int = ROWS, learning_rate: float = 0.0) -> list[float]:
    """The nats of every step over rows that go on."""
    return [
        it.train_step(micro_batches(ids[:, start : start + T], size), step=step, learning_rate=learning_rate).nats
        for step, start in enumerate(range(0, ids.shape[1], T))
    ]


def memory_of(it: PyTorchEngine) -> dict[str, torch.Tensor]:
    return {f.name: f.data.clone() for f in it.fragments() if f.name.startswith("memory/")}


@pytest.mark.parametrize("micro_batch", [1, 2, ROWS])
def test_with_a_memory_of_all_before_steps_are_parts_of_one_long_row(micro_batch: int):
    ids = lanes()
    long = model(sequence_length=SEGMENTS * T, memory_length=0)
    with torch.no_grad():
        nats = torch.where(torch.from_numpy(ids != PADDING), long(torch.from_numpy(ids)), 0.0).double()
    expected = [part.sum().item() for part in nats.split(T, 1)]
    assert train(engine(model(memory_length=SEGMENTS * T), micro_batch), ids, micro_batch) == pytest.approx(expected)
    assert train(engine(model(memory_length=0)), ids)[1:] != pytest.approx(expected[1:], rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_size_of_micro_batches_changes_nothing(micro_batch: int):
    expected = train(engine(model()), lanes(), learning_rate=1e-3)
    got = train(engine(model(), micro_batch), lanes(), micro_batch, learning_rate=1e-3)
    assert got == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_into_a_memory_that_is_dropped_or_kept():
    it = engine(model())
    train(it, lanes())
    assert not any(
        tensor.requires_grad or tensor.grad_fn for tensor in [memory.data for memory in it._memory_fragments()]
    )
    assert it.model(torch.zeros(1, T, dtype=torch.long), it.model.empty_memory(1))[1]["states"].grad_fn is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_memory_that_is_saved_in_one_layout_goes_on_in_another(precision: str, tmp_path: Path):
    """A checkpoint of one engine is read by one with other micro-batches."""
    ids = lanes()
    whole = engine(model(), precision=precision)
    expected = train(whole, ids)
    first, then = engine(model(), 2, precision), engine(model(), 5, precision)
    train(first, ids[:, : 2 * T], 2)
    read(verify(CheckpointStore(tmp_path, keep=1).save(2, first.owned_fragments(), {})), then.fragments())
    assert train(then, ids[:, 2 * T :]) == pytest.approx(expected[2:], rel=1e-5 if precision == "fp32" else 1e-2)


def test_forgetting_begins_anew():
    ids = lanes()
    it = engine(model())
    first = train(it, ids)
    it.forget()
    assert train(it, ids) == first
    assert train(it, ids)[0] != first[0]


def test_validation_and_rehearsal_leave_memory_alone():
    it = engine(model())
    train(it, lanes())
    before = memory_of(it)
    it.nats(lanes()[:, :T])
    it.rehearse(2)
    assert before.keys() == {"memory/states", "memory/ids"}
    for name, tensor in memory_of(it).items():
        assert torch.equal(tensor, before[name])


def test_a_refused_step_leaves_memory_as_it_was():
    it = engine(model())
    train(it, lanes())
    before = memory_of(it)
    with torch.no_grad():
        it.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(it, lanes())
    for name, tensor in memory_of(it).items():
        assert torch.equal(tensor, before[name])


def test_an_epoch_is_as_many_long_rows_as_lanes(mixed: Corpus):
    """Over two epochs: within one, memory goes on from batch to batch; at its border, it does not."""
    data = DataConfig(shards=mixed.location, lanes=ROWS)
    streams = open_streams(data, T)
    reading = Reading(data, streams, Record(), ROWS)
    order = streams["corpus"].order
    steps = order.sequences_per_lane
    it = engine(model(memory_length=steps * T), micro_batch=2)
    long = model(sequence_length=steps * T, memory_length=0)
    with Loader(reading.mixture, LoaderConfig(threads=1), global_batch=ROWS, micro_batch=2) as loader:
        batches = iter(loader)
        for _ in range(2):
            nats, rows = 0.0, []
            for _ in range(steps):
                if not reading.goes_on:
                    it.forget()
                batch = next(batches)
                rows.append(np.concatenate([m.ids for m in batch.micro_batches]))
                nats += it.train_step(batch.micro_batches, step=0, learning_rate=0.0).nats
                reading.advance(batch)
            with torch.no_grad():
                expected = long(torch.from_numpy(np.concatenate(rows, 1))).double().sum().item()
            assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.lanes=128"], r"data\.lanes \(128\) must equal train\.global_batch \(64\)"),
        (["train.global_batch=32"], r"data\.lanes \(64\) must equal train\.global_batch \(32\)"),
        (["data.packing=document"], "one corpus of concatenated documents"),
        (["data.shards=null", "data.mixture={a: {shards: x}, b: {shards: y}}"], "one corpus of concatenated documents"),
    ],
)
def test_a_stream_whose_rows_do_not_go_on_is_refused(overrides: list[str], said: str):
    recipe = ROOT / "configs/transformer_xl/debug.yaml"
    with pytest.raises(ConfigError, match=said) as refused:
        load(recipe, overrides)
    assert str(refused.value).startswith(f"override {overrides[-1]}: model.memory_length")
    load(recipe, [*overrides, "model.memory_length=0"])


def test_of_another_number_of_lanes_no_row_goes_on(corpus_folder: Path):
    for lanes_, global_batch, goes_on in ((8, 8, True), (8, 4, False), (4, 8, False)):
        data = DataConfig(shards=str(corpus_folder / "train"), lanes=lanes_)
        record = Record(step=3, next_sequence=3 * global_batch)
        assert Reading(data, open_streams(data, T), record, global_batch).goes_on == goes_on
