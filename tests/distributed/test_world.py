"""What ranks tell each other, and what all of them do together, on real ranks."""

from typing import Any

import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.reading import DataConfig, Reading, Record, open_streams, replay
from data_pipeline.stream.record import merged
from pretrain.distributed.world import ALONE, World, WorldError
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.scores import Score
from tests.distributed.parity import T, build
from tests.distributed.ranks import on_ranks


def talk(world: World) -> dict[str, Any]:
    def fails() -> None:
        raise OSError("the disk is full")

    try:
        world.on_first(fails)
    except (OSError, WorldError) as error:
        fault = f"{type(error).__name__}: {error}"
    return {
        "sum": world.sum(world.rank, 2.0**50 + world.rank),
        "gathered": world.gather({"rank": world.rank, "text": "ä" * world.rank}),
        "of first": world.on_first(lambda: f"rank {world.rank}"),
        "fault": fault,
    }


def test_ranks_tell_each_other():
    told = on_ranks(3, talk)
    for rank, of_rank in enumerate(told):
        assert of_rank["sum"] == [3, 3 * 2**50 + 3]
        assert of_rank["gathered"] == [{"rank": r, "text": "ä" * r} for r in range(3)]
        assert of_rank["of first"] == "rank 0"
        assert of_rank["fault"] == ("WorldError: rank 0: " if rank else "OSError: ") + "the disk is full"


def test_alone_everything_is_ones_own():
    assert ALONE.sum(1, 2) == [1, 2]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.on_first(lambda: 5) == 5


def scores(world: World, corpus: str) -> list[int]:
    engine = build("megabyte", world, name="fsdp" if world.size > 1 else "ddp")
    score = evaluate(engine.nats, Corpus(corpus), T, 5, rank=world.rank, world_size=world.size).total
    return [score.units, score.bytes, score.documents]


def test_ranks_score_every_byte_once_between_them(mixed: Corpus):
    """Documents are few, so in the last round a rank has no windows of its own."""
    alone = Score(*scores(ALONE, mixed.location))
    total = Score()
    for of_rank in on_ranks(3, scores, mixed.location):
        total.add(Score(*of_rank))
    assert (total.bytes, total.documents) == (alone.bytes, alone.documents) == (mixed.raw_bytes, 8)
    assert total.nats == pytest.approx(alone.nats, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_merged_record_is_that_of_one_process(corpus: Corpus, ranks: int):
    """Also where the ranks go on from a record, and replaying it reads the same bytes."""
    config = DataConfig(shards=corpus.location, lanes=4)
    state = None
    for _ in range(2):
        states = []
        for rank in range(ranks):
            record = Record.from_state(state) if state else Record()
            if rank:
                record.digest = Record().digest
            reading = Reading(config, open_streams(config, 64), record, 7)
            with Loader(
                reading.mixture,
                LoaderConfig(threads=1),
                global_batch=7,
                micro_batch=2,
                first_sequence=reading.record.next_sequence,
                rank=rank,
                world_size=ranks,
                digest=True,
            ) as loader:
                for batch, _ in zip(loader, range(3), strict=False):
                    reading.advance(batch)
            states.append(reading.state())
        state = merged(states)
    assert state is not None and state["step"] == 6
    again = Reading(config, open_streams(config, 64), Record.from_state(state), None)
    assert replay(again, 1, lambda done: None) == state["digest"]


def test_holes_are_merged_by_their_first_sequence():
    states = [
        {"digest": "0", "holes": {"a": [(1, 30), (4, 9)]}},
        {"digest": "0", "holes": {"a": [(1, 20)], "b": [(2, 5)]}},
    ]
    assert merged(states)["holes"] == {"a": [(1, 20), (4, 9)], "b": [(2, 5)]}
