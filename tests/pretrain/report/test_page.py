"""The page of a report, of real runs, looked at in a real browser."""

import io
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

import byteloom
from launchers.supervision.record import LaunchRecord
from pretrain.config.loading import load
from pretrain.report.events import events_of
from pretrain.report.page import Comparison, page_of
from pretrain.report.run_data import read_run
from pretrain.terminal.console import logs_shown
from pretrain.tracking.samples import Sample, SampleSet, write_samples
from pretrain.training.health import HealthEvent, HealthLog
from pretrain.training.loop import train
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import StopRequest
from tests.commands import run_here
from tests.conftest import recipe_tree

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

WIDTHS = {"desktop": 1280, "phone": 390}
OVERFLOWS = "tables => tables.map(table => table.scrollWidth - table.clientWidth)"
"""Part of each table that is cut, in pixels."""
PAPER_WIDTH = 718
"""A4 without margins of a centimetre, in CSS pixels."""
COLORED_PIXELS = """canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let colored = 0;
    for (let at = 0; at < data.length; at += 4) {
        const [red, green, blue, opaque] = data.subarray(at, at + 4);
        colored += opaque > 128 && Math.max(red, green, blue) - Math.min(red, green, blue) > 48;
    }
    return colored;
}"""
"""Number of pixels of a canvas with a color; axes, grids and texts are almost grey."""


