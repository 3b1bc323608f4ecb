"""A thousand ranks in one process: the large recipes are sharded and train, within budgets of communication."""

from functools import partial
from math import prod

import pytest

from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.engines import Upcoming
from pretrain.engines.diagnosis import layers_of
from pretrain.models import ByteModel
from tests.distributed.fake_world import Collectives, fake_engine, fake_world, micro_batches_of
from tests.test_project import ROOT

NODE = 8
"""Ranks of a node, within which HSDP shards."""
TWO_LAYERS = {
    "megabyte/pg19-best": ("model.global_model.layers=2", "model.local_model.layers=2"),
    "transformer/size-6.7b": ("model.layers=2",),
    "perceiver_ar/text-228m": ("model.latent_model.layers=2",),
    "transformer_xl/enwik8-24-layers": ("model.layers=2",),
}
"""The large recipe of each family, and the overrides that leave two blocks of each stack."""
EXCHANGES_OF_NUMBERS = 1
"""Exchanges of a few numbers of each rank in a step: its numbers, and what a rank knows of the next step."""
NUMBERS = 24
"""Most numbers that a rank exchanges in a step."""
VOTE = (0.0,) * 6
"""What a rank tells the others about its next batch."""


def recipe(name: str, engine: str, *overrides: str) -> Config:
    groups = (f"engine.shards={NODE}",) if engine == "hsdp" else ()
    sharding = (f"engine.name={engine}", "engine.device=cpu", "engine.precision=bf16", "train.micro_batch=1")
    return load(ROOT / f"configs/{name}.yaml", (*sharding, *groups, *overrides))


def collectives_of_a_step(
    config: Config, ranks: int, micro_batches: int = 1, *, diagnoses: bool = False
) -> tuple[Collectives, ByteModel]:
    """Return the collectives of the second step, which may measure norms by layer and gradient noise; and the model."""
    with fake_world(ranks) as world:
        engine = fake_engine(config, world, micro_batches=micro_batches)
        batch = micro_batches_of(config, world, micro_batches)
        for step in range(2):
            with Collectives() as collectives:
                result = engine.train_step(
                    batch,
                    step=step,
                    learning_rate=1e-4,
                    look_ahead=partial(Upcoming, batch, VOTE),
                    diagnose=diagnoses and step > 0,
                )
        assert result.is_updated
        assert bool(result.diagnosis) is diagnoses
        return collectives, engine.model


def padded_elements(model: ByteModel, shards: int) -> int:
    """Return the elements of all parameters, with the rows of each one padded to a multiple of the shards."""
    shapes = [parameter.shape for parameter in model.parameters()]
    return sum(-(-rows // shards) * shards * prod(rest) for rows, *rest in shapes)


def check_budgets(
    collectives: Collectives,
    model: ByteModel,
    engine: str,
    ranks: int,
    micro_batches: int = 1,
    numbers: int = NUMBERS,
) -> None:
    """Check what a step communicates.

    A pass gathers each block and the other parameters at most twice, in bf16. The last pass reduces each gradient once,
    in fp32. HSDP also sums each rank's share over the groups. FSDP2 pads the rows of a parameter.
    """
    groups = len(model.units()) + 1
    elements = padded_elements(model, NODE if engine == "hsdp" else ranks)
    gathers, sums = collectives.calls("_allgather_base_"), collectives.calls("_reduce_scatter_base_")
    assert gathers <= 2 * groups * micro_batches
    assert collectives.bytes("_allgather_base_") <= 2 * 2 * elements * micro_batches
    assert sums == groups
    assert collectives.bytes("_reduce_scatter_base_") <= 4 * elements
    between = collectives.calls("allreduce_")
    assert between == (groups if engine == "hsdp" else 0)
    assert collectives.bytes("allreduce_") <= 4 * elements / NODE
    assert len(collectives.of_numbers) == EXCHANGES_OF_NUMBERS
    assert max(each.bytes for each in collectives.of_numbers) <= 8 * numbers * ranks
    assert gathers + sums + between + EXCHANGES_OF_NUMBERS == len(collectives.all)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine", "ranks"),
    [
        *((name, "hsdp", 64) for name in TWO_LAYERS),
        ("megabyte/pg19-best", "fsdp", 8),
        ("megabyte/pg19-best", "hsdp", 1024),
        ("transformer/size-6.7b", "fsdp", 1024),
        ("perceiver_ar/text-228m", "fsdp", 64),
        ("transformer_xl/enwik8-24-layers", "fsdp", 64),
    ],
)
def test_step_of_many_ranks_stays_within_its_budgets(name: str, engine: str, ranks: int):
    config = recipe(name, engine, *TWO_LAYERS[name])
    check_budgets(*collectives_of_a_step(config, ranks), engine, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "hsdp"])
def test_gradients_are_summed_over_ranks_in_the_last_pass_only(engine: str):
    """Norms by layer and gradient noise add no collective: two numbers a layer, and three, come with the others."""
    config = recipe("megabyte/pg19-best", engine, *TWO_LAYERS["megabyte/pg19-best"])
    collectives, model = collectives_of_a_step(config, 64, micro_batches=3, diagnoses=True)
    numbers = NUMBERS + 2 * len(layers_of(model)) + 3
    check_budgets(collectives, model, engine, 64, micro_batches=3, numbers=numbers)


@pytest.mark.slow
def test_ranks_that_share_a_row_exchange_within_their_group_in_a_large_world():
    """Global attention goes around the ring of the group, and the local layers get the bytes before their patches."""
    name = "megabyte/pg19-best"
    config = recipe(name, "hsdp", "engine.context=8", "model.dropout=0.0", *TWO_LAYERS[name])
    collectives, model = collectives_of_a_step(config, 1024)
    layers = len(model.stacks()["global"])
    halos = collectives.of_context.pop("context_halo")
    assert collectives.of_context == {"ring_attention": layers, "ring_attention_backward": layers}
    assert halos == 2 * 2 * len(model.stacks()["local"])  # keys and values, forward and backward
    check_budgets(collectives, model, "hsdp", 1024)


@pytest.mark.long
@pytest.mark.parametrize(("engine", "ranks"), [("fsdp", 64), ("hsdp", 1024)])
@pytest.mark.parametrize("name", TWO_LAYERS)
def test_step_of_a_whole_large_model_stays_within_its_budgets(name: str, engine: str, ranks: int):
    check_budgets(*collectives_of_a_step(recipe(name, engine), ranks), engine, ranks)
