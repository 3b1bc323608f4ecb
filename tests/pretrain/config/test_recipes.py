"""Catalogue of recipes: sizes and costs of their models."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pretrain.cli.app import app
from pretrain.config.catalogue import CatalogueEntry, read_recipes
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.estimate.activations import on_meta
from pretrain.models import all_families, build_model
from tests.test_project import ROOT

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def recipes() -> dict[str, CatalogueEntry]:
    return {r.path.relative_to(CONFIGS).with_suffix("").as_posix(): r for r in read_recipes(CONFIGS)}


@pytest.mark.slow
def test_every_family_has_a_debug_recipe_with_the_listed_size(recipes: dict[str, CatalogueEntry]):
    debug = {recipe.family: recipe for name, recipe in recipes.items() if name.endswith("debug")}
    assert debug.keys() == all_families().keys()
    for recipe in debug.values():
        assert build_model(load(recipe.path).model).parameter_count() == recipe.parameters


TABLE_15 = {
    # recipe: (global width, layers, local width, layers), batch, rate, context, patch
    "text": ((2048, 14, 1024, 18), 48, 2e-4, 8192, 8),
    "text-without-local": ((2560, 20, None, 0), 48, 1.5e-4, 8192, 4),
    "text-without-global": ((None, 0, 1024, 24), 192, 2e-4, 8192, 8),
    "text-without-cross-patch": ((2048, 17, 1024, 24), 48, 2e-4, 8192, 8),
    "text-with-convolution": ((2048, 13, 1024, 18), 48, 2e-4, 8192, 8),
    "image64-best": ((None, 32, 1024, 24), 2, 2e-4, 12_288, 12),
    "image64": ((None, 24, 2048, 24), 256, 3e-4, 12_288, 12),
    "image256": ((768, 12, 768, 12), 16, 2e-4, 196_608, 192),
    "image256-without-local": ((None, 32, None, 0), 16, 2e-4, 196_608, 48),
    "image256-without-global": ((None, 0, 768, 12), 16, 2e-4, 196_608, 192),
    "image256-without-cross-patch": ((None, 24, 768, 15), 16, 2e-4, 196_608, 192),
    "image256-with-convolution": ((768, 12, 768, 12), 16, 2e-4, 196_608, 192),
    "image640": ((768, 12, 768, 8), 32, 3e-4, 1_228_800, 192),
    "audio": ((1024, 24, 768, 12), 256, 2e-4, 524_288, 32),
    "audio-without-local": ((4096, 32, None, 0), 256, 2e-4, 524_288, 32),
    "audio-without-global": ((None, 0, 768, 12), 256, 2e-4, 524_288, 32),
    "audio-without-cross-patch": ((1024, 24, 768, 14), 256, 2e-4, 524_288, 32),
    "audio-with-convolution": ((1024, 24, 768, 12), 256, 2e-4, 524_288, 32),
}
"""MEGABYTE's rows of table 15 of arXiv:2305.07185. None: the table has no value, or not a multiple of the patch."""
BASELINES = {
    # recipe: width, layers, batch, rate, context, latents
    "transformer/text": (1024, 22, 72, 2e-4, 1024, None),
    "transformer/image64": (1536, 24, 512, 3e-4, 2048, None),
    "transformer/image256": (768, 6, 1536, 2e-4, 1024, None),
    "transformer/image640": (768, 8, 4800, 3e-4, 1024, None),
    "transformer/audio": (768, 13, 2048, 2e-4, 1024, None),
    "perceiver_ar/text-228m": (1024, 17, 72, 2e-4, 8192, 1024),
    "perceiver_ar/image64": (1024, 16, 512, 3e-4, 12_288, 1024),
    "perceiver_ar/image256": (768, 6, 256, 2e-4, 8192, 768),
    "perceiver_ar/image640": (768, 6, 2048, 3e-4, 4096, 1024),
    "perceiver_ar/audio": (768, 6, 384, 2e-4, 8192, 1024),
}
"""Rows of the baselines in the same table."""


