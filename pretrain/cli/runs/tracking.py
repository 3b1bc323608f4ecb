"""The `track` command: send to MLflow what it lacks of a run."""

from typing import Annotated

import typer

from byteloom.core.packages import MissingPackageError
from byteloom.core.text import count
from pretrain.cli.arguments import RunFolderArgument
from pretrain.terminal.console import say
from pretrain.tracking import MlflowShipper, deliver_all, fault_of, shown
from pretrain.training.run_folder import RunFolder, RunFolderError

app = typer.Typer()


@app.command("track")
def track_command(
    run: RunFolderArgument,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Create a new MLflow run and send everything to it.")
    ] = False,
) -> None:
    """Send the metrics and files that MLflow lacks of a run."""
    folder = RunFolder(run)
    if not folder.mlflow.exists():
        raise RunFolderError(
            f"{run} has no mlflow.json: it is not a run folder, or the run was started with tracking.enabled=false"
        )
    with folder.locked():
        shipper = MlflowShipper(folder.metrics, folder.mlflow, folder.config, folder.log_of(0), folder.report)
        if new_run:
            shipper.delivery.forget_run()
        missing = shipper.undelivered()
        if shipper.delivery.status == "RUNNING":  # its writer is dead: this process holds the lock
            shipper.set_status("KILLED")
        try:
            deliver_all(shipper)
        except MissingPackageError:
            raise
        except Exception as error:  # MLflow raises many kinds of errors
            raise RunFolderError(
                f"MLflow at {shown(shipper.delivery.uri)}: {fault_of(error)}. The numbers are safe in {folder.metrics}"
            ) from error
    say(f"{count(missing, 'step')} delivered to {shown(shipper.delivery.uri)}")
