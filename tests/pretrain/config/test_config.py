"""Config: valid values, invalid values, and their error messages."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint import CheckpointConfig
from pretrain.config.errors import ConfigError
from pretrain.config.explanation import explain
from pretrain.config.fields import all_fields
from pretrain.config.loading import load, with_overrides
from pretrain.config.schema import Config
from pretrain.models import all_families
from pretrain.models.families.transformer import TransformerConfig
from tests.conftest import Run, recipe_tree
from tests.test_project import ROOT

FAMILIES = (
    "'blt', 'encoder', 'encoder_decoder', 'hnet', 'mamba', 'megabyte', 'perceiver_ar', 'perceiver_io', 'spacebyte', "
    "'transformer' or 'transformer_xl'"
)


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
        "optimizer: {schedule: {warmup_steps: 1}}\n"
    )
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(file, overrides)
    return str(error.value)


def test_overrides_replace_values_of_the_file_and_defaults_fill_the_rest(file: Path):
    config = load(file, ["train.steps=50", "optimizer.learning_rate=3e-4", "tracking.uri=null", "run.name=b"])
    assert config.train.steps == 50
    assert config.optimizer.learning_rate == 3e-4
    assert config.run.name == "b"
    assert config.optimizer.beta2 == 0.98


def test_config_is_immutable(file: Path):
    with pytest.raises(ValueError, match="frozen"):
        load(file).train.steps = 3


@pytest.mark.parametrize("name", ["a", "3e-4", "007", "1.5", "null", "true", "on", "2026-01-01"])
def test_shown_config_loads_to_the_same_config(file: Path, tmp_path: Path, name: str):
    config = load(file, [f"run.name='{name}'", "optimizer.learning_rate=1e-8"])
    assert config.run.name == name
    again = tmp_path / "again.yaml"
    again.write_text(config.as_yaml())
    assert load(again) == config


def test_error_of_an_unknown_key_names_the_nearest_key_and_the_line(file: Path):
    file.write_text(file.read_text().replace("patch_size", "pach_size"))
    assert refusal(file) == (f"{file}:6: model.pach_size is not a field of MegabyteConfig (did you mean patch_size?)")


def test_error_of_an_unknown_key_in_an_override_names_the_override(file: Path):
    assert refusal(file, "train.stepz=5") == (
        "override train.stepz=5: train.stepz is not a field of TrainConfig (did you mean steps?)"
    )


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.steps=many", 'train.steps is "many"; it must be a whole number, such as 8'),
        ("train.steps='50'", 'train.steps is "50"; it must be a whole number: 50, without quotes'),
        ("train.steps=1.5", "train.steps is 1.5; it must be a whole number, such as 8"),
        ("train.steps=true", "train.steps is true; it must be a whole number, such as 8"),
        ("train.steps=0", "train.steps is 0; it must be at least 1"),
        ("model.family=lstm", f'model.family is "lstm"; it must be {FAMILIES}'),
        ("model.family=3", f"model.family is 3; it must be {FAMILIES}"),
        ("model=3", "model is 3; it must be a section"),
        ("model.global_model.heads=5", "heads (5) does not divide width (32)"),
        ("model.patch_size=5", "sequence_length (64) is not a multiple of patch_size (5)"),
        ("run.name=../x", "run.name"),
        ("train", "is not of the form section.field=value"),
        ("train.steps.x=1", "steps is a value, not a section"),
        ("train.steps=[", "the value is not YAML"),
    ],
)
def test_error_of_a_wrong_value_names_the_override(file: Path, override: str, fault: str):
    message = refusal(file, override)
    assert fault in message
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
    "model", ["family: transformer_xl, memory_length: 0", "family: transformer, attention_across_documents: false"]
)
def test_pairs_are_refused_for_models_whose_attention_stops_at_separators(file: Path, model: str):
    size = "sequence_length: 64, width: 32, layers: 2, heads: 2"
    overrides = (f"model={{{model}, {size}}}", "objective.name=conditional", "data.packing=document")
    assert "stops" in (message := refusal(file, *overrides))
    assert "one stands between the source and the target of objective.name conditional" in message


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ("optimizer.name=muon", "engine.name=zero1"),
            "optimizer.name muon works on whole matrices, which engine.name",
        ),
        (("engine.activation_checkpointing=budget",), "mode budget needs compile"),
        (
            ("model.attention_across_documents=false", "data.separate_documents=false"),
            "stops attention at separators, and data.separate_documents false writes none",
        ),
        (
            (
                "model.attention_across_documents=false",
                "data.shards=null",
                "data.mixture={a: {shards: x}, b: {shards: y, separate_documents: false}}",
            ),
            "set data.mixture.b.separate_documents to true",
        ),
        (("engine.activation_checkpointing=selective", "engine.compile=true"), "take budget, or full"),
        (("engine.precision=fp8", "engine.name=zero2"), "precision fp8 is for ddp, fsdp and hsdp, not for zero2"),
        (("engine.activation_checkpointing=fll",), 'engine.activation_checkpointing.mode is "fll"; it must be'),
        (("engine.activation_checkpointing=true",), "engine.activation_checkpointing is true; it must be a section"),
        (("engine.activation_checkpointing={mod: full}",), "CheckpointingConfig (did you mean mode?)"),
        (
            ("engine.compile=true", "engine.activation_checkpointing={mode: budget, every: 2}"),
            "mode budget is for all blocks",
        ),
    ],
)
def test_contradictory_values_are_refused_in_one_line(file: Path, overrides: tuple[str, ...], fault: str):
    message = refusal(file, *overrides)
    assert fault in message
    assert "\n" not in message


def test_checkpointing_mode_alone_replaces_its_section(file: Path):
    short = load(file, ["engine.activation_checkpointing=full"])
    assert short == load(file, ["engine.activation_checkpointing.mode=full"])
    named = load(file, ["engine.activation_checkpointing={mode: full, every: 2, stacks: [global]}"])
    assert named.engine.activation_checkpointing.stacks == ("global",)


def test_error_of_a_wrong_type_in_the_file_names_its_line(file: Path):
    file.write_text(file.read_text().replace("sequence_length: 64", "sequence_length: long"))
    assert refusal(file).startswith(f'{file}:5: model.sequence_length is "long"')


def test_missing_field_is_named(file: Path):
    file.write_text(file.read_text().replace("  sequence_length: 64\n", ""))
    assert refusal(file) == f"{file}:4: model.sequence_length is missing"


def test_repeated_key_is_refused(file: Path):
    file.write_text(file.read_text().replace("  patch_size: 4\n", "  patch_size: 4\n  patch_size: 8\n"))
    assert refusal(file) == f"{file}:7: model.patch_size is given twice, first at {file}:6"


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [", "a: 'b"])
def test_file_that_is_not_a_recipe_is_refused(file: Path, text: str):
    file.write_text(text)
    assert refusal(file).startswith(str(file))


@pytest.mark.parametrize("content", [b"run: \xff", b"run: \x00", b"run: \x07"])
def test_file_that_is_not_text_is_refused(file: Path, content: bytes):
    file.write_bytes(content)
    assert refusal(file).startswith(str(file))


def test_missing_recipe_is_refused(tmp_path: Path):
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
def test_plain_values_follow_yaml_1_2(file: Path, text: str, value: object):
    field = "optimizer.learning_rate" if not isinstance(value, str) else "tracking.experiment"
    tree = load(file, [f"{field}={text}"]).as_tree()
    section, name = field.split(".")
    assert tree[section][name] == value


def test_explain_shows_description_type_default_and_bounds():
    text = explain("optimizer.beta2")
    assert text.startswith("optimizer.beta2: float, default 0.98, at least 0, less than 1\n")
    assert "squared gradients" in text
    assert "model.global_model.width: int, required, at least 1" in explain("model")
    assert explain("data.shards").startswith("data.shards: str | null, default null\n")
    with pytest.raises(ConfigError, match=r"did you mean model.patch_size\?"):
        explain("model.patchsize")


def test_explain_covers_every_family():
    assert "In PerceiverARConfig:\nmodel.latents: int, default 1024, at least 1\n" in explain("model.latents")
    assert "In MegabyteConfig:\nmodel.sequence_length: int, required" in explain("model.sequence_length")
    assert "In PerceiverARConfig:\nmodel.sequence_length: int, required" in explain("model.sequence_length")
    assert explain("model.sequence_length").count("model.sequence_length: int, required") == len(all_families())
    assert "model.latent_model.width: int, required, at least 1" in explain("model")


def test_faults_of_a_family_name_its_own_fields(file: Path):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.steps=1e3", "train.steps is 1000.0; it must be a whole number: 1000, without a point or an exponent"),
        ("train.steps=null", "train.steps is null; it must be a whole number, such as 8"),
        ("train.seed=-1", "train.seed is -1; it must be at least 0"),
        ("train.seed=1e400", "train.seed is inf; it must be a finite number"),
        ("train.steps=10000000000000000000", "train.steps is 1e+19; it must be less than 2^63"),
        ("optimizer.learning_rate=fast", 'optimizer.learning_rate is "fast"; it must be a number, such as 0.1'),
        ("optimizer.learning_rate=0", "optimizer.learning_rate is 0; it must be more than 0"),
        ("optimizer.beta1=1", "optimizer.beta1 is 1; it must be less than 1"),
        ("engine.activation_checkpointing.budget=2", "budget is 2; it must be at most 1"),
        ("optimizer.name=adamm", "it must be 'adamw', 'adam' or 'muon' (did you mean adam?)"),
        ("tracking.enabled=yes", 'tracking.enabled is "yes"; it must be true or false'),
        ("run.name=2024", """run.name is 2024; it must be text; in a shell: run.name="'2024'\""""),
        ("run.name=[a]", 'run.name is ["a"]; it must be text'),
        ("run.name=../x", "it must have only letters, digits, . _ and -, and begin with a letter or a digit"),
        ("data.shards=''", 'data.shards is ""; it must not be empty'),
        ("engine.activation_checkpointing.stacks=global", 'is "global"; it must be a list, such as [global]'),
        ("data.stages=5", "data.stages is 5; it must be a list, such as [{step: …, weights: …}]"),
        ("data.stages=[5]", "data.stages.0 is 5; it must be a section, such as {step: …, weights: …}"),
        ("data.mixture=5", "data.mixture is 5; it must be a mapping, such as {name: {shards: …}}"),
        ("data.mixture={a: 5}", "data.mixture.a is 5; it must be a section, such as {shards: …}"),
        ("engine.deepspeed=5", "engine.deepspeed is 5; it must be a mapping, such as {name: value}"),
        ("model.global_model=5", "it must be a section, such as {width: …, layers: …, heads: …}"),
        ("optimizer.schedule=null", "optimizer.schedule is null; it must be a section, such as {shape: …}"),
        (
            "run.name=!!binary aGk=",
            "run.name is of the YAML type bytes; it must be a number, text, a list or a section",
        ),
        ('run.name="\\ud800"', "it must be UTF-8 text"),
        ("run.name=\udcff", "it is not UTF-8 text"),
        ("train.steps=" + "9" * 5000, "a number has too many digits"),
        ("train.steps=" + "9" * 300, "train.steps is 1e+300; it must be less than 2^63"),
        ("data.shards=1e999", "data.shards is inf; it must be a finite number"),
        ("data.stages=&a [*a]", "a value is nested too deeply, or contains itself"),
        ("train.steps=[" + "0, " * 5000 + "0]", "…; it must be a whole number, such as 8"),
    ],
)
def test_error_of_a_wrong_value_names_the_expected_values(file: Path, override: str, fault: str):
    message = refusal(file, override)
    assert fault in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.slow