@pytest.mark.parametrize("name", TABLE_15)
def test_megabyte_recipes_equal_the_rows_of_table_15(name: str):
    (width, layers, local_width, local_layers), batch, rate, context, patch = TABLE_15[name]
    config = load(CONFIGS / f"megabyte/{name}.yaml")
    model = config.model
    assert (model.global_model.layers, model.local_model.layers) == (layers, local_layers)
    assert width in (None, model.global_model.width)
    assert local_width in (None, model.local_model.width)
    assert (model.sequence_length, model.patch_size) == (context, patch)
    assert (config.train.global_batch, config.optimizer.learning_rate) == (batch, rate)
    assert (model.cross_patch_bytes == 0) == ("without-local" in name or "cross-patch" in name)
    assert (model.patch_encoder == "convolution") == ("convolution" in name)


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_recipes_equal_the_rows_of_table_15(name: str):
    width, layers, batch, rate, context, latents = BASELINES[name]
    config = load(CONFIGS / f"{name}.yaml")
    stack = config.model.latent_model if latents else config.model
    assert (stack.width, stack.layers, config.model.sequence_length) == (width, layers, context)
    assert (config.train.global_batch, config.optimizer.learning_rate) == (batch, rate)
    assert latents in (None, getattr(config.model, "latents", None))


@pytest.mark.parametrize(
    ("size", "layers", "width", "heads"),
    [
        ("125m", 12, 768, 12),
        ("350m", 24, 1024, 16),
        ("760m", 24, 1536, 16),
        ("1.3b", 24, 2048, 32),
        ("2.7b", 32, 2560, 32),
        ("6.7b", 32, 4096, 32),
    ],
)
def test_sizes_equal_those_of_table_14(
    recipes: dict[str, CatalogueEntry], size: str, layers: int, width: int, heads: int
):
    model = load(CONFIGS / f"transformer/size-{size}.yaml").model
    assert (model.layers, model.width, model.heads) == (layers, width, heads)
    recipe = recipes[f"transformer/size-{size}"]
    assert recipe.printed == size.upper()
    assert recipe.parameters == pytest.approx(12 * layers * width**2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "parameters", "printed", "remark"),
    [
        ("perceiver_ar/imagenet64", 770_094_339, "770.1M", None),  # arXiv:2202.07765
        ("perceiver_io/base", 201e6, "201M", None),  # arXiv:2107.14795, UTF-8 bytes
        ("transformer_xl/enwik8-12-layers", 41e6, "41M", None),  # arXiv:1901.02860, table 2
        ("transformer_xl/enwik8-24-layers", 277e6, "277M", None),
        ("megabyte/text", 704.6e6 + 226.5e6, "758M + 262M", "nominal"),  # 12 L D^2; the paper's names are larger
        ("transformer/text", 276.8e6, "320M", "nominal"),
        ("megabyte/books-10m", 10e6, None, None),
        ("hnet/1-stage-l-spaces", 850e6, "850M", None),  # arXiv:2507.07955, table 1
        ("mamba/fineweb-190m", 185e6, "190M", "nominal"),
    ],
)
def test_models_of_papers_have_the_sizes_of_the_papers(
    recipes: dict[str, CatalogueEntry], name: str, parameters: float, printed: str | None, remark: str | None
):
    recipe = recipes[name]
    assert recipe.parameters == pytest.approx(parameters, rel=0 if name == "perceiver_ar/imagenet64" else 0.01)
    assert recipe.printed == printed
    assert (recipe.printed_remark or "").startswith(remark or "")


