"""One process that takes training steps of one model, ours or another library's, for models.py.

    models.py ─▶ python contender.py mblm bf16 …     one process per contender, so that memory is measured alone
              ─▶ an empty line                        a request for a step
              ◀─ {"seconds": …, "peak_bytes": …}      the answer

For another library the process needs torch and that library, and nothing of Byteloom. All contenders do the same work:
forward and backward over one batch of random bytes, clipping of the gradient's norm, and a fused AdamW. Each has the
sizes below, as nearly as its library allows. Words after the precision are settings:

    cast        (bf16) weights and optimizer in bf16; without it, fp32 weights under autocast
    flash       the library's fused attention
    compile     torch.compile of the whole model; block by block for ours
    recompute   (ours, mblm) activation checkpointing
    drop        (ours, Perceiver AR) 7/8 of the inputs are dropped, as in the paper's model of books
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

QUICK_OPTION = "--quick"
"""Option of this process and of models.py that makes the batch smaller."""
BATCH, LENGTH = (1, 2048) if QUICK_OPTION in sys.argv else (2, 8192)
PATCH = 8
LATENTS = 1024
GLOBAL_WIDTH, GLOBAL_LAYERS, GLOBAL_HEADS = 512, 8, 8
LOCAL_WIDTH, LOCAL_LAYERS, LOCAL_HEADS = 256, 4, 4
RECOMPUTED_CHUNKS = 8
"""Chunks in which mblm recomputes its local stage."""
VOCABULARY = 258
PADDING = 257

Loss = Callable[[Tensor], Tensor]
"""Function from (rows, LENGTH) ids to a scalar loss."""
Build = Callable[[Tensor, str, list[str]], tuple[Callable[[], object], dict[str, object]]]
"""Function from ids, precision and settings to a step and facts about the model."""


def main() -> None:
    name, precision, *settings = (word for word in sys.argv[1:] if word != QUICK_OPTION)
    modules, build = CONTENDERS[name]
    for module in modules:
        import_module(module)
    before = resident_bytes()
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (BATCH, LENGTH))
    step, facts = build(ids, precision, settings)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ours(family: str) -> Build:
    """Return the function that builds a model of ours."""

    def build(ids: Tensor, precision: str, settings: list[str]) -> tuple[Callable[[], object], dict[str, object]]:
        from batch import random_batch
        from pretrain.engines import EngineConfig, build_engine
        from pretrain.models import build_model, model_config
        from pretrain.optim import OptimizerConfig

        wide = {"width": GLOBAL_WIDTH, "layers": GLOBAL_LAYERS, "heads": GLOBAL_HEADS}
        narrow = {"width": LOCAL_WIDTH, "layers": LOCAL_LAYERS, "heads": LOCAL_HEADS}
        sizes = {"global_model": wide, "local_model": narrow, "patch_size": PATCH}
        if family == "perceiver_ar":
            # The peer scores the last positions. An earlier crop would see fewer inputs.
            sizes = {"latents": LATENTS, "latent_model": wide, "cross_heads": GLOBAL_HEADS, "cropping": "none"}
            if "drop" in settings:
                sizes["cross_attend_dropout"] = 0.875
        tree = {"family": family, "sequence_length": LENGTH, "dropout": 0.0}
        model = build_model(model_config(tree | sizes))
        options = {
            "activation_checkpointing": "full" if "recompute" in settings else "none",
            "compile": "compile" in settings,
        }
        config = EngineConfig.model_validate({"precision": precision} | options)
        engine = build_engine(config, model, OptimizerConfig(), seed=0)
        batch = random_batch(*ids.shape)
        facts = {"parameters": model.parameter_count(), "flops": 3 * BATCH * model.flops(LENGTH)}
        return lambda: engine.train_step(batch, step=0, learning_rate=1e-4), facts

    return build


def peer(library: str, make: Callable[[bool, bool], tuple[nn.Module, Loss]]) -> Build:
    """Return the function that builds a model of another library."""

    def build(ids: Tensor, precision: str, settings: list[str]) -> tuple[Callable[[], object], dict[str, object]]:
        model, loss = make("flash" in settings, "recompute" in settings)
        if "cast" in settings:
            model.bfloat16()
        if "compile" in settings:
            model.compile()
        autocast = precision == "bf16" and "cast" not in settings
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(ids)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step, {"parameters": sum(p.numel() for p in model.parameters()), "version": version(library)}

    return build


def megabyte_pytorch(flash: bool, recompute: bool) -> tuple[nn.Module, Loss]:
    from MEGABYTE_pytorch import MEGABYTE

    model = MEGABYTE(
        num_tokens=VOCABULARY,
        dim=(GLOBAL_WIDTH, LOCAL_WIDTH),
        depth=(GLOBAL_LAYERS, LOCAL_LAYERS),
        max_seq_len=(LENGTH // PATCH, PATCH),
        dim_head=GLOBAL_WIDTH // GLOBAL_HEADS,
        heads=GLOBAL_HEADS,  # one number for both stages
        pad_id=PADDING,
        pos_emb=True,
        flash_attn=flash,
    )
    return model, lambda ids: model(ids, return_loss=True)


def mblm(flash: bool, recompute: bool) -> tuple[nn.Module, Loss]:
    from mblm import MBLM, MBLMModelConfig, MBLMReturnType, TransformerBlock

    def block(width: int, heads: int) -> TransformerBlock:
        return TransformerBlock(
            attn_head_dims=width // heads,
            attn_num_heads=heads,
            attn_use_rot_embs=False,
            ff_multiplier=4,
            use_flash_attn=flash,
        )

    config = MBLMModelConfig(
        num_tokens=VOCABULARY,
        pad_token_id=PADDING,
        hidden_dims=[GLOBAL_WIDTH, LOCAL_WIDTH],
        num_layers=[GLOBAL_LAYERS, LOCAL_LAYERS],
        seq_lens=[LENGTH // PATCH, PATCH],
        train_checkpoint_chunks=[RECOMPUTED_CHUNKS] if recompute else None,
        block=[block(GLOBAL_WIDTH, GLOBAL_HEADS), block(LOCAL_WIDTH, LOCAL_HEADS)],
    )
    model = MBLM(config)
    return model, lambda ids: model(ids, return_type=MBLMReturnType.LOSS)


def perceiver_ar_pytorch(flash: bool, recompute: bool) -> tuple[nn.Module, Loss]:
    from perceiver_ar_pytorch import PerceiverAR

    model = PerceiverAR(
        num_tokens=VOCABULARY,
        dim=GLOBAL_WIDTH,
        depth=GLOBAL_LAYERS,
        max_seq_len=LENGTH,
        cross_attn_seq_len=LENGTH - LATENTS,
        heads=GLOBAL_HEADS,
        dim_head=GLOBAL_WIDTH // GLOBAL_HEADS,
        cross_attn_dropout=0.0,
        perceive_max_heads_process=GLOBAL_HEADS if flash else 2,
    )
    return model, lambda ids: model(ids, labels=ids.roll(-1, 1))


CONTENDERS = {
    "megabyte": (["pretrain.engines"], ours("megabyte")),
    "perceiver_ar": (["pretrain.engines"], ours("perceiver_ar")),
    "MEGABYTE-pytorch": (["MEGABYTE_pytorch"], peer("MEGABYTE-pytorch", megabyte_pytorch)),
    "mblm": (["mblm"], peer("mblm", mblm)),
    "perceiver-ar-pytorch": (["perceiver_ar_pytorch"], peer("perceiver-ar-pytorch", perceiver_ar_pytorch)),
}

if __name__ == "__main__":
    main()