@pytest.fixture(scope="module")
def runs(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two runs, the first of two starts and with an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.training.callbacks.report.LAST_SECONDS", 600.0)  # a busy machine
        for name, steps in (("one", 4), ("one", 6), ("two", 4)):
            changes = {"run": {"root": folder, "name": name}, "train": {"steps": steps}, "validation": {"every": 2}}
            made.append(byteloom.train(recipe, report={"every": 4} if name == "two" else {}, **changes))
    assert run_here("eval", made[0], "--by", "suffix", "--device", "cpu")[0] == 0
    for run in made[1:]:
        for step in (2, 4):
            add_samples(run, step)
    return made[1:]


def add_samples(run: Path, step: int) -> None:
    """Write samples of text, of bytes, of a picture and of a sound; the file of the second picture is missing."""
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture, "png")
    soundfile.write(sound, np.zeros(800, dtype="<i2"), 8000, format="wav")
    files = {"2.png": picture.getvalue(), "3.wav": sound.getvalue()}
    prompts = [b"def <b>", b"\xff\x00" * 32, bytes(96), bytes(range(96)), bytes(96)]
    names = [None, None, *files, "4.png"]
    samples = tuple(
        Sample(
            source=f"held-out {'folder/' * 12}{number}", prompt_hex=text.hex(), continuation_hex="80" * 96, file=name
        )
        for number, (text, name) in enumerate(zip(prompts, names, strict=True))
    )
    write_samples(run / "samples", SampleSet(step=step, time=0.0, temperature=1.0, samples=samples), files)


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    code, text = run_here("report", *runs, "--out", out)
    assert code == 0, text
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright in this environment")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Elements(HTMLParser):
    """Counts of the elements of a page, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_page_is_one_file_whose_plots_have_names_and_tables(page: Path):
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    addresses = [
        value for _, attributes in elements.found for name in ("src", "href") if (value := attributes.get(name))
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    figures = elements.all("figure")
    named = [each for each in elements.all("div") if each.get("role") == "img" and each.get("aria-label")]
    assert len(figures) == len(named) >= 10
    assert len(elements.all("table")) >= len(figures)
    assert "Copyright (c) 2022 Leon Sorokin" in text
    for shown in ("validation loss", "Fields that differ", "report.every", "modalities", "Evaluation one", ".py"):
        assert shown in text, shown


def test_samples_are_text_hexadecimal_pictures_and_sounds_newest_first(page: Path):
    """The page has two runs, each with two steps."""
    text = page.read_text(encoding="utf-8").split('<section id="samples"')[1].split("</section>")[0]
    elements = Elements(text)
    assert re.findall(r"<summary>(\w+, step \d)", text) == ["one, step 4", "one, step 2", "two, step 4", "two, step 2"]
    assert text.count("<details open>") == 2
    kinds = [re.split("[;,]", each["src"] or "")[0] for each in elements.all("img") + elements.all("audio")]
    assert kinds == ["data:image/png"] * 4 + ["data:audio/wav"] * 4
    assert all(each.get("alt") or each.get("aria-label") for each in elements.all("img") + elements.all("audio"))
    assert "<u>def &lt;b&gt;</u>" in text and '<u class="hex">ff 00 ff' in text
    assert text.count("4.png cannot be read: No such file or directory.") == 4


def test_events_have_reasons(runs: list[Path]):
    events = events_of(RunFolder(runs[0]))
    assert [event.kind for event in events] == ["start", "checkpoint", "finish", "start", "checkpoint", "finish"]
    assert events[3].reason.startswith("resumes after step 4; train.steps: 4 -> 6")


def test_events_of_the_supervisor_of_health_and_of_requests_to_stop_have_reasons(runs: list[Path], tmp_path: Path):
    run = tmp_path / "one"
    shutil.copytree(runs[0], run)
    before = len(events_of(RunFolder(run)))
    LaunchRecord(run).append("requeued", "4711", reason="the time limit is near")
    bad = HealthEvent(id="a", time=time.time(), step=7, kind="loss", action="rewind", text="loss 9 at step 7")
    HealthLog(run / "health.jsonl").append(bad)
    stop = StopRequest()
    stop.request(signal.SIGTERM)
    with logs_shown():
        assert train(load(run / "config.yaml", [f"run.root={tmp_path}", "train.steps=9"]), stop=stop) == 143
    found = [(event.kind, event.reason) for event in events_of(RunFolder(run))[before:]]
    assert found[:2] == [("requeued", "job 4711; the time limit is near"), ("rewind", "loss 9 at step 7")]
    assert [kind for kind, _ in found[2:]] == ["start", "stop"]
    assert found[-1] == ("stop", "SIGTERM after step 6")


@pytest.mark.parametrize("axis", ["bytes", "step", "seconds"])
@pytest.mark.parametrize(("width", "scheme", "medium"), [("desktop", "dark", "screen"), ("phone", "light", "print")])
def test_every_plot_draws_without_an_error(
    page: Path, browser: "Browser", width: str, scheme: Any, medium: Any, axis: str
):
    with browser.new_page(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme) as shown:
        messages, requests = watched(shown)
        shown.goto(page.as_uri())
        shown.check(f"input[name=axis][value={axis}]")
        shown.emulate_media(media=medium)
        figures = shown.locator("figure")
        for number in range(figures.count()):
            colored = figures.nth(number).locator("canvas").evaluate(COLORED_PIXELS)
            assert colored > 20, figures.nth(number).locator("h3").inner_text()
        pictures = shown.locator("#samples img").evaluate_all("all => all.map(each => each.naturalWidth)")
        assert pictures == [8] * 4
        assert shown.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
        assert messages == []
        assert requests == [page.as_uri()]


def test_plots_zoom_together_and_show_values(page: Path, browser: "Browser"):
    with browser.new_page(viewport={"width": 1280, "height": 900}) as shown:
        messages, _ = watched(shown)
        shown.goto(page.as_uri())
        over = shown.locator("#plot-loss .u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        before = shown.evaluate("plots.filter(plot => plot.byAxis).map(plot => plot.scales.x.max)")
        shown.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50)
        assert "–" not in shown.locator("#plot-loss .u-legend .u-value").nth(1).inner_text()
        shown.mouse.down()
        shown.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 50, steps=4)
        shown.mouse.up()
        after = shown.evaluate("plots.filter(plot => plot.byAxis).map(plot => plot.scales.x.max)")
        assert len(set(before)) == len(set(after)) == 1
        assert after[0] < before[0]
        shown.click("#reset")
        assert shown.evaluate("plots[0].scales.x.max") == before[0]
        assert messages == []


def watched(page: "Page") -> tuple[list[str], list[str]]:
    """Return lists that grow with the messages of a page's console, its errors, and its requests."""
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    return messages, requests


def test_a_run_that_asks_for_it_has_a_page_of_its_last_step(runs: list[Path]):
    text = (runs[1] / "report.html").read_text(encoding="utf-8")
    assert "4 of 4" in text
    assert not (runs[0] / "report.html").exists()