@pytest.mark.parametrize(
    ("name", "widths", "layers"), [("2-levels", (512, 2048, 3456), (3, 6, 12)), ("1-level", (512, 2048), (3, 25))]
)
def test_au_net_recipes_have_the_blocks_of_the_authors_files(name: str, widths: tuple[int, ...], layers: list[int]):
    """Parameters by `estimate_non_embed_param_count` of apps/aunet/hierarchical.py in facebookresearch/lingua."""
    with torch.device("meta"):
        model = build_model(load(CONFIGS / f"hnet/au-net-2b-{name}.yaml").model)
    expected = 0
    for width, number, times in zip(widths, layers, [2] * (len(widths) - 1) + [1], strict=True):
        hidden = -(-int(2 * 4 * width / 3) // 256) * 256
        expected += times * number * (4 * width**2 + 3 * width * hidden)
    assert expected == {"2-levels": 2_356_936_704, "1-level": 1_304_952_832}[name]
    assert sum(p.numel() for unit in model.units() for p in unit.parameters() if p.dim() == 2) == expected


def test_every_printed_result_says_mode_stride_and_split_or_that_the_paper_does_not(
    recipes: dict[str, CatalogueEntry],
):
    for name, recipe in recipes.items():
        assert (recipe.result is None) == (recipe.evaluation is None), name
        how, _, split = (recipe.evaluation or "mode, stride; test").partition("; ")
        assert any(word in how for word in ("windows", "sliding", "memory", "mode")), name
        assert "stride" in recipe.evaluation if recipe.evaluation else True, name
        assert any(word in (split or how) for word in ("test", "validation", "split not stated", "fresh")), name


@pytest.mark.parametrize(
    ("name", "in_blocks", "bytes_per_patch", "per_byte", "read"),
    [
        ("pg19-201m", (201e6, 50e6), 6, 196e6, 1e19 / (3 * 196e6)),
        ("github-151m", (151e6, 38e6), 8, 132e6, 1e19 / (3 * 132e6)),
        ("pg19-793m", (793e6, 184e6), 8192 / 1344, 728e6, 30e9),
    ],
)
def test_spacebyte_recipes_have_the_sizes_cost_and_bytes_of_tables_1_to_3(
    name: str, in_blocks: tuple[float, float], bytes_per_patch: float, per_byte: float, read: float
):
    """arXiv:2404.14408. Its appendix counts 12 L D² weights, W keys a byte and all patches a patch."""
    config = load(CONFIGS / f"spacebyte/{name}.yaml")
    model = config.model
    wide, local = model.global_model, model.local_model
    weights = [12 * stack.layers * stack.width**2 for stack in (wide, local)]
    assert weights == pytest.approx(in_blocks, rel=0.01)
    assert model.sequence_length / model.patches == pytest.approx(bytes_per_patch)
    of_patch = 2 * weights[0] + 4 * wide.layers * model.patches * wide.width
    of_byte = 2 * (weights[1] + 256 * local.width) + 4 * local.layers * model.window * local.width
    assert of_patch / bytes_per_patch + of_byte == pytest.approx(per_byte, rel=0.005)
    train = config.train
    assert train.steps * train.global_batch * model.sequence_length == pytest.approx(read, rel=0.005)
    assert model.parametrization == "fan_in"
    assert config.optimizer.learning_rate == pytest.approx(0.005 * train.global_batch**0.5)


def test_perceiver_ar_of_megabytes_table_3_reads_400_billion_bytes_with_the_sizes_of_the_text_row():
    own, text = (load(CONFIGS / f"perceiver_ar/{name}.yaml") for name in ("pg19-228m", "text-228m"))
    assert own.model == text.model and own.optimizer == text.optimizer
    assert own.train.steps * own.train.global_batch * own.model.sequence_length == pytest.approx(400e9, rel=1e-6)


def test_rounded_widths_are_those_that_the_guide_names():
    rounded = {"image64": (2048, 2112), "image64-best": (2560, 2496), "image256-without-local": (4096, 4032)}
    guide = (ROOT / "docs/guides/training/models.md").read_text(encoding="utf-8")
    for name, (printed, width) in rounded.items():
        model = load(CONFIGS / f"megabyte/{name}.yaml").model
        assert model.global_model.width == width and printed % model.patch_size
        assert f"{printed:,} to {width:,} (`{name}`)" in guide


def test_printed_size_that_differs_from_the_true_size_has_a_remark(recipes: dict[str, CatalogueEntry]):
    units = {"M": 1e6, "B": 1e9}
    for name, recipe in recipes.items():
        if recipe.printed is not None and recipe.printed_remark is None:
            printed = sum(float(part[:-1]) * units[part[-1]] for part in recipe.printed.split(" + "))
            assert recipe.parameters == pytest.approx(printed, rel=0.01), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE_15 if not name.endswith("convolution")])
