"""Communication between real ranks, and work that all ranks do together."""

from functools import partial
from typing import Any

import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.reading import DataConfig, Reading, Record, open_streams, replay
from data_pipeline.stream.record import merged
from pretrain.distributed.world import ALONE, World, WorldError
from pretrain.evaluation.evaluate import evaluate, share_of_rank
from pretrain.evaluation.scores import Score
from tests.distributed.parity import T, build
from tests.distributed.ranks import on_ranks


def exchange(world: World) -> dict[str, Any]:
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


def test_ranks_exchange_sums_values_and_faults():
    results = on_ranks(3, exchange)
    for rank, result in enumerate(results):
        assert result["sum"] == [3, 3 * 2**50 + 3]
        assert result["gathered"] == [{"rank": r, "text": "ä" * r} for r in range(3)]
        assert result["of first"] == "rank 0"
        assert result["fault"] == ("WorldError: rank 0: " if rank else "OSError: ") + "the disk is full"


def test_one_process_exchanges_only_with_itself():
    assert ALONE.sum(1, 2) == [1, 2]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.on_first(lambda: 5) == 5


def scores(world: World, corpus: str, context: int = 1) -> list[int]:
    engine = build("megabyte", world, name="fsdp" if world.size > 1 else "ddp", context=context)
    share = partial(share_of_rank, rank=world.rank, world_size=world.size, context=context)
    score = evaluate(engine.nats, Corpus(corpus), T, 5, share=share).total
    return [score.units, score.bytes, score.documents]


@pytest.mark.parametrize(("ranks", "context"), [(3, 1), (4, 2)])
def test_ranks_together_score_every_byte_once(mixed: Corpus, ranks: int, context: int):
    """There are few documents, so one rank has no windows in the last round."""
    alone = Score(*scores(ALONE, mixed.location))
    total = Score()
    for rank_scores in on_ranks(ranks, scores, mixed.location, context):
        total.add(Score(*rank_scores))
    assert (total.bytes, total.documents) == (alone.bytes, alone.documents) == (mixed.raw_bytes, 8)
    assert total.nats == pytest.approx(alone.nats, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_merged_record_equals_that_of_one_process(corpus: Corpus, ranks: int):
    """This holds also after a resume from a record, and a replay of the record reads the same bytes."""
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
    replayed = Reading(config, open_streams(config, 64), Record.from_state(state), None)
    assert replay(replayed, 1, lambda done: None) == state["digest"]
