"""Laws of a model under engines: each engine trains equally from the same first values, and reads every checkpoint.

one process:  6 steps, a checkpoint after 3 ──▶ its losses are what every engine must reach
each engine, 2 ranks:  6 steps, a checkpoint after 3 ──▶ one process does the last 3 from it
                       the last 3 from one process's checkpoint
"""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from data_pipeline.vocabulary import SEPARATOR
from launchers.processes import free_port, rank_environment
from pretrain.checkpoint import CheckpointStore, read, read_metadata
from pretrain.conformance.subject import SEED, Law, Subject, require
from pretrain.distributed.fragments import MODEL, split_name
from pretrain.distributed.world import ALONE, World
from pretrain.engines import Engine, EngineConfig, build_engine
from pretrain.models import build_model
from pretrain.objectives import show_rows
from pretrain.optim import OptimizerConfig

ROWS, MICRO_BATCH, STEPS, SAVED = 7, 2, 6, 3
"""Rows of a global batch (four micro-batches, the last of one row), its steps, and those before the checkpoint."""
RANKS = 2
LEARNING_RATE = 1e-4
RELATIVE_TOLERANCE = 1e-5
"""Relative, of losses: what a sum in another order changes."""
SECONDS = 600.0
"""Deadline of the ranks of one law."""
CHECKED_ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])  # ranks are forks of one process that has imported torch and this module


@dataclass(frozen=True)
class Training:
    """Result of the training under one engine."""

    losses: list[float]
    """Nats per target byte of each step."""
    first_values: dict[str, list[tuple[int, bytes]]]
    """The ranges of parameters that a rank owned before the first step, by name: start and bits."""
    resumed: list[float]
    """Losses after the checkpoint of one process."""


def check_activation_checkpointing(subject: Subject, folder: Path) -> None:
    """Check that activation checkpointing changes no bit of losses, parameters and moments."""
    trained = {mode: trained_alone(subject, mode) for mode in ("none", "full", "selective")}
    for mode in ("full", "selective"):
        require(trained[mode] == trained["none"], f"activation checkpointing of mode {mode} changes the training")


def check_engine(subject: Subject, folder: Path, *, engine: str) -> None:
    """Check that two ranks have one process's first values and losses, and each resumes the other's checkpoint."""
    alone = build(subject)
    first_values = {f.name: f.data.numpy().tobytes() for f in alone.fragments() if is_parameter(f.name)}
    losses = train(alone, subject, range(SAVED))
    save(alone, folder / "alone", SAVED)
    losses += train(alone, subject, range(SAVED, STEPS))
    for rank, training in enumerate(on_ranks(RANKS, subject, engine, folder)):
        for name, ranges in training.first_values.items():
            for start, bits in ranges:
                same = first_values[name][4 * start : 4 * start + len(bits)] == bits
                require(same, f"first values of {name} on rank {rank} are not those of one process")
        compare(training.losses, losses, f"losses on rank {rank}")
        compare(training.resumed, losses[SAVED:], f"losses on rank {rank} after one process's checkpoint")
    resumed = load(build(subject), folder / engine)
    compare(
        train(resumed, subject, range(SAVED, STEPS)),
        losses[SAVED:],
        f"losses of one process after {engine}'s checkpoint",
    )


def is_parameter(name: str) -> bool:
    """Return whether a fragment is of a parameter, and not of a moment or a memory."""
    return split_name(name)[0] == MODEL


def compare(values: Sequence[float], expected: Sequence[float], what: str) -> None:
    """Require that losses agree up to rounding."""
    same = np.allclose(values, expected, rtol=RELATIVE_TOLERANCE, atol=0)
    require(same, f"{what} are {list(values)}, not {list(expected)}")


def train_on_rank(world: World, subject: Subject, engine: str, folder: Path) -> Training:
    """Train one rank's share from first values, then again from the checkpoint of one process."""
    trained = build(subject, world, name=engine)
    first_values: dict[str, list[tuple[int, bytes]]] = {}
    for fragment in trained.fragments():
        if is_parameter(fragment.name):
            first_values.setdefault(fragment.name, []).append((fragment.start, fragment.data.numpy().tobytes()))
    losses = train(trained, subject, range(SAVED), world)
    save(trained, folder / engine, SAVED, world)
    losses += train(trained, subject, range(SAVED, STEPS), world)
    resumed = load(build(subject, world, name=engine), folder / "alone")
    return Training(losses, first_values, train(resumed, subject, range(SAVED, STEPS), world))


