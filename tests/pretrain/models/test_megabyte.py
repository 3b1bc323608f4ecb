"""Laws of MEGABYTE (arXiv:2305.07185, section 2.2). Exact laws are tested in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.models.blocks.attention import packs_patches
from pretrain.models.blocks.positions import Rotary, rotate
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.families.megabyte import Megabyte, MegabyteConfig, PatchEncoder

ROWS, T, P = 2, 24, 4
K = T // P


def build(double: bool = True, **changes: object) -> Megabyte:
    fields = {
        "sequence_length": T,
        "patch_size": P,
        "global_model": {"width": 32, "layers": 2, "heads": 4},
        "local_model": {"width": 24, "layers": 2, "heads": 2},
        "dropout": 0.0,
        "initial_std": 0.3,  # large, so that a wrong dependence shows
    }
    torch.manual_seed(0)
    model = Megabyte(MegabyteConfig.model_validate(fields | changes)).eval()
    return model.double() if double else model


def random_ids(rows: int = ROWS, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: Megabyte, ids: Tensor) -> Tensor:
    """Return log probabilities (rows, T, VOCABULARY) of every id at every place."""
    rows, length = ids.shape
    padded = F.pad(ids, (0, -length % model.patch_size), value=PADDING)
    patches = model.embed_patches(padded[:, : -model.patch_size], 0)
    global_in = torch.cat([model.global_pad.expand(rows, 1, -1), patches], 1)
    logits = model.logits(model.decode_patches(padded, model.global_stack(global_in)))
    return logits.log_softmax(-1)[:, :length]


VARIANTS: dict[str, dict[str, object]] = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "convolution": {"patch_encoder": "convolution"},
    "cross-patch": {"cross_patch_bytes": P},
    "all": {"positions": "rotary", "patch_encoder": "convolution", "cross_patch_bytes": 2},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
activations = pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])


@pytest.mark.slow
@variants
def test_a1_row_t_depends_on_every_byte_before_t_and_on_nothing_after(variant: str):
    model = build(**VARIANTS[variant])
    ids = random_ids(1)
    base = log_probabilities(model, ids)[0]
    for u in range(T):
        changed = ids.clone()
        changed[0, u] = (changed[0, u] + 1) % 256
        moved = (log_probabilities(model, changed)[0] - base).abs().amax(-1)
        assert torch.equal(moved[: u + 1], torch.zeros(u + 1, dtype=torch.double)), f"byte {u} leaks"
        assert (moved[u + 1 :] > 1e-12).all(), f"byte {u} is not seen everywhere after it"


@variants
def test_a2_global_output_k_changes_exactly_the_bytes_of_patch_k(variant: str):
    """Cross-patch attention carries the change into one later patch for each local layer."""
    model = build(**VARIANTS[variant])
    reached = len(model.local_stack.blocks) if model.cross_patch_bytes else 0
    ids = random_ids() % 256
    global_out = torch.randn(ROWS, K, model.patch_size * model.byte_width, dtype=torch.double)
    base = model.decode_patches(ids, global_out)
    for k in range(K):
        changed = global_out.clone()
        changed[:, k] += 1.0
        moved = (model.decode_patches(ids, changed) - base).abs().amax(-1) > 0
        expected = torch.zeros(ROWS, T, dtype=torch.bool)
        expected[:, k * P : (k + 1 + reached) * P] = True
        assert torch.equal(moved, expected)


def test_a2_each_byte_has_its_own_slice_of_the_global_output():
    """Equation 4: slice p of output k enters at byte p, so it moves bytes p and later of that patch."""
    model = build()
    ids = random_ids()
    global_out = torch.randn(ROWS, K, P, model.byte_width, dtype=torch.double)
    base = model.decode_patches(ids, global_out.flatten(2))
    for p in range(P):
        changed = global_out.clone()
        changed[:, 1, p] += 1.0
        moved = (model.decode_patches(ids, changed.flatten(2)) - base).abs().amax((0, 2)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(P + p, 2 * P))


@activations
def test_a3_model_with_patches_of_one_byte_and_no_local_layer_is_a_decoder_only_transformer(activation: str):
    model = build(patch_size=1, local_model={"width": 24, "layers": 0, "heads": 1}, activation=activation)
    ids = random_ids()
    embedded = model.global_embedding(ids) + model.global_positions[:T]
    begun = torch.cat([model.global_pad.expand(ROWS, 1, -1), embedded[:, :-1]], 1)
    hidden = model.global_to_local(model.global_stack(begun)) + model.local_positions + model.local_pad
    logits = F.linear(model.local_stack.norm(hidden), model.local_embedding.weight)
    nats = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(model(ids).double(), nats, atol=1e-6, rtol=1e-6)


def test_a4_one_patch_is_a_local_decoder_with_constant_offsets():
    model = build(sequence_length=P)
    ids = random_ids(length=P)
    offsets = model.condition(model.global_stack(model.global_pad.expand(1, 1, -1))[0])
    before = torch.cat([model.local_pad.expand(ROWS, 1, -1), model.local_embedding(ids[:, :-1])], 1)
    logits = model.logits(model.local_stack(offsets + before))
    torch.testing.assert_close(logits.log_softmax(-1), log_probabilities(model, ids), atol=1e-12, rtol=0)


@pytest.mark.slow
@variants
@pytest.mark.parametrize("length", range(1, T + 1))
def test_a5_padding_to_whole_patches_changes_no_earlier_row(variant: str, length: int):
    model = build(**VARIANTS[variant])
    ids = random_ids()
    torch.testing.assert_close(model(ids[:, :length]), model(ids)[:, :length], atol=1e-6, rtol=0)


def cross_patch_model(reach: int, **changes: object) -> Megabyte:
    """Return a model with the same weights for every reach, because rotary positions have no weights."""
    return build(positions="rotary", cross_patch_bytes=reach, **changes)


def test_a6_patch_sees_only_itself_after_a_separator_at_the_end_of_the_patch_before():
    """A separator at the end of every patch hides the whole reach, so the model equals the one without a reach."""
    ids = random_ids() % 256
    plain, crossing = cross_patch_model(0), cross_patch_model(P)
    assert (log_probabilities(crossing, ids) - log_probabilities(plain, ids)).abs().max() > 0.1
    ids[:, P - 1 :: P] = SEPARATOR
    torch.testing.assert_close(log_probabilities(crossing, ids), log_probabilities(plain, ids), atol=1e-12, rtol=0)


@pytest.mark.parametrize("reach", [1, 3, P])
def test_a6_cross_patch_attention_is_dense_attention_under_the_papers_mask(reach: int):
    """Position t sees the earlier positions of its patch, and the last r before the patch if no document ended."""
    model = cross_patch_model(reach)
    ids = random_ids(1)
    ids[0, [5, 12, 15]] = SEPARATOR
    global_out = torch.randn(1, K, P * model.byte_width, dtype=torch.double)
    got = model.decode_patches(ids, global_out)[0]
    visible = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        start = t // P * P
        for s in range(max(start - reach, 0), t + 1):
            visible[t, s] = s >= start or SEPARATOR not in ids[0, s:t]
    x = (model.condition(global_out[0]) + model.embed_locally(ids.view(K, P)[:, :-1])).view(1, T, -1)
    for block in model.local_stack.blocks:
        q, k, v = block.attention.project(block.attention_norm(x))
        q, k = (rotate(a, torch.arange(T), Rotary()) for a in (q, k))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        x = x + block.attention.merge(mixed)
        x = x + block.feed_forward(block.feed_forward_norm(x))
    expected = model.local_stack.norm(x)[0]
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_names_of_parameters_do_not_change():
    stacks = ("global_stack", "local_stack")
    of_a_block = [
        "attention_norm.weight",
        "attention_norm.bias",
        "attention.query_key_value.weight",
        "attention.output.weight",
        "feed_forward_norm.weight",
        "feed_forward_norm.bias",
        "feed_forward.expand.weight",
        "feed_forward.contract.weight",
    ]
    names = {f"{stack}.blocks.{n}.{part}" for stack in stacks for n in range(2) for part in of_a_block}
    names |= {f"{stack}.norm.{part}" for stack in stacks for part in ("weight", "bias")}
    names |= {f"{side}_{part}" for side in ("global", "local") for part in ("embedding.weight", "pad", "positions")}
    model = Megabyte(
        MegabyteConfig(
            sequence_length=T,
            patch_size=P,
            global_model=StackConfig(width=16, layers=2, heads=2),
            local_model=StackConfig(width=8, layers=2, heads=2),
        )
    )
    assert {name for name, _ in model.named_parameters()} == names | {"global_to_local.weight"}


@pytest.mark.parametrize("reach", [0, 2, 6])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a6_patches_of_a_row_packed_together_have_the_numbers_of_each_alone(
    reach: int, across: bool, positions: str, monkeypatch: pytest.MonkeyPatch
):
    """A CPU has no backward pass of FlexAttention, so its mask becomes a dense one. Patches of 6 cross tiles of 128."""

    def dense(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
        visible = create_mask(block_mask.mask_mod, len(q), None, q.shape[2], k.shape[2], device="cpu")
        return F.scaled_dot_product_attention(q, k, v, visible)

    monkeypatch.setattr("pretrain.models.blocks.attention._compiled", lambda kernel: dense)
    fields = {"sequence_length": 300, "patch_size": 6, "cross_patch_bytes": reach, "positions": positions}
    sizes = {"width": 36, "layers": 1, "heads": 2}
    model = build(**fields, global_model=sizes, attention_across_documents=across)
    ids = random_ids(length=300)
    ids[torch.rand(2, 300, generator=torch.Generator().manual_seed(2)) < 0.1] = SEPARATOR
    parameters = list(model.parameters())
    alone = model(ids)
    expected = torch.autograd.grad(alone.sum(), parameters)
    monkeypatch.setattr(model, "packs", lambda local_in, length: True)
    packed = model(ids)
    torch.testing.assert_close(packed, alone, atol=1e-8, rtol=0)
    for got, wanted in zip(torch.autograd.grad(packed.sum(), parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-7)


def test_patches_are_packed_on_cuda_if_they_are_small_and_nothing_is_dropped():
    def packs(device: str = "meta", length: int = 2048, reach: int = 16, dropout: float = 0.0) -> bool:
        return packs_patches(torch.empty(0, device=device), 64, length, reach, dropout)

    assert packs()
    assert not packs("cpu")
    assert not packs(dropout=0.1)
    assert not packs(reach=64)
    assert not packs(length=512)
    assert not packs(length=1 << 20)


def test_a6_gradients_flow_into_the_previous_patch():
    """A Transformer-XL stops gradients at its memory; MEGABYTE does not (section 2.3.2)."""
    model = cross_patch_model(2)
    conditioning = torch.randn(1, K, P * model.byte_width, dtype=torch.double, requires_grad=True)
    model.logits(model.decode_patches(random_ids(1) % 256, conditioning)).view(K, -1)[3].sum().backward()
    moved = conditioning.grad[0].abs().amax(-1) > 0
    assert moved.tolist() == [False, True, True, True, False, False]


@pytest.mark.slow
@variants
def test_a7_the_global_model_runs_once_per_patch_and_the_local_model_once_per_byte(variant: str):
    model = build(**VARIANTS[variant])
    calls = {"global": 0, "local": 0}

    def count(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    model.global_stack.register_forward_hook(count("global"))
    model.local_stack.register_forward_hook(count("local"))
    ids = random_ids()
    decoder = model.decoder(ROWS)
    decoder.prime(ids[:, :0])
    for t in range(T - 1):
        decoder.step(ids[:, t])
    assert calls == {"global": K, "local": T}


def test_a9_the_head_is_the_local_embedding_and_gradients_of_both_uses_add_up():
    model = build()
    ids = random_ids()
    names = [name for name, p in model.named_parameters() if p.shape[0] == VOCABULARY]
    assert names == ["global_embedding.weight", "local_embedding.weight"]
    table = model.local_embedding.weight
    model(ids).sum().backward()
    both = table.grad.clone()
    other = table.detach()
    parts = []
    for detached in ("embedding", "head"):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if detached == "head":
                patch.setattr(model, "head_weights", lambda: (other, None))
            else:
                patch.setattr(model.local_embedding, "forward", lambda ids: F.embedding(ids, other))
            model(ids).sum().backward()
        parts.append(table.grad.clone())
    torch.testing.assert_close(parts[0] + parts[1], both)


@pytest.mark.parametrize(("width", "layers"), [(256, 3), (512, 2)])
@activations
def test_a12_a_stack_has_12_layers_times_width_squared_weights(width: int, layers: int, activation: str):
    stack = Stack(StackConfig(width=width, layers=layers, heads=4), activation, dropout=0.0)
    weights = sum(m.weight.numel() for m in stack.modules() if isinstance(m, nn.Linear))
    assert weights == pytest.approx(12 * layers * width**2, rel=8e-3 if activation == "swiglu" else 0)
    norms = (2 * layers + 1) * 2 * width
    assert sum(p.numel() for p in stack.parameters()) == weights + norms


def text_config_on_meta() -> Megabyte:
    """Return the paper's text model, "758M + 262M" (table 15, arXiv row), without storage."""
    with torch.device("meta"):
        return Megabyte(
            MegabyteConfig(
                sequence_length=8192,
                patch_size=8,
                global_model=StackConfig(width=2048, layers=14, heads=32),
                local_model=StackConfig(width=1024, layers=18, heads=16),
            )
        )


