"""Golden vector of Perceiver IO: the authors' weights give their logits."""

import torch

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.models import build_model, model_config
from tests.parity.test_parity import vector


@torch.no_grad()
def test_perceiver_io_has_the_logits_of_the_authors_code():
    golden = vector("perceiver_io")
    theirs, encoder, decoder = golden.weights, golden.arguments["encoder"], golden.arguments["decoder"]
    latents = {"width": encoder["v_channels"], "layers": 2, "heads": encoder["num_self_attend_heads"]}
    config = model_config(
        {
            "family": "perceiver_io",
            "sequence_length": decoder["output_index_dims"],
            "latents": encoder["z_index_dim"],
            "latent_model": latents,
            "repeats": encoder["num_blocks"],
            "input_width": decoder["v_channels"],
            "cross_heads": decoder["num_heads"],
            "query_key_width": encoder["qk_channels"],
        }
    )
    model = build_model(config).eval()
    symbols = torch.tensor([*range(6, 262), 5, 0, 3])  # theirs: bytes, the separator, padding and the mask
    weights = {
        "read.table.weight": theirs["embed/embeddings"][symbols],
        "head_bias": theirs["embedding_decoder/bias"][symbols[:VOCABULARY]],
        "read.learned": theirs["trainable_position_encoding/pos_embs"],
        "latents": theirs["perceiver_encoder/~/trainable_position_encoding/pos_embs"],
        "queries": theirs["basic_decoder/~/trainable_position_encoding/pos_embs"],
    }
    blocks = {
        "input_blocks.0": "perceiver_encoder/~/cross_attention",
        "latent_blocks.0": "perceiver_encoder/~/self_attention",
        "latent_blocks.1": "perceiver_encoder/~/self_attention_1",
        "output_block": "basic_decoder/cross_attention",
    }
    for own, block in blocks.items():
        norms = ["attention_norm", "input_norm", "feed_forward_norm"]
        for number, norm in enumerate([norms[0], norms[2]] if own.startswith("latent") else norms):
            name = f"{block}/layer_norm" + (f"_{number}" if number else "")
            weights |= {f"{own}.{norm}.weight": theirs[f"{name}/scale"], f"{own}.{norm}.bias": theirs[f"{name}/offset"]}
        maps = [("attention", "attention", ["query", "key", "value", "output"])]
        maps += [("mlp", "feed_forward", ["expand", "contract"])]
        for module, layer, linears in maps:
            for number, linear in enumerate(linears):
                name = f"{block}/{module}/linear" + (f"_{number}" if number else "")
                weights[f"{own}.{layer}.{linear}.weight"] = theirs[f"{name}/w"].T
                weights[f"{own}.{layer}.{linear}.bias"] = theirs[f"{name}/b"]
    model.load_state_dict(weights)
    given = torch.empty(262, dtype=torch.long).index_put((symbols,), torch.arange(len(symbols)))[golden.ids]
    expected, present = golden.logits[..., symbols[:VOCABULARY]], given != PADDING  # theirs at padding read nothing
    torch.testing.assert_close(model.logits(model.encode(given))[present], expected[present], atol=1e-5, rtol=1e-5)
