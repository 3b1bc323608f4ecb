"""A training that changes engine and number of ranks at each link equals that of one process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.conformance.engines import load, save
from pretrain.distributed.world import World
from pretrain.models import row_parts, small_config
from tests.distributed.parity import build, content, losses, newest
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(900)  # a chain serves all tests
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"name": "zero3"}),
    (3, {"name": "fsdp"}),
    (4, {"name": "zero1"}),
    (1, {"name": "ddp"}),
    (4, {"name": "hsdp", "shards": 2, "context": 2}),
    (3, {"name": "zero2"}),
    (2, {"name": "ddp"}),
]
"""Numbers of ranks and engines of the links; 3 divides neither the 4 micro-batches of a batch nor most parameters."""
SOME = {"fp32": ("transformer_xl",), "bf16": ("megabyte",)}
"""Families by precision in `make test`."""
EVERY = {"fp32": ("megabyte", "transformer_xl"), "bf16": ("megabyte", "transformer_xl")}
STEPS = {"fp32": 2, "bf16": 1}
"""Steps of a link."""

Families = Mapping[str, Sequence[str]]
Chain = tuple[Families, Path, list[list[dict[str, list[float]]]]]


def train_link(world: World, number: int, folder: Path, families: Families) -> dict[str, list[float]]:
    """Resume from the checkpoints of the previous link, save those of this one, and return fp32 losses by family.

    In bf16 the engine also saves what was loaded, before the first step.
    """
    fp32_losses = {}
    for precision, steps in STEPS.items():
        for family in families[precision]:
            config = {"context": 1} | CHAIN[number][1]
            if row_parts(small_config(family)) is None:
                config["context"] = 1
            engine = build(family, world, precision=precision, **config)
            own = folder / family / precision
            own.mkdir(parents=True, exist_ok=True)
            if number:
                load(engine, own / f"after-{number - 1}")
            if number and precision == "bf16":
                save(engine, own / f"loaded-{number}", number, world)
            step_losses = losses(engine, range(number * steps, (number + 1) * steps), world, config["context"])
            save(engine, own / f"after-{number}", number, world)
            if precision == "fp32":
                fp32_losses[family] = step_losses
    return fp32_losses


@pytest.fixture(scope="module", params=[SOME, pytest.param(EVERY, marks=pytest.mark.long)], ids=["some", "every"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Return the families, the folder of the chain's checkpoints, and the losses of each link on each rank."""
    folder = tmp_path_factory.mktemp("chain")
    links = [on_ranks(ranks, train_link, number, folder, request.param) for number, (ranks, _) in enumerate(CHAIN)]
    return request.param, folder, links


def test_every_loss_equals_that_of_one_process(chain: Chain):
    families, _, links = chain
    steps = STEPS["fp32"]
    for family in families["fp32"]:
        alone = losses(build(family), range(steps * len(CHAIN)))
        for number, rank_losses in enumerate(links):
            own = alone[number * steps : (number + 1) * steps]
            for link_losses in rank_losses:
                assert link_losses[family] == pytest.approx(own, rel=1e-5), CHAIN[number]


def test_bf16_masters_and_moments_move_between_engines_bit_for_bit(chain: Chain):
    families, folder, _ = chain
    for family in families["bf16"]:
        own = folder / family / "bf16"
        for number in range(1, len(CHAIN)):
            saved, loaded = (content(newest(own / name)) for name in (f"after-{number - 1}", f"loaded-{number}"))
            assert saved.keys() == loaded.keys()
            assert not [name for name in saved if saved[name] != loaded[name]], CHAIN[number]