def test_no_wrong_value_shows_a_message_of_pydantic(file: Path):
    """Give each field of each section a value of each kind."""
    tree = load(file).as_tree()
    values = ([1], {"a": 1}, "x", True, 3, 1.5, None, [[1]], [{"q": 1}], {"a": {}}, "", -1, 10**30, math.inf)
    for path, _ in all_fields(Config, ()):
        for value in values:
            changed = copy.deepcopy(tree)
            node = changed
            for section in path[:-1]:
                node = node.setdefault(section, {})
            node[path[-1]] = value
            try:
                with_overrides(changed, (), "tree")
            except ConfigError as error:
                assert "nput should" not in str(error) and "ield required" not in str(error), f"{path} {value}: {error}"


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_numbers_of_a_recipe_must_be_finite(file: Path, number: float):
    tree = load(file).as_tree()
    names = [path for path, field in all_fields(Config, ()) if "float" in str(field.annotation)]
    assert {("optimizer", "clip_norm"), ("supervise", "step_seconds"), ("model", "initial_std")} <= set(names)
    within = [("data", "mixture", "a", "weight"), ("engine", "deepspeed", "zero_optimization", "ratio")]
    for path in [*names, *within]:
        changed = copy.deepcopy(tree)
        node = changed
        for section in path[:-1]:
            node = node.setdefault(section, {})
        node[path[-1]] = number
        with pytest.raises(ConfigError, match=rf"{'.'.join(path)} is {number}; it must be a finite number"):
            with_overrides(changed, (), "tree")


