"""Make a golden vector: run an author's code on a small model with random weights, and store what it computed.

    python tests/parity/make.py NAME CLONE

NAME is one of the functions below. CLONE is a clone of the authors' repository at the commit that README.md names. The
result is NAME.npz beside this file: the weights by the authors' names, the ids, their logits, and the config.
"""

import importlib
import itertools
import json
import os
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SEED = 20
Arrays = dict[str, np.ndarray]
HNET_NORMS = ("norm1.weight", "norm2.weight", "rmsnorm.weight", "mixer.norm.weight")
AU_NET_NORMS = ("down_norm.weight", "up_norm.weight", "vocab_norm.weight")
BLT_NORMS = ("attention_norm.weight", "ffn_norm.weight", "norm_q.weight", "norm_kv.weight", "local_decoder.norm.weight")


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Return normal weights: of deviation 1/2 for tables and vectors, smaller for matrices; norms are about 1."""
    generator = np.random.default_rng(SEED)
    weights = {}
    for name, shape in sorted(shapes.items()):
        is_matrix = len(shape) == 2 and not any(part in name for part in ("emb", "wte", "wpe", "position"))
        is_matrix |= "indexed_linear" in name
        values = generator.standard_normal(shape) * (max(shape) ** -0.5 if is_matrix else 0.5)
        own = (*AU_NET_NORMS, *BLT_NORMS, *HNET_NORMS)
        is_scale = name.endswith(("scale", "ln_1.weight", "ln_2.weight", "ln_f.weight", "layer_norm.weight", *own))
        rounded = (values * 0.4 + 1 if is_scale else values).astype(np.float16)  # half the size on disk
        weights[name] = rounded.astype(np.float32)
    return weights


def random_ids(rows: int, length: int, symbols: int) -> np.ndarray:
    """Return (rows, length) random ids below `symbols`."""
    return np.random.default_rng(SEED + 1).integers(symbols, size=(rows, length))


def save(name: str, config: dict[str, Any], weights: Arrays, **arrays: np.ndarray) -> None:
    """Write NAME.npz."""
    stored = {f"weights.{key}": value.astype(np.float16) for key, value in weights.items()} | arrays
    np.savez_compressed(HERE / f"{name}.npz", config=np.array(json.dumps(config)), **stored)


def fill(module: Any, tied: dict[str, str]) -> Arrays:
    """Give a torch module random weights; return them without the copies that other names are tied to."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    shapes = {name: tuple(value.shape) for name, value in module.named_parameters() if name not in tied}
    weights = random_weights(shapes)
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    state |= {copy: state[name] for copy, name in tied.items()}
    missing = module.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    module.eval()
    return weights


