"""Learned patches, and H-Net over them: the router, the smoothing, the ratio loss, and nested stages."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models import build_model, model_config, small_config
from pretrain.models.blocks.layout import additions, kinds_of
from pretrain.models.families.hnet import HNet, HNetConfig, Stage
from pretrain.models.patching.multi_linear import MultiLinear
from pretrain.models.patching.patcher import Patches
from pretrain.models.patching.ratio import ratio_loss
from pretrain.models.patching.router import SHARPEST, LearnedConfig, Router, smooth
from pretrain.optim import OptimizerConfig
from pretrain.optim.groups import parameter_rules
from pretrain.optim.scaling import base_config, scale_model

LEARNED = {"name": "learned", "size": 2.0}
OUTER = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "T1", "window": 8, "patcher": LEARNED, "patches": 24}
INNER = OUTER | {"encoder": "t1", "decoder": "m1", "window": None, "patches": 9}
TWO: dict[str, Any] = {"stages": [OUTER, INNER]}


def hnet(noise: float = 0.3, **changes: Any) -> HNet:
    """Return a small model in fp64 whose zeros among first values hide no fault."""
    torch.manual_seed(0)
    model = build_model(small_config("hnet", **changes))
    assert isinstance(model, HNet)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=noise)
    return model.double().eval()


@contextmanager
def seen_patches(model: HNet) -> Iterator[list[Patches]]:
    """Yield a list to which each stage appends its patches, the outermost first."""
    found: list[Patches] = []
    hooks = [
        stage.get_submodule("patcher").register_forward_hook(lambda *each: found.append(each[2]))
        for stage in model.stages
    ]
    yield found
    for hook in hooks:
        hook.remove()


def patches_of(model: HNet, ids: Tensor) -> list[Patches]:
    with seen_patches(model) as found, torch.no_grad():
        model(ids)
    return found


def random_ids(rows: int = 3, length: int = 32) -> Tensor:
    return torch.randint(0, SEPARATOR + 1, (rows, length), generator=torch.Generator().manual_seed(1))


def router(width: int = 6, capacity: int = 99, **fields: Any) -> Router:
    made = Router(capacity, width, LearnedConfig(size=4.0, **fields)).double()
    with torch.no_grad():
        made.query.weight.copy_(torch.eye(width))
        made.key.weight.copy_(torch.eye(width))
    return made


def reading(rows: int, length: int) -> Tensor:
    """Return what positions of rows read: the start, then bytes."""
    return F.pad(torch.full((rows, length - 1), ord("a")), (1, 0), value=SEPARATOR)


def test_probability_of_a_start_is_the_distance_of_neighbouring_states():
    state = torch.randn(6).double()
    hidden = torch.stack([state, state, -state, torch.randn(6).double()])[None]
    found = router()(reading(1, 4), None, hidden)
    cosine = F.cosine_similarity(hidden[0, 2], hidden[0, 3], 0)
    expected = torch.stack([torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), (1 - cosine) / 2])
    torch.testing.assert_close(found.probabilities[0], expected.double())
    assert found.starts[0].tolist() == [True, False, True, bool(cosine < 0)]


def test_separators_start_patches_for_certain_and_padding_starts_none():
    read = reading(1, 6)
    read[0, 2], read[0, 4:] = SEPARATOR, PADDING
    found = router()(read, None, torch.randn(1, 6, 6).double())
    assert found.probabilities[0, [0, 2]].tolist() == [1.0, 1.0]
    assert found.starts[0, [0, 2, 4, 5]].tolist() == [True, True, False, False]


def test_untrained_routers_start_a_patch_at_half_of_unrelated_states():
    """Half of one minus the cosine has mean 1/2 and deviation 1 / (2 sqrt(width))."""
    width = 64
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 500, width, generator=generator, dtype=torch.float64)
    found = router(width, 500)(reading(4, 500), None, hidden)
    probabilities = found.probabilities[:, 1:]
    assert probabilities.mean().item() == pytest.approx(0.5, abs=0.01)
    assert probabilities.std().item() == pytest.approx(1 / (2 * math.sqrt(width)), rel=0.1)
    assert found.starts.double().mean().item() == pytest.approx(0.5, abs=0.05)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_smoothing_is_its_recurrence(length: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    probabilities = torch.rand(2, length, generator=generator, dtype=torch.float64)
    done = smooth(values, probabilities)
    average = torch.zeros(2, 3).double()
    for place in range(length):
        weight = probabilities[:, place, None].clamp(SHARPEST, 1 - SHARPEST)
        average = weight * values[:, place] + (1 - weight) * average
        torch.testing.assert_close(done[:, place], average)
    cut = length // 2
    if cut:  # a decoder's two calls
        rest = smooth(values[:, cut:], probabilities[:, cut:], done[:, cut - 1])
        torch.testing.assert_close(rest, done[:, cut:])


def test_certain_patches_are_not_smoothed_and_constants_stay():
    values = torch.randn(1, 20, 4, dtype=torch.float64)
    done = smooth(values, torch.ones(1, 20).double())
    torch.testing.assert_close(done[:, 0], (1 - SHARPEST) * values[:, 0])
    steps = (done[:, :-1] - values[:, 1:]).norm(dim=-1)
    assert ((done - values)[:, 1:].norm(dim=-1) <= SHARPEST * steps + 1e-12).all()
    probabilities = torch.rand(1, 20, dtype=torch.float64)
    kept = 1 - (1 - probabilities.clamp(SHARPEST, 1 - SHARPEST)).cumprod(1)
    torch.testing.assert_close(smooth(torch.ones(1, 20, 1).double(), probabilities)[..., 0], kept)


def test_gradient_of_smoothing_is_that_of_finite_differences():
    values = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    probabilities = (0.1 + 0.8 * torch.rand(2, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(smooth, (values, probabilities))


@given(st.floats(1.1, 20), st.floats(0, 1))
def test_ratio_loss_has_its_known_values(target: float, other: float):
    """Section 2.2 of arXiv:2507.07955. The loss is 1 + (N F - 1)(N G - 1) / (N - 1), so 1 is no minimum."""
    one = torch.tensor(1.0, dtype=torch.float64)

    def loss(share: float, mean: float) -> float:
        return ratio_loss(share * one, mean * one, target).item()

    assert loss(1 / target, other) == pytest.approx(1)
    assert loss(other, 1 / target) == pytest.approx(1)
    assert loss(1, 1) == pytest.approx(target)
    assert loss(0, 0) == pytest.approx(target / (target - 1))
    assert loss(0, 1) == pytest.approx(0) == loss(1, 0)
    mean = (0.3 * one).requires_grad_()
    ratio_loss(other * one, mean, target).backward()
    assert mean.grad.item() == pytest.approx(target * (target * other - 1) / (target - 1))


def test_ratio_losses_change_gradients_alone():
    """Each row adds its loss to all its positions, so a mean over bytes adds the mean over rows, weighted by bytes."""
    model, plain = (hnet(stages=[OUTER | {"patcher": LEARNED | {"ratio_weight": weight}}]) for weight in (0.5, 0.0))
    ids = random_ids()
    assert torch.equal(model(ids), plain(ids))
    name = "stages.0.patcher.query.weight"
    gradients = {}
    for each in (model, plain):
        each(ids).sum().backward()
        gradients[each] = each.get_parameter(name).grad
        each.zero_grad()
    losses: list[Tensor] = []
    model.run(0, model.embed(ids[:, :-1]), F.pad(ids[:, :-1], (1, 0), value=SEPARATOR), losses)
    (32 * losses[0].sum()).backward()  # without the loss of bytes
    own = model.get_parameter(name).grad
    assert own.abs().max() > 1e-4
    torch.testing.assert_close(gradients[model], gradients[plain] + own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["smoothing", "straight_through"])
def test_gradients_of_bytes_reach_the_router(path: str):
    rule = LEARNED | {"ratio_weight": 0.0, "smoothing": path == "smoothing"}
    model = hnet(stages=[OUTER | {"patcher": rule}])
    stage = model.stages[0]
    assert isinstance(stage, Stage)
    if path == "smoothing":  # cut the other path
        join = stage.join

        def without_confidence(states: Tensor, newest: Tensor, patches: Patches) -> Tensor:
            return join(states, newest, Patches(patches.starts, patches.wanted, None, patches.state))

        stage.join = without_confidence  # type: ignore[method-assign]
    model(random_ids()).sum().backward()
    for name in ("query", "key"):
        assert stage.get_parameter(f"patcher.{name}.weight").grad.abs().max() > 1e-3


@torch.no_grad()
def test_linear_routing_decides_by_each_state_alone():
    made = Router(9, 6, LearnedConfig(size=4.0, routing="linear")).double()
    torch.nn.init.constant_(made.score.bias, 0.1)
    hidden = torch.randn(2, 5, 6).double()
    found = made(reading(2, 5), None, hidden)
    expected = torch.sigmoid(hidden @ made.score.weight[0] + 0.1)
    torch.testing.assert_close(found.probabilities[:, 1:], expected[:, 1:])
    assert found.probabilities[:, 0].tolist() == [1.0, 1.0]
    changed = hidden.clone()
    changed[:, 2] = 0
    other = made(reading(2, 5), None, changed).probabilities
    assert torch.equal(other[:, [0, 1, 3, 4]], found.probabilities[:, [0, 1, 3, 4]])


def test_confidence_multiplies_outputs_of_patches_without_the_straight_through_estimator():
    """Equation 9 of arXiv:2507.07955; with the estimator, the factor is 1 and its gradient that of the confidence."""
    states, newest = torch.randn(2, 1, 3, 16).double()
    p = torch.tensor([[0.9, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([[True, False, False]])  # the capacity refuses the third
    confidence = torch.tensor([0.9, 0.8, 0.4], dtype=torch.float64)
    gradients = {}
    for is_straight_through in (True, False):
        rule = LEARNED | {"straight_through": is_straight_through}
        stage = hnet(stages=[OUTER | {"patcher": rule}]).stages[0]
        assert isinstance(stage, Stage)
        joined = stage.join(states, newest, Patches(starts, starts, p, None)) - stage.residual(states)
        factor = torch.ones(3) if is_straight_through else confidence
        torch.testing.assert_close(joined, newest * factor[:, None])
        (gradients[is_straight_through],) = torch.autograd.grad(joined.sum(), p)
    expected = newest[0].sum(1) * torch.tensor([1.0, -1.0, -1.0])
    torch.testing.assert_close(gradients[True][0], expected)
    torch.testing.assert_close(gradients[False], gradients[True])


@torch.no_grad()
@pytest.mark.parametrize("how", ["select", "max", "mean"])
def test_patch_is_a_state_or_pools_those_after_the_patch_before(how: str):
    stage = hnet(stages=[OUTER | {"downsampling": how}]).stages[0]
    assert isinstance(stage, Stage)
    states = torch.randn(1, 8, 16).double()
    starts = torch.tensor([[True, False, False, True, True, False, False, False]])
    found = stage.patch_inputs(states, starts, torch.tensor([[0, 3, 4]]))[0, :, :16]
    parts = states[0, :1], states[0, 1:4], states[0, 4:5]
    expected = [{"select": part[-1], "max": part.amax(0), "mean": part.mean(0)}[how] for part in parts]
    torch.testing.assert_close(found, torch.stack(expected))


@torch.no_grad()
def test_room_that_is_not_used_changes_nothing():
    ids = random_ids()
    models = [hnet(stages=[OUTER | {"patches": patches}]) for patches in (28, 32)]
    assert (patches_of(models[0], ids)[0].wanted.sum(1) <= 28).all()
    torch.testing.assert_close(models[0](ids), models[1](ids))


@torch.no_grad()
def test_patch_at_every_position_without_an_inner_network_leaves_a_residual():
    model = hnet(stages=[OUTER | {"patches": 32, "patcher": {"name": "fixed", "size": 1}}])
    stage = model.stages[0]
    assert isinstance(stage, Stage)
    model.main = nn.Identity()  # type: ignore[assignment]
    before = random_ids()[:, :-1]
    x, read = model.embed(before), F.pad(before, (1, 0), value=SEPARATOR)
    states = stage.encoder(x)
    torch.testing.assert_close(model.run(0, x, read, []), stage.decoder(states + stage.residual(states)))


@torch.no_grad()
def test_fixed_patches_are_strided():
    size = 4
    model = hnet(stages=[OUTER | {"patches": 8, "patcher": {"name": "fixed", "size": size}}])
    stage = model.stages[0]
    assert isinstance(stage, Stage)
    ids = torch.randint(97, 123, (2, 32))
    states = stage.encoder(model.embed(ids[:, :-1]))
    wide = torch.cat([states[:, ::size], stage.pad.expand(2, 8, -1)], -1)
    inner = model.main(wide)[..., :16].repeat_interleave(size, 1)
    expected = model.nats(stage.decoder(inner + stage.residual(states)), ids)
    torch.testing.assert_close(model(ids), expected)


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(0, 2**31))
@torch.no_grad()
def test_multi_linear_up_sampling_has_a_map_for_each_place_in_a_patch(places: int, seed: int):
    """Multi-linear up-sampling of arXiv:2506.14761, with the maps in turn again after the last one, as in its code."""
    torch.manual_seed(seed)
    up, starts = MultiLinear(4, 3, places), torch.rand(2, 12) < 0.3
    starts[:, 0] = True
    vectors = torch.randn(2, 12, 4)
    begun = (torch.arange(12) * starts).cummax(1).values
    found = up(vectors, starts.cumsum(1) - 1, torch.arange(12) - begun)
    maps = up.by_place.weight.view(places, 3, 4)
    for row in range(2):
        patch, place = -1, 0
        for position in range(12):
            patch, place = (patch + 1, 0) if starts[row, position] else (patch, place + 1)
            expected = (up.shared.weight + maps[place % places]) @ vectors[row, patch]
            torch.testing.assert_close(found[row, position], expected)


@torch.no_grad()
def test_au_net_of_fixed_patches_is_strided():
    """Norms and maps are at patches alone, and the states themselves reach the decoder."""
    size = 4
    fields = {"patches": 8, "patcher": {"name": "fixed", "size": size}, "join": "multi_linear", "places": size}
    model = hnet(stages=[OUTER | fields])
    stage = model.stages[0]
    assert isinstance(stage, Stage) and stage.down is not None and stage.up is not None
    ids = torch.randint(97, 123, (2, 32))
    states = stage.encoder.run_blocks(model.embed(ids[:, :-1]))
    inner = model.main(stage.down(stage.encoder.norm(states[:, ::size])))
    maps = stage.up.by_place.weight + stage.up.shared.weight.repeat(size, 1)
    expected = model.nats(stage.decoder(states + (inner @ maps.T).view(2, 32, 16)), ids)
    torch.testing.assert_close(model(ids), expected)


def test_first_values_without_a_given_deviation_follow_from_inputs():
    """The deviation is 1 / sqrt(inputs), and the cut at two deviations leaves 0.88 of it."""
    stage = {"width": 64, "heads": 2, "encoder": "T1", "decoder": "T1", "patcher": {"name": "byte_class"}, "patches": 9}
    model = build_model(small_config("hnet", stages=[stage | {"join": "multi_linear"}], main=WIDE, initial_std=None))
    for name, inputs in {
        "embedding.weight": 64,
        "head": 64,
        "stages.0.down.weight": 64,
        "stages.0.up.shared.weight": 96,
        "stages.0.up.by_place.weight": 96,
        "stages.0.encoder.blocks.0.feed_forward.contract.weight": 176,
        "main.blocks.0.mixer.output.weight": 96,
    }.items():
        assert model.get_parameter(name).std().item() == pytest.approx(0.8796 * inputs**-0.5, rel=0.05), name


@torch.no_grad()
def test_patches_of_a_prefix_are_those_of_the_row_at_every_stage():
    """A changed byte is read one position later, so patches up to its own position stay."""
    model, ids = hnet(**TWO), random_ids()
    whole = patches_of(model, ids)
    margins = [(found.probabilities - 0.5).abs().min().item() for found in whole]
    assert min(margins) > 1e-9  # no rounding flips a patch
    assert (whole[0].starts != whole[0].wanted).any() or (whole[1].starts != whole[1].wanted).any()
    of_rows = [patches_of(model, row[None]) for row in ids]
    for stage, found in enumerate(whole):
        assert torch.equal(torch.cat([each[stage].starts for each in of_rows]), found.starts)
    for cut in (1, 7, 20, 31):
        other = ids.clone()
        other[:, cut] = (ids[:, cut] + 1) % SEPARATOR
        for changed, width in ((ids[:, : cut + 1], cut + 1), (other, cut + 1)):
            found = patches_of(model, changed)
            assert torch.equal(found[0].starts[:, :width], whole[0].starts[:, :width])
            for row in range(len(ids)):
                count = int(whole[0].starts[row, :width].sum())
                assert torch.equal(found[1].starts[row, :count], whole[1].starts[row, :count])


@torch.no_grad()
def test_rows_have_a_patch_at_least_and_their_capacity_at_most():
    model = hnet(**TWO)
    ids = torch.cat([random_ids(), torch.full((1, 32), PADDING), torch.zeros(1, 32, dtype=torch.long)])
    for found, capacity in zip(patches_of(model, ids), (24, 9), strict=True):
        counts = found.starts.sum(1)
        assert (counts >= 1).all() and (counts <= capacity).all()
        assert counts[3] == 1
    assert model(ids).isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_rows_of_a_decoder_have_patches_of_their_own():
    model, ids = hnet(**TWO), random_ids(4)
    expected = model(ids)
    for primed in (0, 5, 17):
        decoder = model.decoder(4)
        logits = decoder.prime(ids[:, :primed])
        for place in range(primed, 32):
            nats = F.cross_entropy(logits, ids[:, place], reduction="none").float()
            torch.testing.assert_close(nats, expected[:, place])
            if place < 31:
                logits = decoder.step(ids[:, place])


def test_first_values_of_routers_are_the_identity_and_of_residuals_zero():
    model = build_model(small_config("hnet"))
    for name, parameter in model.named_parameters():
        if ".patcher." in name:
            assert torch.equal(parameter, torch.eye(16))
        if ".residual." in name or name.endswith("pad"):
            assert not parameter.any()


@pytest.mark.parametrize(
    ("widths", "sizes", "expected"),
    [
        ([1024, 1536], [6], [2.63, 0.88]),
        ([1024, 2048], [6], [3.03, 0.88]),
        ([1024, 1024, 1536], [3, 3], [2.63, 1.52, 0.72]),
        ([1024, 1536, 2048], [3, 3], [3.03, 1.43, 0.72]),
    ],
)
def test_learning_rates_of_stages_are_those_of_the_paper(widths: list[int], sizes: list[int], expected: list[float]):
    """Appendix C of arXiv:2507.07955, for its four models."""
    stages = [
        {"width": width, "encoder": "m4", "decoder": "m4", "patcher": {"name": "learned", "size": size}, "patches": 9}
        for width, size in zip(widths, sizes, strict=False)
    ]
    main = {"width": widths[-1], "layers": "T1"}
    config = model_config({"family": "hnet", "sequence_length": 64, "stages": stages, "main": main})
    assert isinstance(config, HNetConfig)
    assert config.multipliers == pytest.approx(expected, abs=0.006)


def test_scaled_model_has_the_multipliers_of_its_base():
    """They follow from widths, which the scaling counts already."""
    config = small_config("hnet", main={"width": 96, "heads": 8, "layers": "T1"})
    optimizer = OptimizerConfig(scaling="mup", base={"main": {"width": 24, "heads": 2}})
    with torch.device("meta"):
        model, base = scale_model(build_model(config), config, optimizer), build_model(base_config(config, optimizer))
    assert model.rate_multiplier("embedding.weight") == 2 * base.rate_multiplier("embedding.weight")
    rules, unscaled = parameter_rules(optimizer, model), parameter_rules(optimizer, base)
    for name in ("embedding.weight", "stages.0.encoder.blocks.0.mixer.expand.weight", "main.norm.weight"):
        assert rules[name].rate_multiplier == unscaled[name].rate_multiplier
    wider = "main.blocks.0.mixer.query_key_value.weight"
    assert rules[wider].rate_multiplier == pytest.approx(unscaled[wider].rate_multiplier / 4)


def test_every_parameter_learns_at_the_rate_of_its_stage():
    model = hnet(stages=[OUTER, INNER | {"width": 24}], rate_multipliers=[3.0, 2.0, 1.0], main=SMALL_MAIN)
    rates = {name: model.rate_multiplier(name) for name, _ in model.named_parameters()}
    assert rates["embedding.weight"] == rates["head"] == rates["stages.0.patcher.query.weight"] == 3.0
    assert rates["stages.0.pad"] == rates["stages.1.encoder.norm.weight"] == 2.0
    assert rates["stages.1.pad"] == rates["main.norm.weight"] == 1.0
    assert set(rates.values()) == {1.0, 2.0, 3.0}


SMALL_MAIN = {"width": 32, "heads": 2, "layers": "T1"}
WIDE = {"width": 96, "heads": 2, "layers": "T1"}


def test_layouts_name_blocks():
    assert "".join(kinds_of("T1m4")) == "Tmmmm"
    assert additions("T1m4") == 6
    assert not additions("")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stages": [OUTER | {"encoder": "x1"}]}, "String should match"),
        ({"stages": [OUTER | {"heads": 3}]}, r"heads \(3\) does not divide width \(16\)"),
        ({"stages": [OUTER, OUTER | {"width": 8}]}, "width 8 is less than the width 16"),
        ({"stages": [OUTER, OUTER | {"patcher": {"name": "byte_class"}}]}, "only the first stage"),
        ({"rate_multipliers": [1.0]}, "rate_multipliers has 1 factors"),
        ({"mamba": {"head_width": 5}}, r"mamba.head_width \(5\) does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], fault: str):
    with pytest.raises(ValueError, match=fault):
        small_config("hnet", **changes)
