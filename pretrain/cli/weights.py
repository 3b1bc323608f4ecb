"""Load the model of a command, and the arguments that choose it."""

from enum import StrEnum
from typing import Annotated

import typer

from pretrain.checkpoint import CheckpointError, Metadata, read
from pretrain.cli.arguments import parse_location
from pretrain.distributed.fragments import MODEL, fragment_name, whole
from pretrain.engines import choose_device, compute_dtype, scoring_precision
from pretrain.models import ByteModel, FamilyError, build_model, change_usage_fields, model_config
from pretrain.terminal.console import display
from pretrain.training.weights import find_checkpoint, trained_precision

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run (its newest checkpoint), checkpoint or export: folder or URL.",
        show_default=False,
        parser=parse_location,
    ),
]


class Device(StrEnum):
    """Devices that a model is loaded on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Precisions that a model computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


DeviceOption = Annotated[Device, typer.Option(help="Device. auto is cuda if there is a GPU.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="Precision. Default: as in the run, or fp32 where bf16 is emulated."),
]
LatentsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Latents, for models that have them. More are more accurate and slower. Default: as in the run."
    ),
]


def load_model(
    path: str, device: Device, precision: Precision | None, latents: int | None
) -> tuple[ByteModel, Metadata]:
    """Return the model of a run's newest checkpoint, of a checkpoint or of an export, and the checkpoint."""
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(path, progress=phase.update)
    config = checkpoint.state["config"]
    model_section = model_config(config["model"])
    if latents is not None:
        try:
            model_section = change_usage_fields(model_section, {"latents": latents})
        except FamilyError as error:
            raise CheckpointError(f"--latents {latents}: {error}") from error
    model = build_model(model_section).eval()
    parameters = [whole(fragment_name(MODEL, name), parameter) for name, parameter in model.named_parameters()]
    with display.phase("loading the weights") as phase:
        read(checkpoint, parameters, phase.update)
    place = choose_device(device.value)
    chosen = precision.value if precision else scoring_precision(trained_precision(checkpoint), place)
    return model.to(place, compute_dtype(chosen)), checkpoint
