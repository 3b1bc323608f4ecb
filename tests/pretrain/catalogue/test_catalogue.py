"""Laws of the catalogue of Transformers."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from byteloom.core.configs import recipe_names
from pretrain.catalogue import Grouping, grouped, lineage, read_catalogue
from pretrain.catalogue.entries import CatalogueError, parameters_of
from pretrain.catalogue.lineage import tree_lines
from pretrain.catalogue.picture import picture
from pretrain.cli.app import app
from tests.test_project import ROOT

OF_THE_ARTICLE = """
    ALBERT, AlexaTM 20B, Anthropic assistant, BART, BERT, BigBird, BLOOM, ChatGPT, Chinchilla, CLIP, CM3, CTRL, DALL-E,
    Decision Transformer, DialoGPT, DistilBERT, DQ-BART, ELECTRA, ERNIE, Flamingo, Galactica, Gato, GLaM, GLIDE, GC-ViT,
    Gopher, GopherCite, GPT, GPT-2, GPT-3, GPT-3.5, GPT-J, GPT-Neo, GPT-NeoX-20B, HTLM, Imagen, InstructGPT, Jurassic-1,
    LaMDA, mBART, Megatron, Minerva, MT-NLG, OPT, PaLM, Pegasus, RoBERTa, SeeKeR, Sparrow, Stable Diffusion, Swin,
    Switch, T0, T5, Trajectory Transformer, Transformer-XL, Turing-NLG, ViT, Wu Dao 2.0, XLM-RoBERTa, XLNet
"""
"""Models of arXiv:2302.07730."""
ENTRY = """
- name: {name}
  title: A title
  arxiv: "2001.00001"
  date: {date}
  lab: A lab
  family: GPT
  architecture: decoder
  task: causal
  extends: {extends}
  extension: Something.
  application: Something
  corpus: Something
  parameters: {parameters}
"""


def test_catalogue_has_the_models_of_the_article():
    assert {name.strip() for name in OF_THE_ARTICLE.split(",")} <= read_catalogue().keys()


def test_recipes_of_entries_exist_and_those_of_papers_with_recipes_are_named():
    named = {recipe for entry in read_catalogue().values() for recipe in entry.recipes}
    assert named <= set(recipe_names())
    assert {entry.name for entry in read_catalogue().values() if entry.recipes} >= {
        "Transformer-XL",
        "Sparse Transformer",
        "Perceiver AR",
        "MEGABYTE",
    }


@pytest.mark.parametrize("by", Grouping)
def test_groups_hold_every_entry_once_in_the_order_of_time(by: Grouping):
    groups = grouped(list(read_catalogue().values()), by)
    assert sorted(entry.name for group in groups.values() for entry in group) == sorted(read_catalogue())
    for group in groups.values():
        assert [entry.date for entry in group] == sorted(entry.date for entry in group)


def test_lineage_holds_every_entry_once_in_lines_of_at_most_60_columns():
    trees = lineage(read_catalogue())
    assert sorted(node.entry.name for tree in trees for node in tree.walk()) == sorted(read_catalogue())
    lines = list(tree_lines(trees))
    assert len(lines) == len(read_catalogue())
    assert max(map(len, lines)) <= 60
    (below,) = lineage(read_catalogue(), "Perceiver")
    assert [node.entry.name for node in below.walk()] == ["Perceiver", "Perceiver IO", "Perceiver AR"]


def test_picture_in_the_documentation_is_that_of_the_catalogue():
    """If this fails: python -m pretrain.catalogue.picture docs/assets/lineage.svg."""
    assert (ROOT / "docs/assets/lineage.svg").read_text(encoding="utf-8") == picture(lineage(read_catalogue()))


def test_commands_list_groups_draw_the_lineage_and_show_an_entry():
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["models", *words])
        assert done.exit_code == 0, done.output
        return done.output

    by_date = json.loads(run("--by", "date", "--json"))
    assert [entry["name"] for entry in by_date["2017"]] == ["Transformer"]
    assert "GPT-3 2020 + Sparse Transformer *" in run("--lineage")
    shown = run("about", "gpt-2")
    assert "enwik8: 0.93 bits per byte (zero-shot; test)" in shown
    assert "extended by" in shown
    refused = CliRunner().invoke(app, ["models", "about", "GTP-2"])
    assert refused.exit_code == 2
    assert "did you mean GPT-2" in refused.output


def test_sizes_are_numbers():
    assert [parameters_of(size) for size in ("12M", "1.5B", "1.6T")] == [12e6, 1.5e9, 1.6e12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": "2020-13"}, "New: date: String should match pattern"),
        ({"parameters": "[2B, 1M]"}, "not in rising order: 2B, 1M"),
        ({"parameters": "[about 1M]"}, "New: parameters.0"),
        ({"extends": "[Nothing]"}, "New extends Nothing, which is not in the catalogue"),
        ({"extends": "[Young]"}, r"New \(2020-02\) extends Young, which is younger"),
        ({"name": "Young"}, "Young is in the catalogue already"),
    ],
)
def test_wrong_entry_is_refused_by_its_name_and_field(change: dict[str, str], message: str, tmp_path: Path):
    right = {"name": "New", "date": "2020-02", "extends": "[]", "parameters": "[1M]"}
    young = ENTRY.format(**right | {"name": "Young", "date": "2021-01"})
    (tmp_path / "models.yaml").write_text(young + ENTRY.format(**right | change), encoding="utf-8")
    with pytest.raises(CatalogueError, match=message):
        read_catalogue(tmp_path)
