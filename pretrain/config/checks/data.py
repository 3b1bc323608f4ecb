"""Check the corpora of a run."""

from collections.abc import Mapping

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.inspection.coverage import coverage_of
from data_pipeline.stream.reading import Reading, Record, open_stream
from pretrain.checkpoint import Metadata
from pretrain.config.checks.findings import Check
from pretrain.models import carries_memory, image_of
from pretrain.models.entropy_model import stored_entropies_of
from pretrain.terminal.progress import size
from pretrain.training.starting.checks import check_images, check_lanes


def open_streams(check: Check) -> dict[str, ByteStream] | None:
    """Return the streams by source, or None if one cannot be opened."""
    streams = {}
    for name, source in check.data.sources().items():
        with check.refusals(check.source_field(name)):
            length, entropies = check.config.model.sequence_length, stored_entropies_of(check.config.model)
            streams[name] = open_stream(check.data, source, length, entropies)
            check.opened.enter_context(streams[name].corpus)
    if carries_memory(check.config.model):
        with check.refusals("data.lanes"):
            check_lanes(streams, check.config.train.global_batch)
    if (image := image_of(check.config.model)) is not None:
        with check.refusals("model.positions"):
            check_images(streams, image)
    return streams if len(streams) == len(check.data.sources()) else None


def check_reading(check: Check, streams: dict[str, ByteStream], checkpoint: Metadata | None) -> None:
    """Report what the run reads of each corpus."""
    train = check.config.train
    record = Record() if checkpoint is None else Record.from_state(checkpoint.state["reading"])
    with check.refusals("data"):
        reading = Reading(check.data, streams, record, train.global_batch)
        epochs = reading.mixture.epochs(reading.sequences_in_all(train.steps))
        for name, stream in streams.items():
            field, sequences = check.source_field(name), stream.sequences_per_epoch
            of_length = f"{sequences:,} sequences of {stream.sequence_length:,} bytes per epoch"
            check.add("ok", field, f"{_describe(stream.corpus)}, {of_length}; the run reads {epochs[name]:.2f} epochs")
            check.add("ok", field, str(coverage_of(stream)))
            if sequences < train.global_batch:
                check.add("warning", field, f"its {sequences:,} sequences are fewer than train.global_batch")


def check_validation(check: Check, streams: Mapping[str, ByteStream] | None) -> None:
    """Report the validation corpora, and whether the run also trains on one of them."""
    validation = check.config.validation
    if not validation.by_name():
        check.add("ok", "validation.shards", "none, so only the training loss is measured")
    for name, named in validation.by_name().items():
        field = f"validation.corpora.{name}" if name else "validation.shards"
        with check.refusals(field):
            corpus = check.opened.enter_context(
                Corpus(named.shards, remote=check.data.remote, digest=named.shards_sha256)
            )
            check.add("ok", field, f"{_describe(corpus)}, scored every {validation.every:,} steps")
            for source, stream in (streams or {}).items():
                if stream.corpus.content_sha256 == corpus.content_sha256:
                    trained = check.source_field(source)
                    check.add("warning", field, f"it has the content of {trained}, which the run trains on")


def _describe(corpus: Corpus) -> str:
    documents = corpus.manifest["documents"]
    return f"{count(documents, 'document')}, {size(corpus.raw_bytes)}"