def test_a12_parameters_of_the_papers_text_model():
    """704.6M and 226.5M weights (12 L D^2), the tables, and norms; the paper's 758M and 262M are names."""
    D_G, D_L = 2048 // 8, 1024
    model = text_config_on_meta()
    stacks = 12 * 14 * 2048**2 + 12 * 18 * 1024**2
    tables = VOCABULARY * (D_G + D_L) + 8192 * D_G + 8 * D_L + D_G * D_L + 2048 + D_L
    assert model.parameter_count() == pytest.approx(stacks + tables, rel=1e-3)
    assert pytest.approx(704.6e6, rel=1e-4) == 12 * 14 * 2048**2
    assert pytest.approx(226.5e6, rel=1e-4) == 12 * 18 * 1024**2


def test_a12_flops_per_byte_of_the_papers_text_model():
    """645M per byte forward: 2 m_global/P + 4 L_g (T/P) D/P + 2 m_local + 4 L_l P D_l (SpaceByte, with true sizes)."""
    assert text_config_on_meta().flops(8192) / 8192 == pytest.approx(645e6, rel=2e-3)


def test_a10_convolutional_encoder_with_zero_weights_equals_the_base_model():
    convolved, base = build(patch_encoder="convolution"), build()
    weights = convolved.state_dict()
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    ids = random_ids()
    assert (log_probabilities(convolved, ids) - log_probabilities(base, ids)).abs().max() > 0.01
    for causal_filter in convolved.patch_encoder.filters:
        nn.init.zeros_(causal_filter.weight)
    assert torch.equal(log_probabilities(convolved, ids), log_probabilities(base, ids))


