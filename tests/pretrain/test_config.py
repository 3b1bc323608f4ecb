"""One typed tree: what is accepted, what is refused, and how it is said."""

import json
from pathlib import Path

import pytest
import yaml

from pretrain.config import Config, ConfigError, explain, load
from pretrain.models.transformer import TransformerConfig
from tests.conftest import Run, recipe_tree

FAMILIES = "'megabyte' or 'perceiver_ar' or 'transformer' or 'transformer_xl'"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {name: a}\n"
        "data:\n"
        "  shards: corpus\n"
        "model:\n"
        "  sequence_length: 64\n"
        "  patch_size: 4\n"
        "  global_model: {width: 32, layers: 1, heads: 2}\n"
        "  local_model: {width: 16, layers: 1, heads: 2}\n"
        "train: {steps: 10, global_batch: 4, micro_batch: 2}\n"
    )
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(file, overrides)
    return str(refused.value)


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(file: Path):
    config = load(file, ["train.steps=50", "optimizer.learning_rate=3e-4", "tracking.uri=null", "run.name=b"])
    assert config.train.steps == 50
    assert config.optimizer.learning_rate == 3e-4
    assert config.run.name == "b"
    assert config.optimizer.beta2 == 0.98


def test_the_tree_is_immutable(file: Path):
    with pytest.raises(ValueError, match="frozen"):
        load(file).train.steps = 3


@pytest.mark.parametrize("name", ["a", "3e-4", "007", "1.5", "null", "true", "on", "2026-01-01"])
def test_what_is_shown_loads_to_the_same_config(file: Path, tmp_path: Path, name: str):
    config = load(file, [f"run.name='{name}'", "optimizer.learning_rate=1e-8"])
    assert config.run.name == name
    again = tmp_path / "again.yaml"
    again.write_text(config.as_yaml())
    assert load(again) == config


def test_an_unknown_key_names_the_nearest_right_one_and_its_line(file: Path):
    file.write_text(file.read_text().replace("patch_size", "pach_size"))
    assert refusal(file) == (f"{file}:6: model.pach_size is not a field of MegabyteConfig (did you mean patch_size?)")


