"""Load the model of a command, and the arguments that choose it."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import typer

from byteloom.model import Device, Model, Precision
from pretrain.cli.arguments import parse_location
from pretrain.evaluation.beginning import Beginning
from pretrain.models.registry import options_by_name
from pretrain.terminal.console import display
from pretrain.training.weights import find_checkpoint

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run (its newest checkpoint), checkpoint or export: folder or URL.",
        show_default=False,
        parser=parse_location,
    ),
]


DeviceOption = Annotated[Device, typer.Option(help="Device. auto is cuda if there is a GPU.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="Precision. Default: as in the run, or fp32 where bf16 is emulated."),
]
ResetOption = Annotated[
    bool, typer.Option("--reset-at-newlines", help="Let the model of bytes forget what it read at each newline.")
]
BeginOption = Annotated[
    Beginning,
    typer.Option(help="Context of a first byte. auto: a separator if documents follow separators in training."),
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Divisor of the logits. 0 takes the most likely byte.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Draw from the k most likely bytes.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the most likely bytes whose probabilities add up to p.")]
USAGE_PANEL = "Use of the model"

log = logging.getLogger(__name__)


def takes_usage_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the usage options of all families, for its help and its parser.

    The command receives those that were typed as `usage`: their values by their names.
    """
    own = inspect.signature(command)
    names = {name.replace("-", "_"): name for name in options_by_name()}
    if clashes := names.keys() & own.parameters.keys():
        log.warning("the option --%s of a model family is left out: the command has one of this name", min(clashes))
    names = {key: name for key, name in names.items() if key not in clashes}

    @functools.wraps(command)
    def with_usage(**values: Any) -> None:
        typed = {name: value for key, name in names.items() if (value := values.pop(key)) is not None}
        command(**values, usage=typed)

    kept = [parameter for name, parameter in own.parameters.items() if name != "usage"]
    added = [_usage_parameter(key, name) for key, name in names.items()]
    with_usage.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    return with_usage


def _usage_parameter(key: str, name: str) -> inspect.Parameter:
    """Return a parameter that typer reads as the option of a command. Its type is that of the first family."""
    declared = options_by_name()[name]
    family, option = declared[0]
    kind: Any = family.type_of(option)
    texts: dict[str, list[str]] = {}
    for each, own in declared:
        texts.setdefault(own.help, []).append(each.name)
    text = " ".join(f"{', '.join(families)}: {text}" for text, families in texts.items())
    described = typer.Option(
        f"--{name}/--no-{name}" if kind is bool else f"--{name}",
        help=f"{text} Default: as in the run.",
        rich_help_panel=USAGE_PANEL,
    )
    annotation: Any = Annotated[Optional[kind], described]  # noqa: UP045 kind is a variable
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def load_model(
    path: str,
    device: Device,
    precision: Precision | None,
    usage: Mapping[str, Any],
    begin: Beginning = Beginning.auto,
) -> Model:
    """Load a model as `byteloom.load` does, and show the progress."""
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(path, progress=phase.update)
    with display.phase("loading the weights") as phase:
        return Model(
            checkpoint,
            device,
            precision,
            usage,
            phase.update,
            begin=begin,
        )
