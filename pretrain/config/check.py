"""What can be known of a run before it trains, without writing anything: `byteloom config check`.

    recipe ─▶ config ─▶ corpora ─▶ run folder and checkpoints ─▶ device, memory, disk, packages ─▶ findings

A fault does not end the check: what does not depend on it is still looked at. The functions that refuse a start in
`train` refuse it here too.
"""

import contextlib
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console

from byteloom.core.packages import MissingPackageError, missing
from byteloom.core.provenance import changes
from byteloom.core.state_files import StateFileError
from byteloom.core.step_folders import step_of
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.config import ONLY_SOURCE
from data_pipeline.stream.mixture import fingerprint_of
from data_pipeline.stream.reading import Reading, open_stream
from data_pipeline.stream.record import Record
from pretrain.checkpoint import (
    CheckpointError,
    CheckpointStore,
    InvalidCheckpointError,
    Metadata,
    locate,
    read_metadata,
)
from pretrain.config import schema as configuration
from pretrain.config.schema import Config, ConfigError
from pretrain.engines import (
    CheckpointingConfig,
    EngineError,
    check_ranks,
    choose_device,
    choose_precision,
    compute_dtype,
    remark_on_precision,
)
from pretrain.engines.blocks import check_float8
from pretrain.estimate.footprint import MASTER, MOMENTS, USABLE, States, measure_activations, on_meta, shardings
from pretrain.models import ByteModel, carries_memory
from pretrain.terminal.console import printable, say
from pretrain.terminal.progress import size
from pretrain.terminal.tables import fold, terminal_width
from pretrain.training.loop import TrainingError, check_lanes, check_resumes, check_same_run
from pretrain.training.run_folder import RunFolder, RunFolderError
from pretrain.training.weights import find_origin

REFUSALS = (
    CheckpointError,
    CorpusError,
    EngineError,
    MissingPackageError,
    RunFolderError,
    StateFileError,
    TrainingError,
    OSError,
)
"""Why a run would not start."""
ATTEMPTS = 3
"""Requests to a corpus at a URL, at most. A run makes data.remote.attempts of them."""
SHARDINGS = {"ddp": "ddp", "zero1": "zero-1", "zero2": "zero-2"} | dict.fromkeys(
    ("zero3", "fsdp", "hsdp"), "zero-3, fsdp2"
)
"""Names in footprint.py of what engines do. Within its shards, hsdp is fsdp."""
COMPILERS = ("c++", "g++", "clang++")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

COLOURS = {"ok": None, "warning": "yellow", "error": "red"}

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One thing that the check found."""

    level: Level
    field: str
    """Dotted name of the field; "" for the recipe as a whole."""
    text: str
    """A line for people, with the field's name in it."""


