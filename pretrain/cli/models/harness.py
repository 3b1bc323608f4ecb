"""The `harness` commands: evaluate a model with lm_eval, and write tasks about bytes for it."""

import traceback
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.errors import CorrectableError
from byteloom.core.packages import needed_by
from byteloom.harness_tasks import write_tasks
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.weights import ModelPath
from pretrain.terminal.console import say


class HarnessError(CorrectableError):
    """lm_eval refuses its options, tasks or data."""


app = typer.Typer(help="Evaluate a model with lm-evaluation-harness, or write tasks about bytes.", no_args_is_help=True)


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="`lm_eval run --help` lists all options. `--model_args precision=bf16` adds arguments of the model.",
)
def run_command(context: typer.Context, model: ModelPath) -> None:
    """Evaluate a model with lm-evaluation-harness.

    All arguments after RUN are options of `lm_eval run`: --tasks, --include_path, --limit and others.
    lm_eval has no hook for models of other packages. This command registers the model and starts
    `lm_eval run --model byteloom --model_args run=RUN`.
    """
    with needed_by("byteloom harness", "lm-eval"):
        from byteloom.harness.__main__ import main  # noqa: PLC0415 - it takes seconds

    try:
        main(["run", "--model", "byteloom", "--model_args", f"run={model}", *context.args])
    except (ValueError, OSError) as error:
        if _is_of_harness(error):
            raise HarnessError(f"lm_eval: {error}") from error
        raise


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

    Some measure the bits per byte of clean, lower-case, upper-case and misspelled passages.
    Others ask about the letters of words. byteloom_bytes is the group of all.
    """
    names = write_tasks(text.read_text(encoding="utf-8", errors="replace"), out, number, seed)
    say(f"{out}: {len(names)} tasks; byteloom harness run RUN --include_path {out} --tasks byteloom_bytes")


def _is_of_harness(error: BaseException) -> bool:
    """Return whether the code that raised an error is that of lm_eval or of the libraries under it."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = [name.partition(".")[0] for name in modules]
    return "lm_eval" in calls and not {"byteloom", "pretrain"} & set(calls[calls.index("lm_eval") :])
