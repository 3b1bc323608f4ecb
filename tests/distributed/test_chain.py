"""A training that moves through every engine, on other numbers of ranks each time, is that of one process."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.conformance.engines import load, save
from pretrain.distributed.world import World
from tests.distributed.parity import build, content, losses, newest
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(900)  # a chain serves all tests
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"name": "zero3"}),
    (3, {"name": "fsdp"}),
    (4, {"name": "zero1"}),
    (1, {"name": "ddp"}),
    (4, {"name": "hsdp", "shards": 2}),
    (3, {"name": "zero2"}),
    (2, {"name": "ddp"}),
]
"""Numbers of ranks and engines of the links; 3 divides neither the 4 micro-batches of a batch nor most parameters."""
FAMILIES = ("megabyte", "perceiver_ar", "transformer_xl")
STEPS = 4
"""Of a link."""
STEPS_IN_BF16 = 2


def train_link(world: World, number: int, folder: Path) -> dict[str, list[float]]:
    """Goes on from the checkpoints of the link before, and leaves those of this one; fp32 losses by family.

    In bf16 there is a third one: of what was loaded, before any step.
    """
    told = {}
    for family in FAMILIES:
        for precision, steps in (("fp32", STEPS), ("bf16", STEPS_IN_BF16)):
            it = build(family, world, precision=precision, **CHAIN[number][1])
            own = folder / family / precision
            if number:
                load(it, own / f"after-{number - 1}")
            if number and precision == "bf16":
                save(it, own / f"loaded-{number}", number, world)
            of_steps = losses(it, range(number * steps, (number + 1) * steps), world)
            save(it, own / f"after-{number}", number, world)
            if precision == "fp32":
                told[family] = of_steps
    return told


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, list[float]]]]]:
    """The folder of its checkpoints, and of each link what each rank told."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, [on_ranks(ranks, train_link, number, folder) for number, (ranks, _) in enumerate(CHAIN)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_is_that_of_one_process(chain: tuple[Path, list[list[dict[str, list[float]]]]], family: str):
    alone = losses(build(family), range(STEPS * len(CHAIN)))
    for number, of_ranks in enumerate(chain[1]):
        for told in of_ranks:
            own = alone[number * STEPS : (number + 1) * STEPS]
            assert told[family] == pytest.approx(own, rel=1e-5), CHAIN[number]


@pytest.mark.parametrize("family", FAMILIES)
def test_masters_and_moments_of_bf16_go_from_engine_to_engine_bit_for_bit(
    chain: tuple[Path, list[list[dict[str, list[float]]]]], family: str
):
    folder = chain[0] / family / "bf16"
    for number in range(1, len(CHAIN)):
        given, taken = (content(newest(folder / name)) for name in (f"after-{number - 1}", f"loaded-{number}"))
        assert given.keys() == taken.keys()
        assert not [name for name in given if given[name] != taken[name]], CHAIN[number]