def nanogpt(clone: Path, name: str = "nanogpt", vocabulary: int = 258, bias: bool = True) -> None:
    """Run karpathy/nanoGPT over ids that begin with the separator."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    sys.path.insert(0, str(clone))
    import model as authors  # noqa: PLC0415

    arguments = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 12,
        "bias": bias,
        "vocab_size": vocabulary,
        "dropout": 0.0,
    }
    gpt = authors.GPT(authors.GPTConfig(**arguments))
    weights = fill(gpt, {"lm_head.weight": "transformer.wte.weight"})
    ids = random_ids(1, 12, min(vocabulary, 256))
    ids[:, 0] = 256 if vocabulary > 256 else 10  # what rows begin with
    with torch.no_grad():
        logits, _ = gpt(torch.from_numpy(ids), torch.from_numpy(ids))
    save(name, arguments, weights, ids=ids, logits=logits.numpy())


def nanogpt_small(clone: Path) -> None:
    """Run karpathy/nanoGPT without biases and with a vocabulary of 65 of the 256 bytes."""
    nanogpt(clone, "nanogpt_small", vocabulary=65, bias=False)


def transformer_xl(clone: Path, name: str = "transformer_xl", pre_lnorm: bool = False) -> None:
    """Run kimiyoung/transformer-xl over three segments, with 30 symbols."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    torch.version.cuda = torch.version.cuda or "12.0"  # their import reads it
    torch.Tensor.byte = torch.Tensor.bool  # type: ignore[method-assign] torch takes no other masks today
    sys.path[:0] = [str(clone / "pytorch"), str(clone / "pytorch/utils")]
    import mem_transformer as authors  # noqa: PLC0415

    arguments = {
        "n_token": 30,
        "n_layer": 2,
        "n_head": 2,
        "d_model": 12,
        "d_head": 6,
        "d_inner": 20,
        "dropout": 0.0,
        "dropatt": 0.0,
        "tie_weight": True,
        "pre_lnorm": pre_lnorm,
        "tgt_len": 6,
        "ext_len": 0,
        "mem_len": 9,
        "clamp_len": 8,
    }
    model = authors.MemTransformerLM(**arguments)
    weights = fill(model, {"crit.out_layers.0.weight": "word_emb.emb_layers.0.weight"})
    ids = random_ids(2, 18, 30)
    ids[:, 0] = 0  # what rows begin with
    memory, logits = model.init_mems(), []
    with torch.no_grad():
        for segment in torch.from_numpy(ids).split(6, 1):
            hidden, memory = model._forward(segment.t(), mems=memory)
            head = model.crit.out_layers[0]
            logits.append(model.crit._compute_logit(hidden, head.weight, head.bias, model.crit.out_projs[0]))
    save(name, arguments, weights, ids=ids, logits=torch.cat(logits).transpose(0, 1).numpy())


def transformer_xl_pre(clone: Path) -> None:
    """Run kimiyoung/transformer-xl with norms before its layers."""
    transformer_xl(clone, "transformer_xl_pre", pre_lnorm=True)


def perceiver_ar(clone: Path) -> None:
    """Run google-research/perceiver-ar with rotary positions and a second cross-attend."""
    arguments = {"position_encoding_type": "rotary", "fraction_to_rotate": 0.5, "max_wavelength": 16}
    arguments |= {"input_idx_size": [-1], "additional_cross_attend_after_layers": [0], "input_embed_dim": 12}
    arguments["num_cross_attend_heads"] = 1
    run_perceiver_ar(clone, "perceiver_ar", arguments, positions=None)


def perceiver_ar_image(clone: Path) -> None:
    """Run google-research/perceiver-ar with learned positions of 3 x 2 pixels of 3 channels."""
    arguments = {"position_encoding_type": "absolute", "position_encoding": "random", "input_idx_size": [4, 5, 5]}
    arguments |= {"learnable_position_embeddings": True, "use_positions_from_data": True, "input_embed_dim": 8}
    height, width, channels = 3, 2, 3
    row, column, channel = np.meshgrid(range(height), range(width), range(channels), indexing="ij")
    axes = np.stack([column.ravel(), row.ravel(), channel.ravel()], 1) + 2
    positions = np.concatenate([[[1, 1, 1]], axes])[:-1]  # those of the start, then of the bytes
    run_perceiver_ar(clone, "perceiver_ar_image", arguments | {"max_context_length": 18}, positions)


