"""Commands as a user runs them, with valid input."""

import csv
import json
import math
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.reading import open_streams
from pretrain.checkpoint.format import digest_of
from pretrain.cli.app import app
from pretrain.config.loading import load
from pretrain.evaluation.words import count_words
from pretrain.terminal.tables import figure
from pretrain.training.run_folder import RunFolderError
from tests import commands
from tests.commands import BYTELOOM, environment
from tests.conftest import Run, recipe_tree, train_once


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a run of twelve steps, which tests only read."""
    return train_once(tmp_path_factory.mktemp("trained"), corpus_folder)


def test_inspect_shows_the_corpus_that_prepare_wrote(byteloom: Run, sources: list[Path], tmp_path: Path):
    prepared = byteloom("prepare", *sources, "--include", "*.py", "--holdout", "0.2", "--out", "out", "--json")
    assert "documents in" in prepared.stderr
    assert json.loads(prepared.stdout) == json.loads((tmp_path / "out/report.json").read_text())
    corpus = Corpus(tmp_path / "out/train")
    shown = byteloom("inspect", "out/train").stdout
    for text in (
        f"{corpus.manifest['documents']:,}",
        f"{corpus.raw_bytes:,}",
        "to 1",
        corpus.content_sha256,
        "begins:",
    ):
        assert text in shown
    first = corpus.read(0)
    assert first.slices[0].key in shown
    assert first.content[:50].decode() in shown
    with tarfile.open(tmp_path / "out/train/shard-000000.tar") as tar:
        assert tar.getnames()[0] == "000000-000000.bytes.zst"


def test_run_folder_explains_the_run(trained: Path):
    assert sorted(p.name for p in trained.iterdir()) == [
        ".lock", "checkpoints", "config.source.json", "config.yaml", "coverage.json", "generation",
        "metrics.jsonl", "run.json", "train.log",
    ]  # fmt: skip
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["activation"] == "relu"
    log = (trained / "train.log").read_text()
    assert "parameters, fp32 on cpu, one process" in log
    assert "step 12: validation" in log
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(13))
    assert [r["step"] for r in records if "validation/bits_per_byte" in r] == [0, 6, 12]
    assert records[0]["validation/bits_per_byte"] == pytest.approx(math.log2(258), abs=0.1)
    assert records[-1]["validation/bits_per_byte"] < records[0]["validation/bits_per_byte"] - 0.2
    assert {"bytes_per_second", "data_wait_share", "mfu", "peak_memory_bytes", "gradient_norm"} <= records[-1].keys()
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (4, 8, 12)]


def test_inspect_shows_the_origin_of_a_row(byteloom: Run, trained: Path, sources: list[Path]):
    shown = byteloom("inspect", trained, "--step", "7", "--row", "5").stdout
    assert "step 7, row 5: sequence 41 of the run" in shown
    key, first, last = re.search(r"^ *0-\d+ +(\S+) +([\d,]+)-([\d,]+)", shown, re.MULTILINE).groups()
    first, last = (int(number.replace(",", "")) for number in (first, last))
    content = {folder.name: folder for folder in sources}[key.split("/")[0]].parent.joinpath(key).read_bytes()
    config = load(trained / "config.yaml")
    stream = open_streams(config.data, config.model.sequence_length)["corpus"]
    arguments = ["inspect", str(trained), "--step", "7", "--row", "5", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)["row"]
    assert (found["sequence"], found["ids"]) == (41, 128)
    assert (found["origins"][0]["key"], found["origins"][0]["document_start"]) == (key, first)
    assert stream[41][: last - first + 1].astype("uint8").tobytes() == content[first : last + 1]


def test_corpus_with_a_relative_path_is_found_from_any_folder(
    byteloom: Run, recipe: Path, corpus_folder: Path, tmp_path: Path
):
    (tmp_path / "corpora").symlink_to(corpus_folder)
    byteloom("train", recipe, "train.steps=2", "data.shards=corpora/train", "validation.shards=null")
    (tmp_path / "elsewhere").mkdir()
    printed = [
        byteloom("inspect", "--replay", run, cwd=folder).stderr
        for folder, run in ((tmp_path, "runs/run"), (tmp_path / "elsewhere", "../runs/run"))
    ]
    assert printed[0].replace("runs/run", "../runs/run") == printed[1]
    row = byteloom(
        "inspect", tmp_path / "runs/run/checkpoints/step-00000002", "--step", "1", cwd=tmp_path / "elsewhere"
    )
    assert "sequence 0 of the run" in row.stdout


def test_replay_proves_which_data_a_run_read(byteloom: Run, trained: Path, tmp_path: Path):
    printed = byteloom("inspect", "--replay", trained).stderr
    assert "the run read exactly what it should have read until step 12: 72 sequences of 128 bytes" in printed
    checkpoint = shutil.copytree(trained / "checkpoints/step-00000008", tmp_path / "step-00000008")
    assert "until step 8" in byteloom("inspect", "--replay", checkpoint, "--threads", "1").stderr
    forge(checkpoint, "reading", digest="0" * 64)
    refused = byteloom("inspect", "--replay", checkpoint, check=False)
    assert refused.returncode == 1
    assert "the corpora do not hold the bytes that the run read until step 8" in refused.stderr


def test_run_with_a_recipe_that_is_now_invalid_is_inspected(trained: Path, tmp_path: Path):
    checkpoint = shutil.copytree(trained / "checkpoints/step-00000008", tmp_path / "step-00000008")
    forge(checkpoint, "config", optimizer={"schedule": {"warmup_steps": 500}}, validation={"every": 0})
    shown = CliRunner().invoke(app, ["inspect", str(checkpoint), "--step=7"])
    assert shown.exit_code == 0 and "step 7, row 0: sequence 36 of the run" in shown.output, shown


def forge(checkpoint: Path, section: str, **entries: object) -> None:
    """Change the state of a checkpoint, and correct its digest."""
    path = checkpoint / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["state"][section].update(entries)
    del metadata["blake3"]
    metadata["blake3"] = digest_of(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps(metadata))


def test_withdrawn_documents_are_not_read(byteloom: Run, corpus_folder: Path, recipe: Path, tmp_path: Path):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    key = Corpus(copy / "train").read(0).slices[0].key
    assert "no document 'nobody'" in byteloom("withdraw", copy / "train", "nobody", check=False).stderr
    assert "1 document withdrawn" in byteloom("withdraw", copy / "train", key).stderr
    assert json.loads(byteloom("inspect", copy / "train", "--json").stdout)["withdrawn"] == 1
    larger = ("train.steps=50", "train.global_batch=60", "train.micro_batch=60")
    byteloom("train", recipe, f"data.shards={copy}/train", "validation.shards=null", *larger)
    masked = [r["masked_bytes"] for r in map(json.loads, (tmp_path / "runs/run/metrics.jsonl").open())]
    epoch = open_streams(load(tmp_path / "runs/run/config.yaml").data, 128)["corpus"].sequences_per_epoch
    size = sum(entry.stop - entry.start for entry in Corpus(copy / "train").withdrawn)
    assert sum(masked[: epoch // 60 + 1]) == pytest.approx(size, abs=8 * 128)
    byteloom("inspect", "--replay", tmp_path / "runs/run")


def test_eval_agrees_with_validation_and_groups_add_up(byteloom: Run, trained: Path):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads(byteloom("eval", trained, "--by", "document", "--json").stdout)
    total, scores = scores["total"], scores["groups"]
    assert total["bits_per_byte"] == pytest.approx(last["validation/bits_per_byte"], rel=1e-6)
    assert total["bytes"] == sum(s["bytes"] for s in scores.values())
    assert total["documents"] == len(scores)
    nats = sum(s["bits_per_byte"] * s["bytes"] for s in scores.values())
    assert nats == pytest.approx(total["bits_per_byte"] * total["bytes"])


def test_eval_of_one_checkpoint_by_suffix(byteloom: Run, trained: Path, corpus_folder: Path):
    checkpoint = trained / "checkpoints/step-00000004"
    assert ".py" in byteloom("eval", checkpoint, corpus_folder / "validation", "--by", "suffix").stdout


def test_eval_reports_its_mode(byteloom: Run, trained: Path):
    figures = {}
    for mode in ("windows", "sliding", "strided", "sliding-strided"):
        shown = CliRunner().invoke(app, ["eval", str(trained), "--mode", mode], catch_exceptions=False).stdout
        scores = json.loads(byteloom("eval", trained, "--mode", mode, "--json").stdout)
        assert scores["mode"] == mode
        assert scores["stride"] == (64 if "sliding" in mode else 128)
        assert f"mode {mode}:" in shown
        assert f"{scores['total']['bits_per_byte']:.4f}" in shown
        figures[mode] = scores["total"]
    assert len({figure["bits_per_byte"] for figure in figures.values()}) == 4
    assert len({figure["bytes"] for figure in figures.values()}) == 1
    refused = byteloom("eval", trained, "--mode", "memory", check=False)
    assert (refused.returncode, "does not support mode memory" in refused.stderr) == (1, True)


def test_eval_names_the_context_of_first_bytes_and_takes_the_other_one(byteloom: Run, trained: Path):
    scores = {
        begin: json.loads(byteloom("eval", trained, "--json", "--begin", begin).stdout)
        for begin in ("auto", "separator", "start")
    }
    assert {begin: found["begin"] for begin, found in scores.items()} == {
        "auto": "separator",
        "separator": "separator",
        "start": "start",
    }
    assert scores["auto"]["total"] == scores["separator"]["total"] != scores["start"]["total"]
    assert len({found["total"]["bytes"] for found in scores.values()}) == 1
    shown = CliRunner().invoke(app, ["eval", str(trained), "--begin", "start"], catch_exceptions=False).stdout
    assert "from the start of each document" in " ".join(shown.split())


def test_eval_writes_words_and_curves(byteloom: Run, trained: Path, corpus_folder: Path, tmp_path: Path):
    arguments = ["--words", "count", "--curves", "curves", "--json", "--mode", "sliding"]
    found = json.loads(byteloom("eval", trained, *arguments).stdout)
    with Corpus(corpus_folder / "validation") as corpus:
        words = count_words(corpus, lambda key: "all")["all"]
    assert found["total"]["words"] == words == sum(group["words"] for group in found["groups"].values())
    assert found["total"]["word_perplexity"] == pytest.approx(math.exp(found["total"]["nats"] / words))
    for name, positions in (("window", 128), ("patch", 4)):
        with (tmp_path / f"curves/{name}-positions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["position"]) for row in rows] == list(range(positions))
        assert {(row["mode"], row["stride"]) for row in rows} == {("sliding", "64")}
        assert math.fsum(float(row["nats"]) for row in rows) == found["total"]["nats"]
    assert (tmp_path / "curves/positions.png").read_bytes().startswith(b"\x89PNG")


def test_eval_accepts_a_number_of_words(trained: Path):
    arguments = ["eval", str(trained), "--words"]
    shown = CliRunner().invoke(app, [*arguments, "12345", "--json"], catch_exceptions=False).stdout
    total = json.loads(shown)["total"]
    assert total["word_perplexity"] == pytest.approx(math.exp(total["nats"] / 12345))
    shown = CliRunner().invoke(app, [*arguments, "12345"], catch_exceptions=False).stdout
    assert "perplexity" in shown and figure(total["word_perplexity"]) in shown
    assert CliRunner().invoke(app, [*arguments, "many"]).exit_code == 2


SIZE = {"width": 32, "layers": 2, "heads": 2}


@pytest.mark.parametrize(
    ("family", "fields", "mode", "options"),
    [
        ("perceiver_ar", {"latents": 32, "latent_model": SIZE, "cross_heads": 2}, "windows", {"latents": 64}),
        ("transformer", {**SIZE, "positions": "learned", "window": 32}, "sliding", {}),
        ("transformer_xl", {**SIZE, "memory_length": 128}, "memory", {"memory": 200, "clamp-length": 90}),
    ],
)
def test_every_family_trains_resumes_scores_and_generates(
    byteloom: Run,
    tmp_path: Path,
    corpus_folder: Path,
    family: str,
    fields: dict[str, object],
    mode: str,
    options: dict[str, int],
):
    tree = recipe_tree(corpus_folder)
    tree["model"] = {"family": family, "sequence_length": 128, **fields}
    tree["data"]["lanes"] = tree["train"]["global_batch"]  # required by a family with memory
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    byteloom("train", recipe, "train.steps=4")
    byteloom("train", recipe, "train.steps=6")
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(7))
    scores = json.loads(byteloom("eval", "runs/run", "--mode", mode, "--json").stdout)
    assert 5 < scores["total"]["bits_per_byte"] < 9
    usage = [f"--{name}={value}" for name, value in options.items()]
    other = json.loads(byteloom("eval", "runs/run", "--mode", mode, "--json", *usage).stdout)
    assert other["options"].items() >= options.items()
    assert (other["total"]["nats"] == scores["total"]["nats"]) == (not usage)
    generated = generate(tmp_path / "runs/run", "--bytes", "200", *usage)
    assert 0 < len(generated) <= 200
    refused = byteloom("eval", "runs/run", "--memory" if family != "transformer_xl" else "--latents", "8", check=False)
    assert f"a {family} model takes no --" in refused.stderr
    if family == "transformer_xl":
        refused = byteloom("eval", "runs/run", "--memory", "8", check=False)
        assert "--memory has no effect in mode windows; add --mode memory" in refused.stderr


def generate(trained: Path, *arguments: str) -> bytes:
    return commands.run(["generate", trained, *arguments], capture_output=True, check=True).stdout


def test_generate_writes_only_the_bytes(trained: Path, tmp_path: Path):
    generated = generate(trained, "--prompt", "def ", "--bytes", "300", "--seed", "3")
    assert 0 < len(generated) <= 300
    assert generated == generate(trained, "--prompt", "def ", "--bytes", "300", "--seed", "3")
    assert max(generated) > 127  # an untrained model generates any byte, and all are written
    (tmp_path / "prompt").write_bytes(b"def ")
    assert generated == generate(trained, "--prompt-file", str(tmp_path / "prompt"), "--bytes", "300", "--seed", "3")


def test_generate_writes_several_continuations_to_a_folder(byteloom: Run, trained: Path, tmp_path: Path):
    (tmp_path / "prompt").write_bytes(b"class ")
    options = ("--prompt", "def ", "--prompt-file", "prompt", "--samples", "3", "--bytes", "40", "--seed", "3")
    assert (
        "6 continuations need a folder: add --out FOLDER" in byteloom("generate", trained, *options, check=False).stderr
    )
    printed = byteloom("generate", trained, *options, "--out", "out").stderr
    written = {path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())}
    assert list(written) == [f"00{prompt}-00{sample}.bin" for prompt in range(2) for sample in range(3)]
    assert re.search(rf"{sum(map(len, written.values()))} bytes, [\d,]+ bytes/s", printed)
    assert len(set(written.values())) == 6
    assert written["000-000.bin"] == generate(trained, "--prompt", "def ", "--bytes", "40", "--seed", "3")


def test_closed_output_pipe_is_not_an_error(trained: Path):
    pipe = f"{BYTELOOM} generate {trained} --bytes 2000 | head -c 5 | wc -c"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", pipe], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.returncode, done.stdout.strip(), "Traceback" in done.stderr) == (0, "5", False)


def test_debug_recipe_runs_on_the_demo_corpus(byteloom: Run, corpus_folder: Path):
    short = ("train.steps=3", "optimizer.schedule.warmup_steps=1")
    byteloom("train", "debug", *short, f"data.shards={corpus_folder}/train", "tracking.enabled=false")


def test_every_command_has_a_help_text():
    for command in (
        "prepare",
        "verify",
        "withdraw",
        "inspect",
        "train",
        "eval",
        "generate",
        "track",
        "models",
        "config",
    ):
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0
        assert f"Usage: byteloom {command}" in shown.output


def test_pruning_deletes_the_oldest_checkpoints_and_refuses_a_folder_without_a_run(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    shown = json.loads(CliRunner().invoke(app, ["checkpoint", "show", str(run), "--tensors", "--json"]).stdout)
    assert (shown["step"], shown["steps"], shown["sequences_read"]) == (12, 12, 72)
    assert shown["elements"]["model"] == sum(
        math.prod(shape) for name, shape in shown["tensors"].items() if name.startswith("model/")
    )
    done = CliRunner().invoke(app, ["checkpoint", "prune", str(run), "--keep", "1"])
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == steps[-1:]
    assert f"deleted {steps[0]}" in done.stderr

    nowhere = tmp_path / "nowhere"
    done = CliRunner().invoke(app, ["checkpoint", "prune", str(nowhere), "--keep", "1"])
    assert isinstance(done.exception, RunFolderError)
    assert not nowhere.exists()