def test_an_unknown_key_of_an_override_names_the_override(file: Path):
    assert refusal(file, "train.stepz=5") == (
        "override train.stepz=5: train.stepz is not a field of TrainConfig (did you mean steps?)"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", 'train.steps is "many"; input should be a valid integer'),
        ("train.steps='50'", 'train.steps is "50"; input should be a valid integer'),
        ("train.steps=1.5", "train.steps is 1.5; input should be a valid integer"),
        ("train.steps=true", "train.steps is true; input should be a valid integer"),
        ("train.steps=0", "train.steps is 0; input should be greater than or equal to 1"),
        ("model.family=lstm", f'model.family is "lstm"; input should be {FAMILIES}'),
        ("model.family=3", f"model.family is 3; input should be {FAMILIES}"),
        ("model=3", "model is 3; input should be a section"),
        ("model.global_model.heads=5", "heads (5) does not divide width (32)"),
        ("model.patch_size=5", "sequence_length (64) is not a multiple of patch_size (5)"),
        ("run.name=../x", "run.name"),
        ("train", "is not of the form section.field=value"),
        ("train.steps.x=1", "steps is a value, not a section"),
        ("train.steps=[", "the value is not YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_the_override(file: Path, override: str, said: str):
    message = refusal(file, override)
    assert said in message
    assert override in message
    assert "\n" not in message


def test_each_family_has_its_own_fields(file: Path):
    lines = [line for line in file.read_text().splitlines() if "patch_size" not in line and "_model" not in line]
    lines[4:4] = ["  family: transformer", "  width: 32", "  layers: 2", "  heads: 2"]
    file.write_text("\n".join(lines))
    assert load(file, ["model.window=16"]).model == TransformerConfig(
        width=32, layers=2, heads=2, sequence_length=64, window=16
    )
    assert refusal(file, "model.windw=3") == (
        "override model.windw=3: model.windw is not a field of TransformerConfig (did you mean window?)"
    )
    assert "model.heads=5: model: heads (5) does not divide width (32)" in refusal(file, "model.heads=5")
    assert refusal(file, "model.family=transformer_xl").endswith("model.memory_length is missing")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("optimizer.name=muon", "engine.name=fsdp"), "optimizer.name muon works on whole matrices, which engine.name"),
        (("engine.activation_checkpointing=budget",), "mode budget needs compile"),
        (("engine.activation_checkpointing=selective", "engine.compile=true"), "take budget, or full"),
        (("engine.precision=fp8", "engine.name=zero2"), "precision fp8 is for ddp, fsdp and hsdp, not for zero2"),
        (("engine.activation_checkpointing=fll",), 'engine.activation_checkpointing.mode is "fll"; input should be'),
        (("engine.activation_checkpointing=true",), "engine.activation_checkpointing is true; input should be an obj"),
        (("engine.activation_checkpointing={mod: full}",), "CheckpointingConfig (did you mean mode?)"),
        (
            ("engine.compile=true", "engine.activation_checkpointing={mode: budget, every: 2}"),
            "mode budget is for all blocks",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(file: Path, overrides: tuple[str, ...], said: str):
    message = refusal(file, *overrides)
    assert said in message
    assert "\n" not in message


def test_the_mode_of_checkpointing_stands_for_its_section(file: Path):
    short = load(file, ["engine.activation_checkpointing=full"])
    assert short == load(file, ["engine.activation_checkpointing.mode=full"])
    named = load(file, ["engine.activation_checkpointing={mode: full, every: 2, stacks: [global]}"])
    assert named.engine.activation_checkpointing.stacks == ("global",)


def test_a_wrong_type_in_the_file_names_its_line(file: Path):
    file.write_text(file.read_text().replace("sequence_length: 64", "sequence_length: long"))
    assert refusal(file).startswith(f'{file}:5: model.sequence_length is "long"')


def test_a_missing_field_is_named(file: Path):
    file.write_text(file.read_text().replace("  sequence_length: 64\n", ""))
    assert refusal(file) == f"{file}:4: model.sequence_length is missing"


def test_a_key_given_twice_is_refused(file: Path):
    file.write_text(file.read_text().replace("  patch_size: 4\n", "  patch_size: 4\n  patch_size: 8\n"))
    assert refusal(file) == f"{file}:7: model.patch_size is given twice, first at {file}:6"


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [", "a: 'b"])
def test_a_file_that_is_no_recipe_is_refused(file: Path, text: str):
    file.write_text(text)
    assert refusal(file).startswith(str(file))


@pytest.mark.parametrize("content", [b"run: \xff", b"run: \x00", b"run: \x07"])
def test_a_file_that_is_no_text_is_refused(file: Path, content: bytes):
    file.write_bytes(content)
    assert refusal(file).startswith(str(file))


def test_a_missing_recipe_is_refused(tmp_path: Path):
    assert "No such file" in refusal(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2", 2),
        ("010", 10),
        ("on", "on"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(file: Path, text: str, value: object):
    field = "optimizer.learning_rate" if not isinstance(value, str) else "tracking.experiment"
    got = load(file, [f"{field}={text}"]).as_tree()
    section, name = field.split(".")
    assert got[section][name] == value


def test_explain_tells_meaning_type_default_and_bounds():
    text = explain("optimizer.beta2")
    assert text.startswith("optimizer.beta2: float, default 0.98, at least 0, less than 1\n")
    assert "squared gradients" in text
    assert "model.global_model.width: int, required, at least 1" in explain("model")
    with pytest.raises(ConfigError, match=r"did you mean model.patch_size\?"):
        explain("model.patchsize")


def test_explain_tells_of_every_family():
    assert explain("model.latents").startswith("model.latents: int, default 1024, at least 1\n")
    assert "In MegabyteConfig:\nmodel.sequence_length: int, required" in explain("model.sequence_length")
    assert "In PerceiverARConfig:\nmodel.sequence_length: int, required" in explain("model.sequence_length")
    assert explain("model.sequence_length").count("model.sequence_length: int, required") == 4
    assert "model.latent_model.width: int, required, at least 1" in explain("model")


def test_faults_of_another_family_are_told_by_its_own_fields(file: Path):
    file.write_text(
        file.read_text()
        .replace("  patch_size: 4\n", "  family: perceiver_ar\n  latens: 4\n")
        .replace("local", "latent")
    )
    lines = refusal(file).splitlines()
    assert f"{file}:7: model.latens is not a field of PerceiverARConfig (did you mean latents?)" in lines
    assert f"{file}:8: model.global_model is not a field of PerceiverARConfig (did you mean latent_model?)" in lines
    assert len(lines) == 2
    message = refusal(file, "model.latent_model.heads=3")
    assert "override model.latent_model.heads=3: model.latent_model: heads (3) does not divide width (16)" in message


def test_schema_describes_the_fields():
    schema = Config.model_json_schema()
    assert schema["$defs"]["MegabyteConfig"]["properties"]["patch_size"]["description"].startswith(
        "P: bytes of a patch"
    )
    assert schema["additionalProperties"] is False


def test_the_config_commands_print_what_programs_can_read(byteloom: Run, recipe: Path, corpus_folder: Path):
    shown = yaml.safe_load(byteloom("config", "show", recipe, "train.steps=7").stdout)
    expected = recipe_tree(corpus_folder)["model"]
    assert shown["train"]["steps"] == 7
    assert shown["model"] | expected == shown["model"]
    assert "properties" in json.loads(byteloom("config", "schema").stdout)
    assert "bytes of a patch" in byteloom("config", "explain", "model.patch_size").stdout
