"""The `track` command: send to the trackers what they lack of a run."""

from typing import Annotated

import typer

from byteloom.core.packages import MissingPackageError
from byteloom.core.text import count
from pretrain.cli.arguments import RunFolderArgument
from pretrain.terminal.console import say
from pretrain.tracking import MlflowShipper, RegisteredShipper, Shipper, deliver_all, fault_of, registered_in
from pretrain.training.run_folder import RunFolder, RunFolderError

app = typer.Typer()


@app.command("track")
def track_command(
    run: RunFolderArgument,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Create a new MLflow run and send everything to it.")
    ] = False,
) -> None:
    """Send the numbers of a run that MLflow or another tracker lacks.

    Also sends samples and files.
    """
    folder = RunFolder(run)
    others = registered_in(run)
    if not folder.mlflow.exists() and not (others and not new_run):
        raise RunFolderError(
            f"{run} has no mlflow.json: it is not a run folder, or the run was started with tracking.enabled=false"
        )
    faults = list[Exception]()
    with folder.locked():
        if folder.mlflow.exists():
            mlflow = MlflowShipper(run)
            if new_run:
                mlflow.delivery.forget_run()
            if mlflow.delivery.status == "RUNNING":  # its writer is dead: this process holds the lock
                mlflow.set_status("KILLED")
            _deliver(mlflow, faults)
        for name in others:
            shipper = RegisteredShipper(run, name)
            if shipper.state.status == "RUNNING":
                shipper.set_status("KILLED")
            _deliver(shipper, faults)
    if faults:
        raise faults[0]


def _deliver(shipper: Shipper, faults: list[Exception]) -> None:
    """Deliver to a tracker, and say so. A fault is added to a list, so that the other trackers have their turn."""
    missing = shipper.undelivered()
    try:
        deliver_all(shipper)
    except MissingPackageError as error:
        faults.append(error)
    except Exception as error:  # trackers raise many kinds of errors
        fault = RunFolderError(f"{shipper.place}: {fault_of(error)}. The numbers are safe in {shipper.journal}")
        fault.__cause__ = error
        faults.append(fault)
    else:
        say(f"{count(missing, 'step')} delivered to {shipper.place}")
