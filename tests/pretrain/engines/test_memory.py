"""Training with memory that a model carries from each row to the same row of the next batch."""

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


def make_engine(model: TransformerXL, micro_batch: int = ROWS, precision: str = "fp32") -> PyTorchEngine:
    config = EngineConfig(precision=precision, device="cpu")
    return PyTorchEngine(config, model, OptimizerConfig(), seed=3, global_batch=ROWS, micro_batch=micro_batch)


def lanes(length: int = SEGMENTS * T) -> np.ndarray:
    """Return rows that continue through several steps, with separators and a hole in them."""
    ids = np.random.default_rng(0).integers(0, 256, (ROWS, length)).astype(np.int16)
    ids[0, [3, T + 2]] = ids[1, T - 1] = ids[2, T] = SEPARATOR
    ids[3, T + 5 : T + 9] = PADDING
    return ids


def micro_batches(ids: np.ndarray, size: int = ROWS) -> list[MicroBatch]:
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    return [MicroBatch(index, rows_of(part), part != PADDING) for index, part in enumerate(parts)]


def train(engine: PyTorchEngine, ids: np.ndarray, size: int = ROWS, learning_rate: float = 0.0) -> list[float]:
    """Return the nats of every step over rows that continue."""
    return [
        engine.train_step(micro_batches(ids[:, start : start + T], size), step=step, learning_rate=learning_rate).nats
        for step, start in enumerate(range(0, ids.shape[1], T))
    ]


def memory_of(engine: PyTorchEngine) -> dict[str, torch.Tensor]:
    return {f.name: f.data.clone() for f in engine.fragments() if f.name.startswith("memory/")}


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, ROWS])
def test_steps_with_full_memory_equal_one_long_row(micro_batch: int):
    ids = lanes()
    long = model(sequence_length=SEGMENTS * T, memory_length=0)
    with torch.no_grad():
        nats = torch.where(torch.from_numpy(ids != PADDING), long(torch.from_numpy(ids)), 0.0).double()
    expected = [part.sum().item() for part in nats.split(T, 1)]
    assert train(make_engine(model(memory_length=SEGMENTS * T), micro_batch), ids, micro_batch) == pytest.approx(
        expected
    )
    assert train(make_engine(model(memory_length=0)), ids)[1:] != pytest.approx(expected[1:], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batch_size_does_not_change_losses(micro_batch: int):
    expected = train(make_engine(model()), lanes(), learning_rate=1e-3)
    actual = train(make_engine(model(), micro_batch), lanes(), micro_batch, learning_rate=1e-3)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_into_memory():
    engine = make_engine(model())
    train(engine, lanes())
    assert not any(
        tensor.requires_grad or tensor.grad_fn for tensor in [memory.data for memory in engine._memory_fragments()]
    )
    assert engine.model(torch.zeros(1, T, dtype=torch.long), engine.model.empty_memory(1))[1]["states"].grad_fn is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_saved_with_one_micro_batch_size_is_loaded_with_another(precision: str, tmp_path: Path):
    """An engine with other micro-batches reads the checkpoint."""
    ids = lanes()
    whole = make_engine(model(), precision=precision)
    expected = train(whole, ids)
    first, second = make_engine(model(), 2, precision), make_engine(model(), 5, precision)
    train(first, ids[:, : 2 * T], 2)
    read(verify(CheckpointStore(tmp_path, keep=1).save(2, first.owned_fragments(), {})), second.fragments())
    assert train(second, ids[:, 2 * T :]) == pytest.approx(expected[2:], rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.slow
def test_forget_starts_with_an_empty_memory():
    ids = lanes()
    engine = make_engine(model())
    first = train(engine, ids)
    engine.forget()
    assert train(engine, ids) == first
    assert train(engine, ids)[0] != first[0]


def test_validation_and_rehearsal_do_not_change_memory():
    engine = make_engine(model())
    train(engine, lanes())
    before = memory_of(engine)
    engine.nats(lanes()[:, :T])
    engine.rehearse(2)
    assert before.keys() == {"memory/states", "memory/ids"}
    for name, tensor in memory_of(engine).items():
        assert torch.equal(tensor, before[name])


def test_refused_step_does_not_change_memory():
    engine = make_engine(model())
    train(engine, lanes())
    before = memory_of(engine)
    with torch.no_grad():
        engine.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(engine, lanes())
    for name, tensor in memory_of(engine).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.slow
def test_epoch_equals_one_long_row_per_lane(mixed: Corpus):
    """Memory continues from batch to batch within an epoch, and not from one epoch to the next."""
    data = DataConfig(shards=mixed.location, lanes=ROWS)
    streams = open_streams(data, T)
    reading = Reading(data, streams, Record(), ROWS)
    order = streams["corpus"].order
    steps = order.sequences_per_lane
    engine = make_engine(model(memory_length=steps * T), micro_batch=2)
    long = model(sequence_length=steps * T, memory_length=0)
    nats, rows = list[float](), list[list[np.ndarray]]()  # of each range of steps in which memory goes on
    with Loader(reading.mixture, LoaderConfig(threads=1), global_batch=ROWS, micro_batch=2) as loader:
        batches = iter(loader)
        while reading.epochs()["corpus"] < 2:
            if not reading.goes_on:
                engine.forget()
                nats.append(0.0)
                rows.append([])
            batch = next(batches)
            rows[-1].append(np.concatenate([m.ids for m in batch.micro_batches]))
            nats[-1] += engine.train_step(batch.micro_batches, step=0, learning_rate=0.0).nats
            reading.advance(batch)
    assert sorted(map(len, rows))[-2] >= steps - 1
    for total, own in zip(nats, rows, strict=True):
        with torch.no_grad():
            expected = long(torch.from_numpy(np.concatenate(own, 1))).double().sum().item()
        assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["data.lanes=128"], r"data\.lanes \(128\) must equal train\.global_batch \(64\)"),
        (["train.global_batch=32"], r"data\.lanes \(64\) must equal train\.global_batch \(32\)"),
        (["data.packing=document"], "one corpus of concatenated documents"),
        (["data.shards=null", "data.mixture={a: {shards: x}, b: {shards: y}}"], "one corpus of concatenated documents"),
    ],
)
def test_stream_whose_rows_do_not_continue_is_refused(overrides: list[str], fault: str):
    recipe = ROOT / "configs/transformer_xl/debug.yaml"
    with pytest.raises(ConfigError, match=fault) as error:
        load(recipe, overrides)
    assert str(error.value).startswith(f"override {overrides[-1]}: model.memory_length")
    load(recipe, [*overrides, "model.memory_length=0"])


def test_rows_do_not_continue_after_a_change_of_batch_or_lanes(corpus_folder: Path):
    for lane_count, global_batch, goes_on in ((8, 8, True), (8, 4, False), (4, 8, False)):
        data = DataConfig(shards=str(corpus_folder / "train"), lanes=lane_count)
        record = Record(step=3, next_sequence=3 * global_batch)
        assert Reading(data, open_streams(data, T), record, global_batch).goes_on == goes_on
