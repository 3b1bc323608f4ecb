"""Models of comparison.py, by size: trees of the section `model` without what all share."""

from typing import Any

import torch

from pretrain.models import build_model, model_config

CONTEXT = 1024
"""Default context, for which the sizes were chosen."""
SEGMENT = 512
"""Longest row of a Transformer-XL, which reaches further by its memory; its attention holds all pairs of a row."""
STD = {"initial_std": 0.02}
PATCHES = 224
"""Patches that a row may have where the data decides. Words of English books have 5.5 bytes, with their spaces: 187 in
a row."""
FIXED = 6
"""Bytes of a fixed patch."""
BY_ENTROPY = "BLT, patches by entropy"
"""Model whose patches need a model of bytes; its section `model` lacks that model's export and the threshold."""


def sizes(layers: int, width: int, heads: int) -> dict[str, int]:
    """Return the fields of a stack."""
    return {"layers": layers, "width": width, "heads": heads}


def spacebyte(local: dict[str, int], wide: dict[str, int], window: int) -> dict[str, Any]:
    """Return a SpaceByte."""
    stacks = {"local_model": local, "global_model": wide, "window": window}
    return {"family": "spacebyte", "patches": PATCHES, **stacks}


def by_spaces(tree: dict[str, Any]) -> dict[str, Any]:
    """Return an H-Net of one stage whose patches start at the ends of words."""
    (stage,) = tree["stages"]
    return tree | {"stages": [stage | {"patcher": {"name": "byte_class"}, "patches": PATCHES}]}