def trained_alone(subject: Subject, mode: str) -> tuple[list[float], bytes]:
    """Return the losses of one process under a mode of activation checkpointing, and all bits of its state."""
    engine = build(subject, activation_checkpointing=mode)
    losses = train(engine, subject, range(SAVED))
    return losses, b"".join(fragment.data.numpy().tobytes() for fragment in engine.fragments())


def build(subject: Subject, world: World = ALONE, **fields: Any) -> Engine:
    """Return an engine with the first values in it."""
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32"} | fields)
    with torch.device("meta"):
        model = build_model(subject.config)
    sizes = {"global_batch": ROWS, "micro_batch": MICRO_BATCH}
    engine = build_engine(config, model, OptimizerConfig(), SEED, world, **sizes)
    engine.begin()
    return engine


def train(engine: Engine, subject: Subject, steps: range, world: World = ALONE) -> list[float]:
    """Return the loss of each step, in nats per target byte."""
    losses = []
    for step in steps:
        ids = subject.ids(ROWS, seed=step).numpy()
        row_bytes = np.where(ids < SEPARATOR, ids, 0).astype(np.uint8)
        parts = [slice(first, first + MICRO_BATCH) for first in range(0, ROWS, MICRO_BATCH)]
        show = show_rows(subject.objective, subject.form, SEED)
        batch = []
        for index, part in enumerate(parts):
            rows = Rows(row_bytes[part], np.flatnonzero(ids[part] == SEPARATOR), None)
            example = None if show is None else show(rows, step * ROWS + np.arange(ROWS)[part])
            targets = np.ones(ids[part].shape, bool) if example is None else example.targets
            batch.append(MicroBatch(index, rows, targets, example=example))
        result = engine.train_step(batch[world.rank :: world.size], step=step, learning_rate=LEARNING_RATE)
        losses.append(result.nats / result.target_bytes)
    return losses


def save(engine: Engine, folder: Path, step: int, world: World = ALONE) -> None:
    """Write a checkpoint."""
    CheckpointStore(folder, keep=1, world=world).save(step, engine.owned_fragments(), {"counters": engine.counters()})


def load(engine: Engine, folder: Path) -> Engine:
    """Read the newest checkpoint of a folder into an engine."""
    metadata = read_metadata(CheckpointStore(folder, keep=1).committed()[-1])
    read(metadata, engine.fragments())
    engine.restore(metadata.state["counters"])
    return engine


def on_ranks(size: int, *arguments: Any) -> list[Training]:
    """Return what `train_on_rank` returns on each of several new processes.

    Raises:
        RuntimeError: a rank failed or did not answer before the deadline.
    """
    answers, port = CONTEXT.Queue(), free_port()
    ranks = [
        CONTEXT.Process(
            target=_answer, daemon=True, args=(answers, rank, rank_environment(rank, size, port), arguments)
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        trainings: dict[int, Training] = {}
        while len(trainings) < size:
            rank, answer = answers.get(timeout=SECONDS)
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank} failed:\n{answer}")
            trainings[rank] = answer
    except queue.Empty:
        raise RuntimeError(f"ranks did not answer in {SECONDS:.0f} s") from None
    finally:
        for process in ranks:
            process.join(10 if len(trainings) == size else 0)
            process.kill()
    return [trainings[rank] for rank in range(size)]


def _answer(answers: Any, rank: int, environment: Mapping[str, str], arguments: Sequence[Any]) -> None:
    """Train as one rank and put the result, or the traceback, into the queue."""
    os.environ.update({**environment, "DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    try:
        world = World.join(torch.device("cpu"))
        answer: Training | str = train_on_rank(world, *arguments)
        world.leave()
    except Exception:
        answer = traceback.format_exc()
    answers.put((rank, answer))


ENGINE_LAWS = (
    Law.of(check_activation_checkpointing),
    *(Law.of(partial(check_engine, engine=engine), engine) for engine in CHECKED_ENGINES),
)