def check_recipe(recipe: str | Path, overrides: Sequence[str]) -> list[Finding]:
    """Return what can be known of a run: first all that is wrong with its recipe; if nothing is, the rest."""
    try:
        config = configuration.load(recipe, overrides)
    except ConfigError as error:
        return [Finding("error", fault.field, fault.text) for fault in error.faults]
    with ExitStack() as opened:
        return _Check(config, opened).findings()


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding to standard output, folded where that is a terminal."""
    width = terminal_width(Console())
    for level, _, text in findings:
        typer.secho(f"{level:<9}", fg=COLOURS[level], nl=False)
        typer.echo(f"\n{' ' * 9}".join(fold(printable(text), None if width is None else max(width - 9, 20))))
    counts = Counter(finding.level for finding in findings)
    say(", ".join(count(counts[level], level) for level in ("error", "warning")))


class _Check:
    """The check of one config.

    Args:
        opened: closes the corpora.
    """

    def __init__(self, config: Config, opened: ExitStack) -> None:
        self._config = config
        remote = config.data.remote
        remote = remote.model_copy(update={"cache": None, "attempts": min(remote.attempts, ATTEMPTS)})
        self._data = config.data.model_copy(update={"remote": remote})
        self._opened = opened
        self._folder = RunFolder(Path(config.run.root) / config.run.name)
        self._found: list[Finding] = []
        self._home_was_read = False
        """Whether it is known which checkpoints the run has."""

    def findings(self) -> list[Finding]:
        self._add("ok", "", "the recipe is valid")
        self._found += [Finding("warning", warning.field, warning.text) for warning in self._config.warnings()]
        streams = self._open_streams()
        checkpoint = None
        with self._refusals("checkpoint.home" if self._config.checkpoint.home else "run.name"):
            checkpoint = self._newest_checkpoint()
            self._home_was_read = True
        if streams is not None:
            self._check_reading(streams, checkpoint)
        self._check_validation(streams)
        began = None
        with self._refusals("run.name"):
            began = self._began()
            self._check_run(streams, began, checkpoint)
        self._check_folders()
        device = self._check_device()
        dtype = self._check_precision(device, began) if device is not None else None
        model = self._build_model()
        if model is not None:
            self._check_weights(model, checkpoint)
            self._check_disk(model)
            if device is not None and dtype is not None:
                self._check_memory(model, device, dtype)
        self._check_packages()
        return self._found

    def _add(self, level: Level, field: str, text: str) -> None:
        self._found.append(Finding(level, field, text if text.startswith(field) else f"{field}: {text}"))

    @contextmanager
    def _refusals(self, field: str) -> Iterator[None]:
        """Within, what a run would be refused for is noted as an error of a field."""
        try:
            yield
        except REFUSALS as error:
            self._add("error", field, str(error))

    def _source_field(self, name: str) -> str:
        return "data.shards" if name == ONLY_SOURCE and self._data.shards else f"data.mixture.{name}.shards"

    def _open_streams(self) -> dict[str, ByteStream] | None:
        """Return the streams by source; None where one cannot be opened."""
        streams = {}
        for name, source in self._data.sources().items():
            with self._refusals(self._source_field(name)):
                streams[name] = open_stream(self._data, source, self._config.model.sequence_length)
                self._opened.enter_context(streams[name].corpus)
        if carries_memory(self._config.model):
            with self._refusals("data.lanes"):
                check_lanes(streams, self._config.train.global_batch)
        return streams if len(streams) == len(self._data.sources()) else None

    def _check_validation(self, streams: Mapping[str, ByteStream] | None) -> None:
        validation = self._config.validation
        if validation.shards is None:
            self._add("ok", "validation.shards", "none, so only the training loss is measured")
            return
        with self._refusals("validation.shards"):
            corpus = self._opened.enter_context(Corpus(validation.shards, remote=self._data.remote))
            self._add("ok", "validation.shards", f"{_in_words(corpus)}, scored every {validation.every:,} steps")
            for name, stream in (streams or {}).items():
                if stream.corpus.content_sha256 == corpus.content_sha256:
                    trained = self._source_field(name)
                    self._add(
                        "warning", "validation.shards", f"it has the content of {trained}, which the run trains on"
                    )

    def _check_run(
        self, streams: dict[str, ByteStream] | None, began: dict[str, Any] | None, checkpoint: Metadata | None
    ) -> None:
        """Report whether a run of this name exists, and whether this recipe resumes it.

        Raises:
            CheckpointError: it does not.
        """
        if holder := self._folder.holder():
            self._add("error", "run.name", f"{holder} is training in {self._folder.path}")
        if streams is not None:
            fingerprint = fingerprint_of(streams)
            if began is not None:
                check_same_run(self._folder.path, began, self._config, fingerprint)
            if checkpoint is not None:
                check_resumes(checkpoint, self._config, fingerprint)
        elif began is not None or checkpoint is not None:
            self._add("warning", "run.name", "without its corpora, it is not known whether this recipe fits the run")
        if self._home_was_read:
            self._add_where_it_starts(checkpoint, is_new=began is None)

    def _newest_checkpoint(self) -> Metadata | None:
        """Return the newest checkpoint whose metadata is valid; its tensors are not read."""
        store = CheckpointStore(self._folder.checkpoints_in(self._config.checkpoint.home), keep=None)
        for place in reversed(store.committed()):
            try:
                return read_metadata(place)
            except InvalidCheckpointError as error:
                self._add("warning", "run.name", f"{place} is not valid ({error}); a start would set it aside")
        return None

    def _began(self) -> dict[str, Any] | None:
        """Return what the run began as, if it has written a number.

        Raises:
            StateFileError: run.json is damaged.
        """
        metrics = self._folder.metrics
        began = self._folder.stored_identity()
        return began if metrics.exists() and metrics.stat().st_size else None

    def _add_where_it_starts(self, checkpoint: Metadata | None, *, is_new: bool) -> None:
        steps = self._config.train.steps
        if checkpoint is None:
            before = "a new run" if is_new else "the run has started before, and has no checkpoint"
            self._add("ok", "run.name", f"{before}; {self._folder.path} begins at step 1 of {steps:,}")
            return
        step = step_of(checkpoint.folder)
        if step >= steps:
            self._add("warning", "train.steps", f"{steps:,}, and the run is at step {step:,}: nothing is left to train")
        else:
            self._add("ok", "run.name", f"resumes after step {step:,} of {steps:,}, from {checkpoint.folder}")
        for change in changes(checkpoint.state["config"], self._config.as_tree()):
            name = change.partition(":")[0]
            self._found.append(Finding("ok", name, f"changed since step {step:,}: {change}"))

    def _check_reading(self, streams: dict[str, ByteStream], checkpoint: Metadata | None) -> None:
        """Report what the run reads of each corpus."""
        train = self._config.train
        record = Record() if checkpoint is None else Record.from_state(checkpoint.state["reading"])
        with self._refusals("data"):
            reading = Reading(self._data, streams, record, train.global_batch)
            epochs = reading.mixture.epochs(reading.sequences_in_all(train.steps))
            for name, stream in streams.items():
                field, sequences = self._source_field(name), stream.sequences_per_epoch
                of_length = f"{sequences:,} sequences of {stream.sequence_length:,} bytes per epoch"
                self._add(
                    "ok", field, f"{_in_words(stream.corpus)}, {of_length}; the run reads {epochs[name]:.2f} epochs"
                )
                if sequences < train.global_batch:
                    self._add("warning", field, f"its {sequences:,} sequences are fewer than train.global_batch")

    def _check_folders(self) -> None:
        config = self._config
        self._check_writable("run.root", self._folder.path)
        home = config.checkpoint.home
        if home is not None and isinstance(place := locate(home), Path):
            self._check_writable("checkpoint.home", place)
        elif home is not None and self._home_was_read:
            self._add("ok", "checkpoint.home", f"{home} can be listed; whether it can be written is not known")
        if config.data.remote.cache is not None:
            self._check_writable("data.remote.cache", Path(config.data.remote.cache))

    def _check_writable(self, field: str, path: Path) -> None:
        """Report whether files can be made in a folder, which need not exist."""
        there = _nearest_folder(path.absolute())
        if not there.is_dir():
            self._add("error", field, f"{there} is not a folder")
        elif not os.access(there, os.W_OK | os.X_OK):
            self._add("error", field, f"{there} cannot be written")
        else:
            self._add("ok", field, f"{path} can be {'written' if there == path.absolute() else 'made'}")

    def _check_device(self) -> torch.device | None:
        """Report what the run computes on; return the device of its last rank on this machine."""
        engine, ranks = self._config.engine, self._config.launch.processes
        try:
            check_ranks(engine, ranks)
        except EngineError as error:
            # A launcher such as `byteloom submit` starts as many as it is asked for, whatever the recipe says.
            alone = ", or use a launcher that starts several" if ranks == 1 else ""
            self._add("warning" if ranks == 1 else "error", "engine.name", f"{error}{alone}")
        with self._refusals("engine.device"):
            device = choose_device(engine.device, ranks - 1)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
            self._add("ok", "engine.device", f"{name}, in {'one process' if ranks == 1 else f'{ranks} processes'}")
            if device.type == "cpu" and ranks > (cores := len(os.sched_getaffinity(0))):
                self._add("warning", "launch.processes", f"{ranks} processes share {cores} processors")
            passes = -(-self._config.train.global_batch // self._config.train.micro_batch)
            if ranks > passes:
                work = count(passes, "micro-batch", "micro-batches")
                self._add("warning", "train.micro_batch", f"a step has {work} for {ranks} processes, so some are idle")
            return device
        return None

    def _check_precision(self, device: torch.device, began: dict[str, Any] | None) -> torch.dtype | None:
        """Report what precision the passes have; return their type, or None where the device cannot compute in it."""
        asked, field = self._config.engine.precision, "engine.precision"
        with self._refusals(field):
            kept = self._folder.earlier_precision(began) if began else None
            precision = choose_precision(asked, device, kept) if asked == "auto" else asked
            if precision == "fp8":
                check_float8(device)
            if remark := remark_on_precision(precision, device):
                self._add("warning", field, remark)
            else:
                self._add(
                    "ok", field, precision if precision == asked else f"{asked}, which is {precision} for this run"
                )
            return compute_dtype(precision)
        return None

    def _build_model(self) -> ByteModel | None:
        """Return the model on the meta device; None where it cannot be built."""
        try:
            model = on_meta(self._config.model)
        except (RuntimeError, OverflowError) as error:  # sizes beyond what torch can count
            self._add("error", "model", f"it cannot be built: {str(error).partition(chr(10))[0]}")
            return None
        self._add("ok", "model", f"{self._config.model.family}, {model.parameter_count():,} parameters")
        return model

    def _check_weights(self, model: ByteModel, checkpoint: Metadata | None) -> None:
        initialize, field = self._config.initialize, "initialize.weights"
        if initialize.weights is None:
            return
        if checkpoint is not None:
            self._add("ok", field, "not read, because the run has a checkpoint of its own")
            return
        with self._refusals(field):
            origin = find_origin(initialize, self._config.model, model, self._config.optimizer.name)
            self._add("ok", field, f"{len(origin.tensors):,} tensors of {origin.checkpoint.folder}")
            for difference in origin.differences:
                self._add("warning", field, f"different from those weights: {difference}")

    def _check_disk(self, model: ByteModel) -> None:
        """Report whether the checkpoints that are kept fit on the disk."""
        config, place = self._config.checkpoint, locate(self._folder.checkpoints_in(self._config.checkpoint.home))
        one = _checkpoint_bytes(model, self._config.train.global_batch)
        saves = -(-self._config.train.steps // config.every)
        if not isinstance(place, Path):
            self._add("ok", "checkpoint.keep", f"{size(one)} a checkpoint; the free space of {place} is not known")
            return
        there = len(CheckpointStore(place, keep=None).committed())
        kept = saves if config.keep is None else config.keep + 1  # a new one is written before an old one is deleted
        kept += self._config.train.steps // config.keep_every if config.keep_every else 0
        most = min(kept, max(saves, 1))
        free = shutil.disk_usage(_nearest_folder(place.absolute())).free
        text = f"{most:,} checkpoints of {size(one)} at most, {size(free)} free"
        if max(most - there, 1) * one > free:
            self._add("error" if one > free else "warning", "checkpoint.keep", f"{text}: the disk would fill up")
        else:
            self._add("ok", "checkpoint.keep", text)

    def _check_memory(self, model: ByteModel, device: torch.device, dtype: torch.dtype) -> None:
        """Estimate what a step holds, on the device and in the host's memory."""
        config, ranks, field = self._config, self._config.launch.processes, "train.micro_batch"
        rows = min(config.train.micro_batch, config.train.global_batch)
        checkpointing = config.engine.activation_checkpointing
        if checkpointing.mode == "budget":  # only a compiler knows what it keeps
            checkpointing = CheckpointingConfig()
        with self._refusals("engine.activation_checkpointing"):
            activations = measure_activations(config.model, rows, dtype, checkpointing).peak
            states = self._states(model, dtype)
            offloaded = sum(states) - states.weights if config.engine.offload else 0
            own = sum(states) - offloaded + activations
            copied = _checkpoint_bytes(model, config.train.global_batch)
            parts = f"a micro-batch of {rows:,}: {size(activations)} of activations, {size(sum(states))} of states"
            if device.type == "cuda":
                self._compare(field, f"{parts}, on each GPU", own, torch.cuda.mem_get_info(device)[1])
                self._compare(field, "states in the host's memory", ranks * offloaded + copied, _host_memory())
            else:
                each = f" in each of {ranks} processes" if ranks > 1 else ""
                whole = ranks * (own + offloaded) + copied
                self._compare(field, f"{parts}{each}, {size(copied)} of a checkpoint's copy", whole, _host_memory())

    def _states(self, model: ByteModel, dtype: torch.dtype) -> States:
        engine, ranks = self._config.engine, self._config.launch.processes
        gpus = engine.shards or ranks if engine.name == "hsdp" else ranks
        states = {sharding.name: sharding.states for sharding in shardings(model, dtype, gpus)}
        return states["one process" if gpus == 1 else SHARDINGS[engine.name]]

    def _compare(self, field: str, text: str, needed: int, there: int) -> None:
        level: Level = "error" if needed > there else "warning" if needed > USABLE * there else "ok"
        remark = {"error": ", which is too much", "warning": ", which may be too much", "ok": ""}[level]
        self._add(level, field, f"{text}; about {size(needed)} of {size(there)}{remark}")

    def _check_packages(self) -> None:
        """Look for what this recipe imports and others do not."""
        config = self._config
        needed = {
            "deepspeed": ("engine.name", config.engine.name.startswith("zero")),
            "torchao": ("engine.precision", config.engine.precision == "fp8"),
            "mlflow": ("tracking.enabled", config.tracking.enabled),
        }
        for package, (field, is_needed) in needed.items():
            if is_needed and importlib.util.find_spec(package) is None:
                self._add("error", field, str(missing(field, package, ImportError("it is not installed"))))
        if config.engine.compile and not any(map(shutil.which, COMPILERS)):
            self._add("error", "engine.compile", f"no C++ compiler is on the PATH: {', '.join(COMPILERS)}")


def _checkpoint_bytes(model: ByteModel, global_batch: int) -> int:
    """Return the size of a checkpoint: masters, moments, and what the model carries for each row, in fp32."""
    carried = sum(tensor[0].numel() for tensor in model.empty_memory(1).values())
    return model.parameter_count() * (MASTER + MOMENTS) + MASTER * carried * global_batch


def _host_memory() -> int:
    """Return the bytes of memory that this machine and its container give to this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit: "max"
        limits.append(int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    return min(limits)


def _nearest_folder(path: Path) -> Path:
    """Return an absolute path, or the first of its parents that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _in_words(corpus: Corpus) -> str:
    documents = corpus.manifest["documents"]
    return f"{count(documents, 'document')}, {size(corpus.raw_bytes)}"