def run_perceiver_ar(clone: Path, name: str, arguments: dict[str, Any], positions: np.ndarray | None) -> None:
    """Run google-research/perceiver-ar on 2 rows that begin with SOS; it adds 3 to bytes."""
    import jax  # noqa: PLC0415 torch's environment has none
    import jax.numpy as jnp  # noqa: PLC0415

    jnp.DeviceArray = jax.Array  # today's name
    sys.path.insert(0, str(clone))
    import haiku as hk  # noqa: PLC0415
    from perceiver_ar import perceiver_ar_model as authors  # noqa: PLC0415

    arguments = {
        "num_classes": 259,
        "max_context_length": 16,
        "num_transformers_per_block": 2,
        "z_index_dim": 6,
        "num_z_channels": 8,
        "num_cross_attend_heads": 2,
        "num_transformer_heads": 2,
        "cross_attend_widening_factor": 4,
        "transformer_widening_factor": 4,
        "activation_name": "sq_relu",
        "final_layer_init_zeros": False,
    } | arguments
    length = arguments["max_context_length"]
    model = hk.transform(lambda ids, at: authors.PerceiverAR(**arguments)(ids, at, is_training=False))
    ids = random_ids(1, length, 256)
    read = np.concatenate([np.full((1, 1), 2), ids[:, :-1] + 3], 1).astype(np.int32)
    at = None if positions is None else positions[None].astype(np.int32)
    key = jax.random.PRNGKey(0)
    parameters = model.init(key, read, at)
    flat = {f"{module}/{part}": value for module, parts in parameters.items() for part, value in parts.items()}
    weights = random_weights({key: tuple(value.shape) for key, value in flat.items()})
    filled = {module: {part: weights[f"{module}/{part}"] for part in parts} for module, parts in parameters.items()}
    with jax.default_matmul_precision("highest"):
        output = model.apply(filled, key, read, at)
    save(name, arguments, weights, ids=ids, logits=np.asarray(output.input_events_logits))


def perceiver_io(clone: Path) -> None:
    """Run the Perceiver IO of deepmind-research over a padded row, as its notebook does; it adds 6 to bytes."""
    import jax  # noqa: PLC0415 torch's environment has none
    import jax.numpy as jnp  # noqa: PLC0415

    sys.path.insert(0, str(clone))
    import haiku as hk  # noqa: PLC0415
    from perceiver import io_processors, position_encoding  # noqa: PLC0415
    from perceiver import perceiver as authors  # noqa: PLC0415

    length, width, latent_width = 12, 8, 12
    widths = {"qk_channels": 4, "num_z_channels": latent_width}
    encoder = {"num_self_attends_per_block": 2, "num_blocks": 2, "z_index_dim": 5, "v_channels": latent_width}
    encoder |= {"num_self_attend_heads": 2, "num_cross_attend_heads": 2, **widths}
    decoder = {"output_num_channels": latent_width, "output_index_dims": length, "v_channels": width, "num_heads": 2}
    decoder |= {"position_encoding_type": "trainable", "final_project": False, "use_query_residual": False, **widths}

    def run(ids: Any, present: Any) -> Any:
        table = hk.Embed(vocab_size=262, embed_dim=width)
        places = position_encoding.TrainablePositionEncoding(index_dim=length, num_channels=width)
        queries = {"trainable_position_encoding_kwargs": {"num_channels": width}}
        network = authors.Perceiver(
            encoder=authors.PerceiverEncoder(**encoder), decoder=authors.BasicDecoder(**decoder, **queries)
        )
        inputs = table(ids) + places(len(ids))
        found = network(inputs, is_training=False, input_mask=present, query_mask=present)
        return io_processors.EmbeddingDecoder(embedding_matrix=table.embeddings)(found)

    ids = random_ids(2, length, 256) + 6
    ids[:, 3], ids[1, 8:] = 3, 0  # their mask and their padding
    present = jnp.asarray(ids != 0, jnp.int32)
    model, key = hk.transform(run), jax.random.PRNGKey(0)
    parameters = model.init(key, jnp.asarray(ids), present)
    flat = {f"{module}/{part}": value for module, parts in parameters.items() for part, value in parts.items()}
    weights = random_weights({name: tuple(value.shape) for name, value in flat.items()})
    filled = {module: {part: weights[f"{module}/{part}"] for part in parts} for module, parts in parameters.items()}
    with jax.default_matmul_precision("highest"):
        logits = model.apply(filled, key, jnp.asarray(ids), present)
    save("perceiver_io", {"encoder": encoder, "decoder": decoder}, weights, ids=ids, logits=np.asarray(logits))


def module_of_spacebyte(clone: Path, name: str) -> Any:
    """Import a module of kjslag/spacebyte without three packages that its models do not use."""
    for unused in ("psutil", "tiktoken", "sentencepiece"):
        sys.modules[unused] = types.ModuleType(unused)
    sys.path.insert(0, str(clone))
    return importlib.import_module(name)


