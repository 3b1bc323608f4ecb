"""The `threshold` command: the threshold of patches by entropy that have a mean length."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.cli.arguments import check_finite, parse_path
from pretrain.cli.models.weights import DeviceOption, ResetOption
from pretrain.config.recipe_yaml import as_flow
from pretrain.engines.base import choose_device
from pretrain.evaluation.continuations import read_prompt
from pretrain.evaluation.patches.rules import entropies_of_document, entropies_of_rows
from pretrain.evaluation.scores import EvaluationError
from pretrain.models.entropy_model import EntropyModel
from pretrain.models.patching.entropy import EntropyConfig, entropy_starts, find_threshold
from pretrain.models.patching.frozen import frozen_config
from pretrain.terminal.console import display, say
from pretrain.terminal.tables import JsonOption, print_json, print_lines
from pretrain.training.stop import stopping_at_once

app = typer.Typer()

TOLERANCE = 0.05
"""Relative difference from the wanted mean length above which a warning is printed."""


class EntropyRule(StrEnum):
    """Rules of `EntropyConfig`."""

    GLOBAL = "global"
    MONOTONIC = "monotonic"
    COMBINED = "combined"


@app.command("threshold")
@stopping_at_once(display.close)
def threshold_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="EXPORT",
            help="Export of the model of bytes: a folder.",
            show_default=False,
            parser=parse_path,
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File of text as in the corpus.", show_default=False, parser=parse_path),
    ],
    bytes_per_patch: Annotated[
        float,
        typer.Option(min=1.01, help="Mean length of the patches.", show_default=False, callback=check_finite),
    ],
    rule: Annotated[EntropyRule, typer.Option(help="Rule of the patches.")] = EntropyRule.GLOBAL,
    increase: Annotated[
        float | None,
        typer.Option(
            help="Rise of the entropy in nats, of --rule combined.", show_default=False, callback=check_finite
        ),
    ] = None,
    max_patch_length: Annotated[
        int | None, typer.Option(min=1, help="Longest patch in bytes. Default: any.", show_default=False)
    ] = None,
    reset_at_newlines: ResetOption = False,
    stored: Annotated[
        bool,
        typer.Option("--stored", help="For patcher.entropies: corpus. The file is then one document."),
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Bytes of a row of the model with patches. Default: of EXPORT.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the threshold of patches by entropy.

    Cut the file into rows, and print a patcher for the recipe
    whose patches have the mean length.
    """
    if (rule is EntropyRule.COMBINED) is (increase is None):
        raise EvaluationError(f"--rule {rule} {'needs' if increase is None else 'takes no'} --increase")
    data = read_prompt(file, None)
    if not data:
        raise EvaluationError(f"{file} is empty")
    config = EntropyConfig(
        model=str(model),
        rule=rule.value,
        threshold=None if rule is EntropyRule.MONOTONIC else 0.0,
        increase=0.0 if rule is EntropyRule.MONOTONIC else increase,
        max_patch_length=max_patch_length,
        reset_at_newlines=reset_at_newlines,
        entropies="corpus" if stored else "inline",
    )
    length = length or int(frozen_config(config.model, config.digest)["sequence_length"])
    byte_model = EntropyModel(config, length, across_documents=True)
    with display.phase("finding entropies", len(data)) as phase:
        find = entropies_of_document if stored else entropies_of_rows
        entropies, read = find(byte_model, data, length, choose_device(device), phase.advance)
    found = find_threshold(config, entropies, read, bytes_per_patch)
    starts = (entropy_starts(found, entropies, read, {})[0] | (read == SEPARATOR)) & (read != PADDING)
    mean = int((read != PADDING).sum()) / int(starts.sum())
    if abs(mean / bytes_per_patch - 1) > TOLERANCE:
        say(f"warning: no threshold gives patches of {bytes_per_patch:g} bytes in {file}; this one gives {mean:.3f}")
    unset = {name for name in ("reset_at_newlines", "entropies") if name not in found.model_dump(exclude_defaults=True)}
    patcher = found.model_dump(mode="json", exclude_none=True, exclude={"digest", *unset})
    if as_json:
        print_json({"patcher": patcher, "bytes_per_patch": mean, "bytes": len(data)})
        return
    print_lines([f"{file}: {count(len(data), 'byte')} in rows of {length:,}, {mean:.3f} bytes a patch"])
    typer.echo(f"patcher: {as_flow(patcher)}")  # not folded: it is copied into a recipe