def test_a10_the_encoders_filters_are_causal_and_of_3_5_and_7_bytes():
    encoder = PatchEncoder(8).double()
    assert [tuple(f.weight.shape) for f in encoder.filters] == [(8, 8, size) for size in (3, 5, 7)]
    x = torch.randn(1, 40, 8, dtype=torch.double)
    base = encoder(x)
    for u in range(40):
        changed = x.clone()
        changed[0, u] += 1
        moved = ((encoder(changed) - base).abs().amax(-1)[0] > 0).nonzero().flatten()
        assert moved.min() == u
        assert moved.max() <= u + encoder.reach == u + 2 + 4 + 6


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.006, 0.02])
def test_e1_first_loss_equals_the_formula_of_a_tied_head(std: float):
    """log2 V + s^2 D / (2 ln 2) bits, for a head with weights of deviation s on normed activations of D channels."""
    D = 256
    model = build(double=False, initial_std=std, sequence_length=256, local_model={"width": D, "layers": 2, "heads": 2})
    ids = torch.randint(0, 256, (64, 256), generator=torch.Generator().manual_seed(0))
    cut = 0.7737  # variance of a normal distribution truncated at two deviations, in units of s^2
    expected = math.log2(VOCABULARY) + cut * std**2 * D / (2 * math.log(2))
    with torch.no_grad():
        assert model(ids).mean().item() / math.log(2) == pytest.approx(expected, abs=0.01)


