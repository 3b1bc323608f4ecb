"""The `entropies` command: entropies of a model of bytes beside a corpus."""

from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.entropies import write_entropies
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.weights import DeviceOption, ResetOption
from pretrain.engines.base import choose_device
from pretrain.models.document_entropies import BlockEntropies
from pretrain.models.entropy_model import EntropyModel, stored_key
from pretrain.models.patching.entropy import EntropyConfig
from pretrain.models.patching.frozen import frozen_config
from pretrain.terminal.console import display, say
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


@app.command("entropies")
@stopping_at_once(display.close)
def entropies_command(
    folder: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="Corpus folder.", show_default=False, parser=parse_path)
    ],
    model: Annotated[
        Path, typer.Option(help="Export of the model of bytes: a folder.", show_default=False, parser=parse_path)
    ],
    reset_at_newlines: ResetOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Write the entropies of a model of bytes beside a corpus.

    A model with patcher.entropies: corpus reads them in training.

    They take 2 bytes a byte. A command that was killed
    continues if it is given again, and one that has finished
    writes damaged files again.
    """
    config = EntropyConfig(model=str(model), threshold=0.0, entropies="corpus", reset_at_newlines=reset_at_newlines)
    longest = int(frozen_config(config.model, config.digest)["sequence_length"])
    byte_model = EntropyModel(config, longest, across_documents=False)
    key, chosen = stored_key(config), choose_device(device)
    with Corpus(folder) as corpus, display.phase("finding entropies", corpus.raw_bytes) as phase:
        withdrawn = [entry.key for entry in corpus.withdrawn]
        new = write_entropies(corpus, key, lambda: BlockEntropies(byte_model, chosen, withdrawn), phase.advance)
        shards = len(corpus.manifest["shards"])
    say(f"{folder / key.folder}: entropies of {count(shards, 'shard')}, {new:,} of them written now")
