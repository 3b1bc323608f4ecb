"""Identity of a checkpoint: it must match its place, and continue the checkpoint before it.

    name        step-00000030
    reading     step, next_sequence, batches, skipped
    run         id of the run
    generation  number of the start that wrote it

They must agree, or the checkpoint is quarantined with the reason. Only the newest start writes, so the generation of a
later step is never older than that of an earlier step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from byteloom.core.storage.step_folders import is_checkpoint_name, step_in
from data_pipeline.stream.skips import Skips

KNOWN_RUN = "generation"
"""Field of states whose run id is reliable. Before this field, a new run folder could give a run another id."""


def fault_of_place(name: str, state: Mapping[str, Any]) -> str | None:
    """Return the reason why a checkpoint does not fit its name, as a clause; None if it fits.

    Args:
        name: of its folder. One that is no checkpoint's name says nothing about the content.
        state: that the checkpoint holds. What is missing in it is not compared.
    """
    reading = state.get("reading", {})
    step, next_sequence, batches = (reading.get(key) for key in ("step", "next_sequence", "batches"))
    if step is not None and is_checkpoint_name(name) and step != step_in(name):
        return f"holds step {step}, and not the step of its name: a copy or a renamed folder"
    if batches and step is not None:
        begun, sequence, global_batch = batches[-1]
        skips, read = Skips(map(tuple, reading.get("skipped", []))), (step - begun) * global_batch
        if next_sequence - sequence - skips.within(sequence, next_sequence) != read:
            expected = skips.end(sequence, read)
            return f"holds sequence {next_sequence} as the next after step {step}, and its batches make it {expected}"
    return None


def fault_of_run(state: Mapping[str, Any], run: str | None) -> str | None:
    """Return the reason why a checkpoint belongs to another run, as a clause; None if it does not.

    Args:
        state: that the checkpoint holds.
        run: id of the run.
    """
    if run is None or KNOWN_RUN not in state or state["run"] == run:
        return None
    return f"belongs to run {state['run']}, and this is run {run}"


def fault_of_order(state: Mapping[str, Any], earlier_name: str, earlier: Mapping[str, Any]) -> str | None:
    """Return the reason why a checkpoint does not continue an earlier one, as a clause; None if it does.

    Args:
        state: that the checkpoint holds.
        earlier_name: name of the checkpoint before it.
        earlier: state of that one.
    """
    own, before = state.get("generation"), earlier.get("generation")
    if own is not None and before is not None and own < before:
        return (
            f"was written by start {own}, and {earlier_name} by start {before}, which had taken over: it is not of the "
            "run's present course"
        )
    next_sequence, sequence_before = (each.get("reading", {}).get("next_sequence") for each in (state, earlier))
    if next_sequence is not None and sequence_before is not None and next_sequence < sequence_before:
        return (
            f"holds sequence {next_sequence} as the next, and {earlier_name} before it has read up to {sequence_before}"
        )
    return None


def fault_in_course(
    name: str, names: Sequence[str], state_of: Callable[[str], Mapping[str, Any] | None], run: str | None
) -> str | None:
    """Return the reason why a checkpoint does not belong to a run's present course, as a clause.

    Args:
        name: of the checkpoint.
        names: of all checkpoints.
        state_of: returns the state of a checkpoint by its name; None for one that cannot be read.
        run: id of the run; None if it is not known.

    Returns:
        The reason. None if there is none, or if the checkpoint cannot be read, which its reader finds.
    """
    state = state_of(name)
    if state is None:
        return None
    if fault := fault_of_run(state, run):
        return fault
    for earlier in sorted((other for other in names if step_in(other) < step_in(name)), key=step_in, reverse=True):
        before = state_of(earlier)
        if before is not None and fault_of_run(before, run) is None:
            return fault_of_order(state, earlier, before)
    return None