def fixed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a model with patches of FIXED bytes, and no more of them than a row has."""
    patches = {"patcher": {"name": "fixed", "size": FIXED}, "patches": -(-CONTEXT // FIXED)}
    return tree | ({"stages": [stage | patches for stage in tree["stages"]]} if "stages" in tree else patches)


def blt(
    encoder_layers: int, decoder_layers: int, local: dict[str, int], wide: dict[str, int], window: int
) -> dict[str, Any]:
    """Return a BLT whose patches start at the ends of words."""
    depth = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    stacks = {"local_model": local | depth, "global_model": wide, "window": window}
    return {"family": "blt", "patches": PATCHES, **stacks, "ngrams": {"buckets": 4096}}


def hnet(outer: str, width: int, main: dict[str, Any], state: int, *stages: tuple[int, int]) -> dict[str, Any]:
    """Return an H-Net whose stages have a layout and learned patches, each with its mean size and patches of a row."""
    learned = [
        {
            "width": width,
            "encoder": outer if not number else "m1",
            "decoder": outer if not number else "m1",
            "patcher": {"name": "learned", "size": size},
            "patches": patches,
        }
        for number, (size, patches) in enumerate(stages)
    ]
    mamba = {"head_width": 32, "state": state, "chunk": 32}
    return {"family": "hnet", "stages": learned, "main": main, "mamba": mamba}


def au_net(width: int, inner: int, layers: int) -> dict[str, Any]:
    """Return an AU-Net of bytes, words and pairs of words: stages of one block before and one after patches."""
    block = {"encoder": "T1", "decoder": "T1", "join": "multi_linear"}
    words = {"width": width, "heads": width // 64, "window": width, "patcher": {"name": "byte_class"}}
    pairs = {"width": inner, "heads": inner // 64, "patcher": {"name": "fixed", "size": 2}, "places": 2}
    main = {"layers": f"T{layers}", "width": 2 * width, "heads": width // 32}
    return {
        "family": "hnet",
        "stages": [words | block | {"patches": PATCHES}, pairs | block | {"patches": 128}],
        "main": main,
        "rotary": {"fraction": 1.0, "base": 500_000.0},
        "rate_multipliers": [1.0, 1.0, 1.0],
        "initial_std": None,
    }


SMALL: dict[str, dict[str, Any]] = {
    "MEGABYTE": {
        "family": "megabyte",
        "patch_size": 8,
        "global_model": sizes(3, 512, 8),
        "local_model": sizes(2, 128, 2),
        **STD,
    },
    "Perceiver AR": {
        "family": "perceiver_ar",
        "latents": 256,
        "latent_model": sizes(5, 256, 4),
        "cross_heads": 4,
    },
    "Transformer": {"family": "transformer", **sizes(3, 144, 3), **STD},
    "Transformer, window 128": {"family": "transformer", **sizes(3, 192, 3), "window": 128, **STD},
    "Transformer-XL": {"family": "transformer_xl", "memory_length": 256, **sizes(2, 144, 3)},
    "Mamba-2": {"family": "mamba", "width": 192, "layers": 5, "state": 64, "chunk": 32},
    "SpaceByte": spacebyte(sizes(4, 128, 2), sizes(4, 256, 4), 128),
    "SpaceByte, patches of 6": fixed(spacebyte(sizes(4, 128, 2), sizes(4, 256, 4), 128)),
    "BLT, patches by spaces": blt(1, 2, {"width": 128, "heads": 2}, sizes(4, 256, 4), 128),
    "H-Net": hnet("m2", 128, {"layers": "T4", "width": 256, "heads": 4}, 64, (6, 256)),
    "H-Net, two stages": hnet("m2", 128, {"layers": "T4", "width": 256, "heads": 4}, 64, (3, 512), (3, 192)),
    "AU-Net": au_net(128, 256, 5),
}
"""About 3.3 million operations a byte."""
TINY: dict[str, dict[str, Any]] = {
    "MEGABYTE": {
        "family": "megabyte",
        "patch_size": 8,
        "global_model": sizes(3, 192, 4),
        "local_model": sizes(1, 64, 1),
        **STD,
    },
    "Transformer": {"family": "transformer", **sizes(2, 48, 1), **STD},
    "Transformer, window 128": {"family": "transformer", **sizes(2, 80, 2), "window": 128, **STD},
    "Mamba-2": {"family": "mamba", "width": 80, "layers": 3, "head_width": 32, "state": 32, "chunk": 32},
    "SpaceByte": spacebyte(sizes(2, 64, 1), sizes(2, 128, 2), 64),
    "SpaceByte, patches of 6": fixed(spacebyte(sizes(2, 64, 1), sizes(2, 128, 2), 64)),
    "BLT, patches by spaces": blt(1, 1, {"width": 64, "heads": 1}, sizes(2, 128, 2), 64),
    "H-Net": hnet("m1", 64, {"layers": "T2", "width": 128, "heads": 2}, 32, (6, 256)),
    "H-Net, two stages": hnet("m1", 64, {"layers": "T2", "width": 128, "heads": 2}, 32, (3, 512), (3, 192)),
    "AU-Net": au_net(64, 64, 2),
}
"""About half a million operations a byte."""
MODELS = {"small": SMALL, "tiny": TINY}
for models in MODELS.values():
    models["H-Net, patches by spaces"] = by_spaces(models["H-Net"])
    models["H-Net, patches of 6"] = fixed(models["H-Net"])
    models["BLT, patches of 6"] = fixed(models["BLT, patches by spaces"])
    models[BY_ENTROPY] = models["BLT, patches by spaces"] | {"patcher": {"name": "entropy"}}
CONTROLS = ("AU-Net", "H-Net, patches", "BLT, patches of", "Perceiver", "Transformer-XL")
MAIN = [name for name in SMALL if not name.startswith(CONTROLS)]
"""Models that are compared by default: without those of other families, and without controls."""
BYTE_MODELS: dict[str, dict[str, Any]] = {
    "small": {"family": "transformer", **sizes(1, 96, 2), "window": 64, **STD},
    "tiny": {"family": "transformer", **sizes(1, 64, 1), "window": 64, **STD},
}
"""Models of bytes whose entropies decide where the patches of BY_ENTROPY start, by size: 0.32 and 0.16 million FLOPs a
byte."""
RATES = {"small": 1e-3, "tiny": 4e-3}
"""Peak learning rate by size."""


def model_tree(size: str, name: str, context: int) -> dict[str, Any]:
    """Return the section `model` of a recipe. A Perceiver AR has a quarter of the context as latents.

    With a context above the default, a Transformer-XL has rows of SEGMENT bytes and a memory as long. The patches of a
    row grow with the context.
    """
    tree = _tree(context, MODELS[size][name])
    if "latents" in tree:
        tree["latents"] = context // 4
    if "patches" in tree:
        tree["patches"] = tree["patches"] * context // CONTEXT
    if "stages" in tree:
        tree["stages"] = [stage | {"patches": stage["patches"] * context // CONTEXT} for stage in tree["stages"]]
    if "memory_length" in tree and context > CONTEXT:
        tree["sequence_length"] = tree["memory_length"] = SEGMENT
    return tree


def byte_model_tree(size: str, context: int) -> dict[str, Any]:
    """Return the section `model` of the recipe of a model of bytes."""
    return _tree(context, BYTE_MODELS[size])


def _tree(context: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {"sequence_length": context, "dropout": 0.0, **fields}


def flops_per_byte(tree: dict[str, Any]) -> float:
    """Return the operations of training on a byte; see `ByteModel.step_flops`."""
    length = tree["sequence_length"]
    with torch.device("meta"):
        return build_model(model_config(tree)).step_flops(length) / length
