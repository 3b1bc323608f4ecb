"""Public API: its names, and the modules that `import byteloom` imports."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml

import byteloom
from byteloom.overrides import as_overrides
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.vocabulary import VOCABULARY
from pretrain.config.errors import ConfigError
from pretrain.evaluation.generation import SamplingError
from pretrain.evaluation.scores import EvaluationError
from tests.commands import run_here
from tests.conftest import recipe_tree

HEAVY = {"torch", "numpy", "pydantic", "data_pipeline", "pretrain", "launchers"}


def test_import_byteloom_imports_no_heavy_package():
    script = "import sys, byteloom; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_public_name_exists():
    assert set(byteloom.__all__) <= set(dir(byteloom))
    for name in byteloom.__all__:
        assert getattr(byteloom, name) is not None


def test_guide_names_only_what_exists():
    guide = (Path(__file__).parents[1] / "docs/guides/use/python.md").read_text()
    assert set(re.findall(r"byteloom\.(\w+)[(`:.]", guide)) <= set(byteloom.__all__)
    for name, owner in (("model", byteloom.Model), ("stream", byteloom.Stream), ("corpus", byteloom.open_corpus)):
        methods = set(re.findall(rf"(?m)^ *(?:for \w+ in )?{name}\.(\w+)\(", guide))
        assert methods and methods <= set(dir(owner)), name


def test_version_is_that_of_the_installed_distribution():
    assert byteloom.__version__ == version("byteloom")


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'byteloom' has no attribute 'prepair'"):
        byteloom.prepair  # noqa: B018


def test_api_prepares_and_opens_a_corpus(tmp_path: Path):
    (tmp_path / "source.txt").write_bytes(b"thirty bytes of a short source")
    byteloom.prepare([tmp_path / "source.txt"], tmp_path / "out", byteloom.PrepareOptions())
    with byteloom.open_corpus(tmp_path / "out") as corpus:
        assert corpus.raw_bytes == 30
        [document] = corpus.documents()
    assert (document.key, document.modality) == ("source.txt", "text")
    assert document.content == b"thirty bytes of a short source"


def test_documents_of_a_corpus_are_whole_and_withdrawn_ones_are_skipped(mixed: Corpus):
    """Blocks of 300 bytes cut the longest documents."""
    found = {document.key: document.content for document in mixed.documents()}
    tree = Path(mixed.location).parent / "tree"
    assert found == {f"tree/{path.relative_to(tree)}": path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    withdraw(mixed, ["tree/all"], 1, lambda done, total: None)
    with byteloom.open_corpus(mixed.location) as corpus:
        assert {document.key for document in corpus.documents()} == found.keys() - {"tree/all"}


def test_overrides_name_sections_or_fields():
    assert as_overrides({"train": {"steps": 50}}) == as_overrides({"train.steps": 50}) == ["train.steps=50"]
    assert as_overrides({"data": {"shards": Path("a b")}, "engine.device": None}) == [
        'data.shards="a b"',
        "engine.device=null",
    ]
    assert as_overrides({"validation": {"corpora": {}}}) == ["validation.corpora={}"]


@pytest.fixture(scope="module")
def run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two starts, which `byteloom.train` trained."""
    folder = tmp_path_factory.mktemp("api")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    byteloom.train(recipe, run={"root": folder}, train={"steps": 2}, validation={"every": 100})
    return byteloom.train(recipe, run={"root": folder}, train={"steps": 3}, validation={"every": 100})


@pytest.fixture(scope="module")
def model(run: Path) -> byteloom.Model:
    return byteloom.load(run, device="cpu")


@pytest.mark.slow
def test_train_returns_the_folder_of_a_run_that_has_all_its_steps(run: Path):
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert "resumes after step 2" in (run / "train.log").read_text()
    with pytest.raises(ConfigError, match=r"train.step is not a field"):
        byteloom.train("debug", train={"step": 50})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("device", "tpu"), ("precision", "fp64"), ("begin", "end")])
def test_load_names_the_choices(run: Path, name: str, value: str):
    with pytest.raises(EvaluationError, match=f"{name} is {value}; it must be one of "):
        byteloom.load(run, **{name: value})


@pytest.mark.slow
def test_bits_of_bytes_add_up_to_what_eval_prints(model: byteloom.Model, run: Path, corpus_folder: Path):
    code, out = run_here("eval", run, corpus_folder / "validation", "--by", "none", "--json")
    assert code == 0
    printed = json.loads(out[out.index("{") :])["total"]["bits_per_byte"]
    with byteloom.open_corpus(corpus_folder / "validation") as corpus:
        bits = np.concatenate([model.bits(document.content) for document in corpus.documents()])
        assert len(bits) == corpus.raw_bytes
    assert bits.mean() == pytest.approx(printed, rel=1e-6)
    assert model.bits_per_byte(corpus_folder / "validation") == pytest.approx(printed, rel=1e-12)