def megabyte(clone: Path) -> None:
    """Run the MEGABYTE of kjslag/spacebyte, with a norm after its global model, which it lacks."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    authors = module_of_spacebyte(clone, "megabyte")

    arguments = {
        "vocab_size": 258,
        "BOS": 256,
        "d_model": 16,
        "context_size": 12,
        "d_key": 4,
        "n_layers": 2,
        "tie_embedding": False,
        "qk_layer_norm": False,
        "init": "standard",
        "patch_size": 4,
        "d_local": 8,
        "n_local_layers": 2,
    }
    model = authors.MegaByte(authors.MegaByteConfig(**arguments))

    class Normed(torch.nn.Module):
        """A block, and a norm after it."""

        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block, self.norm = block, torch.nn.LayerNorm(arguments["d_model"])

        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.norm(self.block(x, **options))

    model.global_blocks[-1] = Normed(model.global_blocks[-1])
    weights = fill(model, {})
    head = model.logits.logits_linear.weight
    with torch.no_grad():
        head.zero_()
        head[:258] = model.local_token_embedding.weight  # a tied head, as in the paper
        ids = random_ids(1, 12, 256)
        logits, _ = model(torch.from_numpy(np.concatenate([[[256]], ids[:, :-1]], 1)))
    del weights["logits.logits_linear.weight"]
    save("megabyte", arguments, weights, ids=ids, logits=logits.numpy())


def spacebyte(clone: Path) -> None:
    """Run kjslag/spacebyte on a row with a document start in its middle, by its rule for UTF-8."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    authors = module_of_spacebyte(clone, "spacebyte")

    arguments = {
        "vocab_size": 258,
        "BOS": 256,
        "d_model": 16,
        "context_size": 24,
        "d_key": 4,
        "n_layers": 2,
        "tie_embedding": False,
        "init": "standard",
        "rope": True,
        "global_context_size": 16,
        "d_local": 8,
        "n_local_layers": 2,
        "local_attention_window": 5,
    }
    model = authors.SpaceByte(authors.SpaceByteConfig(**arguments))
    weights = fill(model, {})
    text = "The cat, 日本 ".encode()
    ids = np.array([[*text, 256, *b" x2-y"]])
    ids = np.pad(ids, ((0, 0), (0, 24 - ids.shape[1])), constant_values=ord("z"))
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(np.concatenate([[[256]], ids[:, :-1]], 1)))
    save("spacebyte", arguments, weights, ids=ids, logits=logits.numpy())