def test_training_continues_where_no_page_can_be_written(
    runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """report.html is a folder for one run; the other cannot start a process."""
    shutil.copytree(runs[1], tmp_path / "two")
    (tmp_path / "two/report.html").unlink()
    (tmp_path / "two/report.html/full").mkdir(parents=True)
    recipe = tmp_path / "two/config.yaml"
    byteloom.train(recipe, run={"root": tmp_path}, train={"steps": 5}, report={"every": 1})
    assert [record.getMessage() for record in caplog.records if "report.html was not written" in record.message]
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(tmp_path / "no-python"))
        byteloom.train(recipe, run={"root": tmp_path}, train={"steps": 6}, report={"every": 1})
    assert [record.getMessage() for record in caplog.records if "no-python" in record.message]


def comparison_page(runs: list[Path]) -> str:
    """Return a page of a recipe with two runs and another one with two."""
    found = [replace(read_run(path), name=f"comparison-{path.name}-seed-{seed}") for seed in range(2) for path in runs]
    groups, costs = {run.name: 3 for run in found}, {run.name: 1e6 for run in found}
    headings, row = ["recipe", *["validation loss"] * 8], ["one", *["2.5"] * 8]
    return page_of(found, 0.0, Comparison("families", "Equal FLOPs.", headings, [row], groups, costs))


def test_page_of_a_comparison_draws_by_flops_and_fits_a_phone(runs: list[Path], browser: "Browser", tmp_path: Path):
    out = tmp_path / "report.html"
    out.write_text(comparison_page(runs), encoding="utf-8")
    with browser.new_page(viewport={"width": WIDTHS["phone"], "height": 900}) as shown:
        messages, _ = watched(shown)
        shown.goto(out.as_uri())
        shown.check("input[name=axis][value=flops]")
        assert shown.locator("#plot-loss canvas").evaluate(COLORED_PIXELS) > 20
        assert shown.locator("#plot-loss .u-legend").get_by_text("FLOPs of training").count() == 1
        assert shown.evaluate("document.documentElement.scrollWidth") <= WIDTHS["phone"]
        shown.emulate_media(media="print")
        shown.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
        assert set(shown.locator("section > .scroll").evaluate_all(OVERFLOWS)) == {0}
        assert messages == []


def test_page_of_a_comparison_has_a_table_one_group_a_recipe_and_an_axis_of_flops(runs: list[Path]):
    text = comparison_page(runs)
    axes = [each.get("value") for each in Elements(text).all("input") if each.get("name") == "axis"]
    assert axes == ["bytes", "step", "seconds", "flops"]
    assert "Recipes, lowest loss first" in text and "2.5</td>" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [run["group"] for run in data["runs"]] == [3] * 4
    for run in data["runs"]:
        for rows in (
            *run["tables"].values(),
            {name: [each[name] for each in run["events"]] for name in ("bytes", "flops")},
        ):
            assert rows["flops"] == [1e6 * trained for trained in rows["bytes"]]


def test_damaged_files_and_runs_without_steps_have_a_page(runs: list[Path], tmp_path: Path):
    damaged = tmp_path / "<script>alert(1)"
    shutil.copytree(runs[0], damaged, ignore=shutil.ignore_patterns("checkpoints"))
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write('{"step": "</script>"}\n')
    (damaged / "coverage.json").write_text("{")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/run.json").write_text((runs[0] / "run.json").read_text())
    secret = "http://user:SECRET@127.0.0.1/corpus?X-Amz-Signature=SECRET"
    config = (damaged / "config.yaml").read_text()
    (damaged / "config.yaml").write_text(config.replace("uri: null", f"uri: {secret}"))
    code, out = run_here("report", damaged, tmp_path / "new", "--out", tmp_path / "report.html")
    assert code == 0, out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "coverage.json" in text
    assert "http://127.0.0.1/corpus" in text
    assert "SECRET" not in text
    assert len(Elements(text).all("script")) == 3
    data = text.split('id="data">')[1].split("</script>")[0]
    assert [run["name"] for run in json.loads(data)["runs"]] == [damaged.name, "new"]
