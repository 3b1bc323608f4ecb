"""The `harness` commands: evaluate a model by lm_eval, and write tasks about bytes for it."""

from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.packages import needed_by
from byteloom.harness_tasks import write_tasks
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.weights import ModelPath
from pretrain.terminal.console import say

app = typer.Typer(help="Evaluate a model by lm-evaluation-harness, or write tasks about bytes.", no_args_is_help=True)


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="`lm_eval run --help` lists all options. `--model_args precision=bf16` adds arguments of the model.",
)
def run_command(context: typer.Context, model: ModelPath) -> None:
    """Evaluate a model by lm-evaluation-harness.

    All words after RUN are options of `lm_eval run`: --tasks, --include_path, --limit, --output_path and others. It is
    `lm_eval run --model byteloom --model_args run=RUN`, which needs this command: lm_eval has no hook for models of
    other packages.
    """
    with needed_by("byteloom harness", "lm-eval"):
        from byteloom.harness.__main__ import main  # noqa: PLC0415 - it takes seconds

    main(["run", "--model", "byteloom", "--model_args", f"run={model}", *context.args])


@app.command("tasks")
def tasks_command(
    text: Annotated[
        Path, typer.Argument(metavar="TEXT", help="Text file, mostly in Latin letters.", parser=parse_path)
    ],
    out: Annotated[Path, typer.Option(help="New folder; must not exist.", show_default=False, parser=parse_path)],
    number: Annotated[int, typer.Option("--count", min=1, help="Passages or questions of each task.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Write tasks about case, typos and spelling, made of a text.

    The group byteloom_bytes has all of them: bits per byte of clean, lower-case, upper-case and misspelled passages,
    and questions about the letters of words.
    """
    names = write_tasks(text.read_text(encoding="utf-8", errors="replace"), out, number, seed)
    say(f"{out}: {len(names)} tasks; byteloom harness run RUN --include_path {out} --tasks byteloom_bytes")