def test_time_beyond_the_range_of_timers_is_refused(file: Path):
    assert "meeting_seconds is 1e+300; it must be at most 1e+09" in refusal(file, "launch.meeting_seconds=1e300")


@pytest.mark.parametrize(
    ("overrides", "origin", "fault"),
    [
        (
            ["train.steps=50", "optimizer.schedule.warmup_steps=50"],
            1,
            "warmup_steps (50) must be less than train.steps",
        ),
        (
            ["train.steps=1", "tracking.uri=null"],
            0,
            "optimizer.schedule.warmup_steps (1) must be less than train.steps",
        ),
        (["optimizer={}"], 0, "optimizer.schedule.warmup_steps (500) must be less than train.steps (10)"),
        (["optimizer.schedule={shape: wsd, warmup_steps: 5, decay_fraction: 0.9}"], 0, "must be at most 0.5"),
        (["engine.context=3"], 0, "engine.context (3) does not divide the "),
        (["train.steps=100000000000", "run.name=b"], 0, "is 4e+11 sequences; a run can read 274,877,906,944 at most"),
    ],
)
def test_error_of_a_mismatch_names_the_origin_of_one_of_its_fields(
    file: Path, overrides: list[str], origin: int, fault: str
):
    message = refusal(file, *overrides)
    assert message.startswith(f"override {overrides[origin]}: ")
    assert fault in message


