"""The `samples` command: write the samples of a checkpoint, as a run does during its training."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from byteloom.core.storage.step_folders import step_name, step_of
from byteloom.core.text import count
from byteloom.model import Model
from data_pipeline.corpus.corpus import Corpus
from pretrain.checkpoint import CheckpointError, Metadata
from pretrain.cli.arguments import RunFolderArgument
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.terminal.console import say
from pretrain.tracking.journal import read_journal
from pretrain.tracking.samples import SampleSet, as_text, write_samples
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import check_run
from pretrain.training.sampling.writing import prompts_of, write_continuations
from pretrain.training.stop import stopping_at_once
from pretrain.training.weights import find_checkpoint, store_of

WAIT_SECONDS = 600.0
"""Longest wait for a checkpoint that is being written."""
POLL_SECONDS = 0.2
NICENESS = 10
"""Priority beside a training on the same cores: about a tenth of a core, if they are all busy."""

app = typer.Typer()


@app.command("samples")
@stopping_at_once(lambda: say(""))
def samples_command(
    run: RunFolderArgument,
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint. Default: the newest.", show_default=False)
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", hidden=True, help="Wait for the checkpoint, and yield the processor to others.")
    ] = False,
) -> None:
    """Write samples of a checkpoint, as a run does during its training.

    The recipe's section `samples` has the prompts. The samples are files in RUN/samples.
    """
    check_run(run)
    if beside:
        os.nice(NICENESS)
        torch.set_num_threads(1)
    folder = RunFolder(run)
    config = load(folder.config)
    if step is not None and beside:
        _wait_for(run, step)
    name = run if step is None else folder.checkpoints_in(config.checkpoint.home)
    checkpoint = find_checkpoint(str(name) if step is None else f"{name}/{step_name(step)}")
    found = _write(config, folder, checkpoint)
    place = folder.samples / step_name(found.step)
    if not beside:
        for sample in found.samples:
            text = f"{as_text(sample.prompt)}\u258f{as_text(sample.continuation)}"
            say(f"{sample.source}:\n{text if sample.file is None else place / sample.file}\n")
    say(f"{place} has {count(len(found.samples), 'sample')}")


def _wait_for(run: Path, step: int) -> None:
    """Wait until a checkpoint is written.

    Raises:
        CheckpointError: it was not written in time, or it is deleted already.
    """
    store, begin = store_of(run), time.monotonic()
    while step not in (steps := [step_of(checkpoint) for checkpoint in store.committed()]):
        if any(other > step for other in steps):
            raise CheckpointError(
                f"{run} has no checkpoint of step {step} any more, only newer ones; checkpoint.keep is their number"
            )
        if time.monotonic() - begin > WAIT_SECONDS:
            raise CheckpointError(f"{run} has no checkpoint of step {step} after {WAIT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def _write(config: Config, folder: RunFolder, checkpoint: Metadata) -> SampleSet:
    model = Model(checkpoint, "cpu", "fp32", begin=config.validation.begin)
    step = checkpoint.state["reading"]["step"]
    with _held_out(config) as corpus:
        prompts = prompts_of(config.samples, model.card, model.sequence_length, corpus)
    times = [record["time"] for record in read_journal(folder.metrics) if record["step"] == step]
    when = times[-1] if times else time.time()
    found, files = write_continuations(config.samples, prompts, model.card, model.generate_rows, step=step, time=when)
    write_samples(folder.samples, found, files)
    return found


@contextlib.contextmanager
def _held_out(config: Config) -> Iterator[Corpus | None]:
    """Open the first validation corpus of a recipe; None if it has none, or no prompt comes from it."""
    named = list(config.validation.by_name().values())
    if not named or not config.samples.held_out:
        yield None
        return
    with Corpus(named[0].shards, remote=config.data.remote, digest=named[0].shards_sha256) as corpus:
        yield corpus