def module_of_blt(clone: Path) -> Any:
    """Import the model of facebookresearch/blt without what its CPU path does not use."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    hub, xformers, operations = (types.ModuleType(name) for name in ("huggingface_hub", "xformers", "xformers.ops"))
    patcher = types.ModuleType("bytelatent.data.patcher")
    hub.PyTorchModelHubMixin = type("Mixin", (), {"__init_subclass__": lambda *_, **__: None})  # type: ignore[attr-defined]
    operations.AttentionBias, operations.fmha = object, None  # type: ignore[attr-defined]
    patcher.Patcher = patcher.PatcherArgs = None  # type: ignore[attr-defined]
    tokenizer = types.ModuleType("bytelatent.tokenizers.blt_tokenizer")
    tokenizer.BOE_ID = 0  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (hub, xformers, operations, patcher, tokenizer)}
    os.environ["BLT_ALLOW_MISSING_FLEX_ATTENTION"] = "1"
    sys.path.insert(0, str(clone))
    importlib.import_module("bytelatent.base_transformer").flex_attention_comp = flex_attention  # type: ignore[attr-defined]
    module = importlib.import_module("bytelatent.model.blt")
    module.create_block_mask = lambda *arguments, **options: create_block_mask(  # type: ignore[attr-defined]
        *arguments, **options | {"_compile": False, "device": "cpu"}
    )
    return module


def blt(clone: Path) -> None:
    """Run facebookresearch/blt on a row whose patches start at the ends of words, with FlexAttention uncompiled."""
    import torch  # noqa: PLC0415 Haiku's environment has none
    from torch.nn.attention import flex_attention as flex  # noqa: PLC0415

    authors, window = module_of_blt(clone), 5

    def masked(length: int, *_: Any, sliding_window: int | None = None, **__: Any) -> Any:
        width = sliding_window or length
        return flex.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < width), None, None, length, length, "cpu")

    importlib.import_module("bytelatent.model.local_models").create_causal_mask = masked  # type: ignore[attr-defined]
    arguments = {
        "vocab_size": 260,
        "dim_global": 16,
        "dim_local_encoder": 8,
        "dim_local_decoder": 8,
        "dim_token": 8,
        "n_layers_global": 2,
        "n_layers_local_encoder": 1,
        "n_layers_local_decoder": 2,
        "n_heads_global": 2,
        "n_heads_local_encoder": 2,
        "n_heads_local_decoder": 2,
        "multiple_of": 8,
        "rope_theta": 500_000.0,
        "max_seqlen": 24,
        "max_encoder_seq_length": 24,
        "local_attention_window_len": window,
        "patching_mode": "space",
        "patch_size": 6.0,
        "attn_impl": "flex_attention",
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_all_layers_decoder": True,
        "cross_attn_init_by_pooling": True,
        "cross_attn_k": 3,
        "cross_attn_nheads": 2,
        "downsampling_by_pooling": "max",
        "use_local_encoder_transformer": True,
        "encoder_hash_byte_group_size": [3, 4, 7],
        "encoder_hash_byte_group_vocab": 30,
        "encoder_hash_byte_group_nb_functions": 2,
    }
    model = authors.ByteLatentTransformer(authors.ByteLatentTransformerArgs(**arguments))
    weights = fill(model, {})
    text = "The cat, 日本. x2-y".encode()
    read = [1, *(byte + 4 for byte in text)]
    ends = [0, 4, 8, 13, 16, 20, len(read)]  # inputs at which patches end; the last one awaits the id after the row
    lengths = [1, *(later - earlier for earlier, later in itertools.pairwise(ends))]
    with torch.no_grad():
        logits = model(torch.tensor([read]), patch_lengths=torch.tensor([lengths]))
    save("blt", arguments, weights, ids=np.array([read]), logits=logits[:, -12:].numpy())


def hnet(clone: Path) -> None:
    """Run goombalab/hnet with two stages, and state-spaces/mamba, whose clone is CLONE/mamba, without their kernels."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    sys.path.insert(0, str(HERE.parents[1]))
    from tests.parity import hnet_kernels as kernels  # noqa: PLC0415

    kernels.install(clone, clone / "mamba")
    config = importlib.import_module("hnet.models.config_hnet")
    importlib.import_module("hnet.modules.mha").FlashCausalSelfAttention.forward = kernels.attend
    authors = importlib.import_module("hnet.models.mixer_seq")

    backbone = importlib.import_module("hnet.models.hnet")
    backbone.DeChunkLayer = partial(backbone.DeChunkLayer, dtype=torch.float32, headdim=8)  # their kernel has bf16

    @dataclass
    class SmallMamba(config.SSMConfig):
        """Sizes of Mamba-2 layers, with that of heads."""

        d_state: int = 6
        headdim: int = 8

    arguments = {
        "arch_layout": ["m1", ["T1", ["t1"], "m1"], "t1"],
        "d_model": [8, 8, 12],
        "d_intermediate": [0, 128, 0],
        "vocab_size": 258,
    }
    attention = config.AttnConfig(num_heads=[2, 2, 2], rotary_emb_dim=[2, 2, 2], window_size=[4, 4, -1])
    sizes = config.HNetConfig(**arguments, ssm_cfg=SmallMamba(), attn_cfg=attention)
    model = authors.HNetForCausalLM(sizes)
    for module in model.modules():
        if hasattr(module, "use_mem_eff_path"):
            module.use_mem_eff_path = False  # the convolution and the scan one after the other
    weights = fill(model, {})
    ids = random_ids(2, 12, 256)
    with torch.no_grad():
        read = torch.from_numpy(np.concatenate([np.full((2, 1), 256), ids[:, :-1]], 1))
        output = model(read, mask=torch.ones_like(read, dtype=torch.bool))
    starts = [stage.boundary_mask for stage in output.bpred_output]
    margins = [(stage.boundary_prob[..., 1] - 0.5).abs().min() for stage in output.bpred_output]
    assert min(margins) > 1e-4, "rounding could move a boundary"
    assert all(1 < mask.sum() < mask.numel() for mask in starts)
    save("hnet", arguments, weights, ids=ids, logits=output.logits.numpy())