@pytest.mark.slow
def test_bits_per_byte_of_bytes_and_of_a_file_agree(model: byteloom.Model, tmp_path: Path):
    data = Path(__file__).read_bytes()
    (tmp_path / "file.py").write_bytes(data)
    assert model.bits_per_byte(data) == pytest.approx(model.bits_per_byte(tmp_path / "file.py"), rel=1e-12)
    assert model.bits_per_byte(data, mode="sliding") == pytest.approx(model.bits(data, mode="sliding").mean(), rel=1e-6)
    assert len(model.bits(b"")) == 0
    with pytest.raises(EvaluationError, match="no byte"):
        model.bits_per_byte(b"")
    with pytest.raises(EvaluationError, match="does not support mode memory"):
        model.bits(data, mode="memory")
    with pytest.raises(EvaluationError, match="mode is slow; it must be one of windows, "):
        model.bits(data, mode="slow")
    with pytest.raises(EvaluationError, match="stride is 0; it must be at least 1"):
        model.bits(data, stride=0)


@pytest.mark.slow
def test_the_working_folder_may_be_the_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = max((run / "checkpoints").glob("step-*"))
    monkeypatch.chdir(checkpoint)
    assert byteloom.load(".", device="cpu").bits(b"data").shape == (4,)


@pytest.mark.slow
def test_text_in_place_of_bytes_is_an_error_that_says_what_to_do(model: byteloom.Model):
    for name, use in (("data", model.bits), ("context", model.next), ("prompt", model.generate)):
        with pytest.raises(TypeError, match=rf"{name} is of the type str, and a model reads bytes; encode it: {name}"):
            use("text")


def test_train_outside_the_main_thread_is_refused_before_it_begins():
    with ThreadPoolExecutor(1) as pool, pytest.raises(byteloom.CorrectableError, match="outside the main thread"):
        pool.submit(byteloom.train, "debug").result()


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 5, 126])  # a separator, and these bytes fill the context
def test_next_is_the_distribution_that_bits_are_measured_by(model: byteloom.Model, length: int):
    context = Path(__file__).read_bytes()[:length]
    distribution = model.next(context)
    assert distribution.shape == (VOCABULARY,)
    assert distribution.sum() == pytest.approx(1)
    assert model.bits(context + b"e")[-1] == pytest.approx(-np.log2(distribution[ord("e")]), rel=1e-4)


@pytest.mark.slow
def test_next_reads_the_end_of_a_context_that_is_too_long(model: byteloom.Model):
    context = Path(__file__).read_bytes()
    assert np.array_equal(model.next(context), model.next(context[-(model.sequence_length - 1) :]))


@pytest.mark.slow
def test_generate_yields_the_bytes_of_the_command(model: byteloom.Model, run: Path, tmp_path: Path):
    options = ["--bytes", 40, "--temperature", 0.8, "--seed", 3, "--device", "cpu", "--out", tmp_path]
    assert run_here("generate", run, "--prompt", "def ", *options)[0] == 0
    [file] = tmp_path.iterdir()
    pieces = list(model.generate(b"def ", bytes=40, temperature=0.8, seed=3))
    assert {len(piece) for piece in pieces} == {1}
    assert b"".join(pieces) == file.read_bytes()
    with pytest.raises(SamplingError, match="temperature is -1"):
        model.generate(temperature=-1)
    with pytest.raises(SamplingError, match="bytes is 0"):
        model.generate(bytes=0)


@pytest.mark.slow
def test_stream_has_the_rows_that_a_run_has_read_and_will_read(run: Path, corpus_folder: Path):
    with byteloom.Stream(run) as begun, byteloom.Stream(run / "config.yaml") as planned:
        for step in (1, 3, 4, 100):
            assert np.array_equal(begun.rows(step), planned.rows(step))
        rows, number = begun.rows(2), 6
        assert rows.shape == (6, begun.sequence_length)
        assert all(np.array_equal(row, begun[number + index]) for index, row in enumerate(rows))
        assert begun.tensor(2).tolist() == rows.tolist()
    code, out = run_here("inspect", run, "--step", 2, "--row", 1, "--json")
    assert code == 0
    assert json.loads(out[out.index("{") :])["row"]["sequence"] == number + 1
