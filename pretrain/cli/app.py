"""The `byteloom` command, assembled from the commands of this folder."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pretrain.cli.lazy import LazyCommand
from pretrain.cli.versions import print_versions

PANELS = {
    "Corpora": (
        LazyCommand("prepare", "corpora.prepare", "Turn files into a corpus of tar shards."),
        LazyCommand("verify", "corpora.maintain", "Check every byte of a corpus, or repair it."),
        LazyCommand("withdraw", "corpora.maintain", "Exclude documents of a corpus from all future reading."),
        LazyCommand("entropies", "models.entropies", "Write the entropies of a model of bytes beside a corpus."),
        LazyCommand("inspect", "corpora.inspect", "Show the contents of a corpus, or the data that a run read."),
    ),
    "Training": (
        LazyCommand("train", "train", "Train a run, or resume it from its newest checkpoint."),
        LazyCommand("branch", "runs.branch", "Make a new run that continues a checkpoint of another run."),
        LazyCommand("submit", "runs.submit", "Submit a run to a cluster, or resume it there."),
        LazyCommand("sweep", "runs.sweep", "Train one run for each combination of recipes and values."),
        LazyCommand(
            "compare",
            "runs.compare",
            "Train recipes with an equal budget, each with several seeds, and compare their losses.",
        ),
    ),
    "Runs": (
        LazyCommand("status", "runs.status", "Show the state, progress and restarts of runs."),
        LazyCommand(
            "top",
            "runs.top",
            "Watch runs in the terminal: step, loss, speed, MFU, wait for data, time left, nodes, last event.",
        ),
        LazyCommand("logs", "runs.status", "Print the log of one rank of a run."),
        LazyCommand("cancel", "runs.status", "Stop a run."),
        LazyCommand("health", "runs.health", "Show the bad batches of a run, with their documents and the actions."),
        LazyCommand(
            "report",
            "runs.report",
            "Write one HTML page about runs: loss, speed, events, recipe, corpora and evaluations.",
        ),
        LazyCommand("samples", "runs.samples", "Write samples of a checkpoint, as a run does during its training."),
        LazyCommand("track", "runs.tracking", "Send the numbers of a run that MLflow or another tracker lacks."),
        LazyCommand(
            "checkpoint", "runs.checkpoints", "List, verify, show, prune, roll back to and export checkpoints."
        ),
    ),
    "Models and recipes": (
        LazyCommand(
            "recipe", "models.recipe", "Choose sizes, batch, bytes and learning rate for a budget of FLOPs and memory."
        ),
        LazyCommand("eval", "models.evaluate", "Measure the bits per byte of a checkpoint on a corpus or a file."),
        LazyCommand(
            "harness", "models.harness", "Evaluate a model with lm-evaluation-harness, or write tasks about bytes."
        ),
        LazyCommand("generate", "models.generate", "Continue a prompt with bytes from a model."),
        LazyCommand("surprise", "models.surprise", "Show the bits of each byte of a file as shades."),
        LazyCommand("patches", "models.patches", "Show where the patches of a file start."),
        LazyCommand("threshold", "models.threshold", "Find the threshold of patches by entropy."),
        LazyCommand("chat", "models.chat", "Type a text, and the model continues it."),
        LazyCommand("import", "models.exchange", "Import weights of other programs as an export folder."),
        LazyCommand(
            "export",
            "models.exchange",
            "Export the weights of a model for other programs.",
        ),
        LazyCommand("models", "models.estimate", "List model families and recipes, with size, cost and memory."),
        LazyCommand("config", "config", "Show, copy, check and explain recipes."),
        LazyCommand("check-family", "models.conformance", "Check that a model family works with everything else."),
    ),
}
"""Commands by their panel in `byteloom --help`. A test compares each summary with the help of its command."""


class ByteloomGroup(TyperGroup):
    """Group of all commands."""

    def __init__(self, **options: Any) -> None:
        """Add the commands of `PANELS`."""
        super().__init__(**options)
        for panel, commands in PANELS.items():
            for command in commands:
                command.rich_help_panel = panel
                self.add_command(command)


app = typer.Typer(
    name="byteloom",
    cls=ByteloomGroup,
    help="Pretrain models on raw bytes: turn files into shards, train, resume, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_versions(wanted: bool) -> None:
    if wanted:
        print_versions()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Print the versions of Byteloom and its libraries.",
        ),
    ] = False,
) -> None:
    """Accept the options of `byteloom` itself."""