def test_initial_weights_are_normal_and_truncated_at_two_deviations():
    model = build(initial_std=0.006, global_model={"width": 256, "layers": 2, "heads": 4})
    weight = model.global_stack.blocks[0].feed_forward.expand.weight
    assert weight.abs().max() <= 0.012
    assert weight.std().item() == pytest.approx(0.006 * math.sqrt(0.7737), rel=0.02)


@pytest.mark.parametrize("value", [0, 255])
def test_e2_loss_of_every_byte_value_is_positive(value: int):
    nats = build()(torch.full((1, T), value))
    assert torch.isfinite(nats).all()
    assert (nats > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_dropout_and_gradients_reach_every_parameter(variant: str, dtype: torch.dtype):
    model = build(double=False, dropout=0.1, **VARIANTS[variant]).to(dtype).train()
    model(random_ids(length=T - 1)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(("what", "bound"), [("random", 0.05), ("constant", 0.01)])
def test_e6_model_learns_to_predict_one_batch(what: str, bound: float):
    torch.manual_seed(0)
    model = build(double=False, initial_std=0.02).train()
    ids = random_ids(1) if what == "random" else torch.full((4, T), 7)  # no model can predict which of n rows begins
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        bits = model(ids).mean() / math.log(2)
        if bits < bound:
            return
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
    raise AssertionError(f"{bits.item():.3f} bits a byte after 600 steps")


def test_the_global_input_is_one_patch_late_and_begins_with_the_pad():
    """Equation 2. The last patch is never an input."""
    model = build()
    seen = []
    model.global_stack.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = random_ids()
    model(ids)
    torch.testing.assert_close(seen[0][:, 0], model.global_pad.expand(ROWS, -1))
    byte_inputs = model.global_embedding(ids) + model.global_positions
    torch.testing.assert_close(seen[0][:, 1:], byte_inputs.view(ROWS, K, -1)[:, :-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "not a multiple of patch_size"),
        ({"global_model": {"width": 30, "layers": 1, "heads": 2}}, "global_model.width"),
        ({"local_model": {"width": 24, "layers": 1, "heads": 5}}, "does not divide width"),
        ({"cross_patch_bytes": P + 1}, "cross_patch_bytes"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="longer than the model's"):
        build()(random_ids(length=T + 1))