def attention_of_lingua(clone: Path) -> None:
    """Make facebookresearch/lingua importable, with plain torch in place of the attention of xformers."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    class Window:
        """Mask by which a position sees itself and `window_left` positions before it."""

        def __init__(self, window_left: int, window_right: int) -> None:
            assert not window_right
            self.window_left = window_left

    def attend(q: Any, k: Any, v: Any, attn_bias: Window) -> Any:
        """Return attention over (rows, n, heads, width)."""
        age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        visible = (age >= 0) & (age <= attn_bias.window_left)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2)

    attention = types.SimpleNamespace(
        memory_efficient_attention=attend,
        attn_bias=types.SimpleNamespace(LocalAttentionFromBottomRightMask=Window),
    )
    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "lingua.metrics", "lingua.probe")
    modules = {name: types.ModuleType(name) for name in names}
    modules["xformers.ops"].fmha = attention  # type: ignore[attr-defined]
    modules["xformers.ops"].AttentionBias = modules["xformers.ops.fmha"].AttentionBias = Window  # type: ignore[attr-defined]
    modules["lingua.metrics"].get_num_params = lambda _: 0  # type: ignore[attr-defined]
    modules["lingua.probe"].log_stats = lambda x, _: x  # type: ignore[attr-defined]
    sys.modules |= modules
    sys.path.insert(0, str(clone))
    importlib.import_module("lingua").probe = modules["lingua.probe"]  # type: ignore[attr-defined]


def au_net(clone: Path) -> None:
    """Run the AU-Net of facebookresearch/lingua on rows with a long word and too many words for its capacities."""
    import torch  # noqa: PLC0415 Haiku's environment has none

    attention_of_lingua(clone)
    authors = importlib.import_module("apps.aunet.hierarchical")
    texts = [b"A, c supercalifragilis d e f", b"one, two (three) four 5 7a-b"]
    arguments = {
        "dimensions": [8, 8, 12],
        "head_dims": [4, 4, 6],
        "layers": [1, 1, 1],
        "sliding_windows": [5, 3, 28],
        "max_seqlens": [28, 5, 2],
        "vocab_size": 123,  # up to z
    }
    block = authors.BaseTransformerArgs(rope_theta=500_000.0, multiple_of=8)
    model = authors.HierarchicalTransformer(authors.HierarchicalArgs(**arguments, block=block))
    weights = fill(model, {})
    for trans in model.transitions:
        trans.position.copy_(torch.arange(trans.seqlen_in))
    for stack in (*model.encoders, *model.decoders, model.trunk):
        stack.rope_embeddings.reset_parameters()
    found = []
    model.vocab.register_forward_hook(lambda _, __, logits: found.append(logits))
    ids = torch.tensor([list(text) for text in texts])
    levels = torch.zeros_like(ids)
    for row, text in enumerate(texts):  # input i reads byte i - 1
        is_word = [chr(byte).isalnum() for byte in text]
        starts = [0, *(at + 1 for at in range(1, 27) if is_word[at - 1] and not is_word[at])]
        for number, place in enumerate(starts):
            levels[row, place] = 2 - number % 2
    with torch.no_grad():
        model(torch.nn.functional.pad(ids[:, :-1], (1, 0)), levels, ids, levels)
    save("au_net", arguments, weights, ids=ids.numpy(), logits=found[0].numpy())


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]).absolute())
