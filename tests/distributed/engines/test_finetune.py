"""Fine-tuning under every engine: a training of adapters and some weights moves from engine to engine.

Its losses are those of one process, and no frozen parameter ever changes a bit.
"""

from pathlib import Path
from typing import Any

import pytest

from pretrain.conformance.engines import load, save
from pretrain.distributed.world import World
from tests.distributed.parity import build, content, losses, newest
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(900)  # a chain serves all tests
FINETUNE: dict[str, Any] = {
    "freeze": ["*"],
    "train": ["*norm*"],
    "adapters": {"layers": ["*.query_key_value", "*.feed_forward"], "rank": 3},
}
Links = list[tuple[int, list[dict[str, Any]]]]
SOME: Links = [(2, [{"name": "zero3"}, {"name": "fsdp"}, {"name": "zero1"}]), (1, [{"name": "ddp"}])]
EVERY: Links = [
    *SOME,
    (2, [{"name": "ddp"}, {"name": "zero2"}]),
    (3, [{"name": "fsdp", "activation_checkpointing": "full"}, {"name": "zero3"}, {"name": "zero2"}]),
    (4, [{"name": "hsdp", "shards": 2}]),
]
"""Numbers of ranks, and engines that follow each other on so many."""
STEPS = 2
"""Steps of an engine."""
PRECISIONS = ("fp32", "bf16")


def train_links(world: World, engines: list[dict[str, Any]], first: int, folder: Path) -> list[float]:
    """Train with one engine after another, each from the checkpoint of the last; return the fp32 losses."""
    found = []
    for precision in PRECISIONS:
        for number, config in enumerate(engines, first):
            engine = build("transformer", world, finetune=FINETUNE, precision=precision, **config)
            own = folder / precision
            own.mkdir(parents=True, exist_ok=True)
            if number:
                load(engine, own / f"after-{number - 1}")
            else:
                save(engine, own / "first", 0, world)
            of_steps = losses(engine, range(number * STEPS, (number + 1) * STEPS), world)
            save(engine, own / f"after-{number}", number, world)
            found += of_steps if precision == "fp32" else []
    return found


@pytest.fixture(scope="module", params=[SOME, pytest.param(EVERY, marks=pytest.mark.long)], ids=["some", "every"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Return the fp32 losses of the chain, and the folder of its checkpoints."""
    folder, found, first = tmp_path_factory.mktemp("chain"), list[float](), 0
    for ranks, engines in request.param:
        found += on_ranks(ranks, train_links, engines, first, folder)[0]
        first += len(engines)
    return found, folder


def test_losses_of_fine_tuning_equal_those_of_one_process_whatever_the_engine(chain: tuple[list[float], Path]):
    found, _ = chain
    alone = losses(build("transformer", finetune=FINETUNE), range(len(found)))
    assert found == pytest.approx(alone, rel=1e-5)
    assert found[-1] < found[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoints_hold_frozen_weights_bit_for_bit_and_moments_of_trained_ones_alone(
    chain: tuple[list[float], Path], precision: str
):
    _, folder = chain
    own = folder / precision
    first = content(newest(own / "first"))
    later = [content(newest(own / f"after-{number}")) for number in range(len(list(own.glob("after-*"))))]
    trained = {name.partition("/")[2] for name in first if name.startswith("exp_avg/")}
    assert {name for name in trained if "adapter" not in name and "norm" not in name} == set()
    assert any("adapter_up" in name for name in trained)
    for each in later:
        assert each.keys() == first.keys()
        changed = {name.partition("/")[2] for name in each if each[name] != first[name]}
        assert changed == trained