def test_parts_of_megabyte_have_12_l_d_squared_weights(name: str):
    config = load(CONFIGS / f"megabyte/{name}.yaml").model
    stacks = [config.global_model, config.local_model]
    weights = sum(12 * stack.layers * stack.width**2 for stack in stacks)
    norms = sum(2 * (2 * stack.layers + 1) * stack.width for stack in stacks)
    byte_width, local_width = config.global_model.width // config.patch_size, config.local_model.width
    tables = (258 + config.sequence_length) * byte_width + (258 + config.patch_size) * local_width
    pads_and_conditioning = config.global_model.width + local_width + byte_width * local_width
    assert on_meta(config).parameter_count() == weights + norms + tables + pads_and_conditioning


def test_megabyte_text_model_and_its_transformer_cost_the_same_per_byte(recipes: dict[str, CatalogueEntry]):
    """The paper controls for compute: SpaceByte (arXiv:2404.14408) counts 645M and 646M over 12 L D^2 weights."""
    assert recipes["megabyte/text"].flops_per_byte == pytest.approx(645e6, rel=0.005)
    assert recipes["transformer/text"].flops_per_byte == pytest.approx(646e6, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "less"),
    [
        ("debug", (), 0),
        ("transformer/debug", ("model.window=null",), 0),
        ("perceiver_ar/debug", ("model.latents=64",), 0),
        # The table of distances has no gradient, so its projection has one product less in each layer.
        ("transformer_xl/debug", ("model.memory_length=0",), 2 * 2 * 64 * 128**2),
    ],
)
def test_training_costs_three_forward_passes_and_one_more_product_of_logits(
    name: str, overrides: tuple[str, ...], less: int
):
    """The counter of torch agrees in bf16 on a CPU, with rows so short that attention is explicit products."""
    config = load(CONFIGS / f"{name}.yaml", ["model.sequence_length=64", "model.dropout=0.0", *overrides]).model
    torch.manual_seed(0)
    model = build_model(config).to(torch.bfloat16).train()
    ids = torch.randint(0, 256, (1, config.sequence_length))
    with FlopCounterMode(display=False) as counter:
        model(ids).mean().backward()
    scored = len(range(*model.scored(config.sequence_length).indices(config.sequence_length)))
    logits = 2 * scored * model.head_weights()[0].numel()
    assert counter.get_total_flops() == model.step_flops(config.sequence_length) + logits - less


@pytest.mark.slow
def test_models_command_lists_every_family_and_recipe(recipes: dict[str, CatalogueEntry]):
    command = ["models", "--recipes", str(CONFIGS)]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    for family in all_families():
        assert f"{family}: " in shown.output
    lines = shown.output.splitlines()
    for name, recipe in recipes.items():
        own = name.removeprefix(f"{recipe.family}/")
        size = f" {recipe.parameters / 1e6:,.1f} "
        assert any(line.split()[:1] and line.split()[0].endswith(own) and size in line for line in lines), name
    written = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert [entry["parameters"] for entry in written] == [recipe.parameters for recipe in recipes.values()]


def test_folder_without_recipes_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no recipe"):
        read_recipes(tmp_path)