def test_context_of_a_family_whose_rows_cannot_be_cut_is_refused(file: Path):
    size = "sequence_length: 64, width: 8, layers: 1, heads: 1, memory_length: 0"
    message = refusal(file, f"model={{family: transformer_xl, {size}}}", "engine.context=2")
    assert "which megabyte, perceiver_ar and transformer support, not transformer_xl" in message


def test_scaled_model_with_adapters_is_refused(file: Path):
    message = refusal(
        file,
        "optimizer={scaling: mup, schedule: {warmup_steps: 1}}",
        "optimizer.base={global_model: {width: 16, heads: 1}}",
        "finetune={freeze: ['*'], adapters: {layers: ['*']}}",
    )
    assert "optimizer.scaling mup has no rules for adapters; set it to standard" in message


def test_all_mismatches_are_reported_together(file: Path):
    lines = refusal(file, "optimizer.schedule.warmup_steps=20", "optimizer.name=muon", "engine.name=zero1").splitlines()
    assert len(lines) == 2


def test_unusual_values_are_accepted_with_a_warning(file: Path):
    assert load(file).warnings() == []
    (rate, decay) = load(file, ["optimizer.learning_rate=3e3"]).warnings()
    assert rate.field == "optimizer.learning_rate" and rate.text.endswith(
        "is 3000, and few models train with more than 1; did you mean 3e-3?"
    )
    assert decay.text.startswith("optimizer.weight_decay (0.1) times optimizer.learning_rate (3000) is 300")
    assert [each.field for each in load(file, ["optimizer.epsilon=1e8"]).warnings()] == ["optimizer.epsilon"]
    assert [each.field for each in load(file, ["train.micro_batch=9"]).warnings()] == ["train.micro_batch"]


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], "decays after step 80, and the run keeps no checkpoint"),
        (["checkpoint.keep_every=40"], None),
        (["checkpoint.keep_every=30"], None),  # step 60
        (["checkpoint.keep_every=90"], "such as 80"),
        (["checkpoint.keep=null"], None),
        (["checkpoint.keep=3"], None),  # steps 80, 90 and 100
        (["checkpoint.every=90", "checkpoint.keep=null"], "set checkpoint.every to at most 80"),
        (["optimizer.schedule.shape=constant"], None),
        (["optimizer.schedule.decay_steps=100", "optimizer.schedule.decay_fraction=null"], None),
    ],
)
def test_wsd_run_that_keeps_no_checkpoint_before_its_decay_gets_a_hint(
    file: Path, overrides: list[str], advice: str | None
):
    base = ["train.steps=100", "optimizer.schedule={shape: wsd, warmup_steps: 0}", "checkpoint={every: 10, keep: 2}"]
    found = {fault.field: fault.text for fault in load(file, [*base, *overrides]).warnings()}
    assert found.keys() == ({"checkpoint.keep_every"} if advice else set())
    assert advice is None or advice in found["checkpoint.keep_every"]


@given(st.integers(1, 12), st.none() | st.integers(1, 6), st.none() | st.integers(1, 12), st.integers(1, 60))
def test_oldest_kept_checkpoint_is_the_first_that_retention_leaves(
    every: int, keep: int | None, keep_every: int | None, steps: int
):
    saved = sorted({*range(every, steps + 1, every), steps})
    newest = saved if keep is None else saved[-keep:]
    kept = {*newest, *(step for step in saved if keep_every and step % keep_every == 0)}
    assert CheckpointConfig(every=every, keep=keep, keep_every=keep_every).oldest_kept(steps) == min(kept)


def test_shipped_recipes_with_wsd_keep_a_checkpoint_before_the_decay():
    recipes = [path for path in (ROOT / "configs").rglob("*.yaml") if "shape: wsd" in path.read_text(encoding="utf-8")]
    assert len(recipes) >= 5
    assert [fault for path in recipes for fault in load(path).warnings() if "checkpoint" in fault.field] == []


def test_home_folder_is_expanded_in_every_path_of_a_recipe(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/u")
    paths = ("run.root", "data.shards", "data.remote.cache", "validation.shards", "checkpoint.home")
    paths += ("initialize.weights", "tracking.uri")
    tree = load(file, [f"{path}=~/x" for path in paths]).as_tree()
    for path in paths:
        value: Any = tree
        for name in path.split("."):
            value = value[name]
        assert value == "/home/u/x", path
    mixed = load(file, ["data={mixture: {a: {shards: ~/x}, b: {shards: s3://~/x}}}"]).data.mixture
    assert [mixed["a"].shards, mixed["b"].shards] == ["/home/u/x", "s3://~/x"]
    assert load(file, ["tracking.uri=sqlite:///~/m.db"]).tracking.uri == "sqlite:////home/u/m.db"
    assert load(file, ["run.root=./~"]).run.root == "./~"
    assert 'data.shards is "~nobody-here/x"; no home folder is known' in refusal(file, "data.shards=~nobody-here/x")


def test_schema_describes_the_fields():
    schema = Config.model_json_schema()
    assert schema["$defs"]["MegabyteConfig"]["properties"]["patch_size"]["description"].startswith(
        "P: bytes of a patch"
    )
    assert schema["additionalProperties"] is False


@pytest.mark.slow
def test_config_commands_print_machine_readable_output(byteloom: Run, recipe: Path, corpus_folder: Path):
    shown = yaml.safe_load(byteloom("config", "show", recipe, "train.steps=7").stdout)
    expected = recipe_tree(corpus_folder)["model"]
    assert shown["train"]["steps"] == 7
    assert shown["model"] | expected == shown["model"]
    assert "properties" in json.loads(byteloom("config", "schema").stdout)
    assert "bytes of a patch" in byteloom("config", "explain", "model.patch_size").stdout
