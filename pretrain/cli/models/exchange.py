"""The commands `import` and `export`: weights in the formats of the authors' code and of transformers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.weights import ModelPath
from pretrain.config.errors import ConfigError
from pretrain.config.loading import tree_of
from pretrain.terminal.console import display, say
from pretrain.training.stop import stopping_at_once
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.foreign import ForeignFileError, export_foreign, import_foreign
from pretrain.training.weights.hugging_face import export_for_transformers
from pretrain.training.weights.results import evaluations_of, logged_losses, run_of

app = typer.Typer()


class Form(StrEnum):
    """Formats."""

    nanogpt = "nanogpt"
    transformer_xl = "transformer-xl"
    perceiver_ar = "perceiver-ar"
    hf = "hf"


OutOption = Annotated[
    Path, typer.Option(help="New folder or file; must not exist.", show_default=False, parser=parse_path)
]


@app.command("import")
@stopping_at_once(display.close)
def import_command(
    form: Annotated[Form, typer.Argument(metavar="FORMAT", help="Format of the file.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights; see above.", parser=parse_path)],
    out: OutOption,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE", help="Fields of the model that the file does not say: model.heads=8."),
    ] = None,
    symbols: Annotated[
        Path | None,
        typer.Option(
            help="File with a line for each symbol of the vocabulary: its byte (0 to 255), or <eos>. "
            "Default: symbol 0 is byte 0, and so on.",
            parser=parse_path,
        ),
    ] = None,
    start: Annotated[
        int | None,
        typer.Option(help="Symbol that each row begins with. Default: the separator (256), else a newline or a space."),
    ] = None,
) -> None:
    r"""Import weights of other programs as an export folder.

    No pickle is executed. `eval`, `generate` and initialize.weights take the folder.

    nanogpt: ckpt.pt of karpathy/nanoGPT.

    transformer-xl: kimiyoung/transformer-xl in PyTorch. Its model.pt is a pickled model. In its environment, write
    torch.save(torch.load("model.pt").state_dict(), "state.pt"), and the vocabulary by
    print(*corpus.vocab.idx2sym, sep="\n"). Give model.sequence_length and model.memory_length here.

    perceiver-ar: Haiku parameters of google-research/perceiver-ar. In its environment, write
    numpy.savez("params.npz", arguments=json.dumps(model_kwargs), **{f"{m}/{n}": v for m, p in params.items() for n, v
    in p.items()}), where params are in float32.

    hf: folder of a Byteloom model that transformers has saved. A folder of export --as hf itself needs no import.
    """
    given = tree_of(fields or [])
    if unknown := given.keys() - {"model"}:
        raise ConfigError(f"{min(unknown)} is not a field of the model; name fields as model.heads")
    named = None if symbols is None else _read_symbols(symbols)
    card = import_foreign(form.value, file, out, given.get("model", {}), named, start)
    say(f"{out}: {card['parameters']:,} parameters of a {card['architecture']}")


@app.command("export")
@stopping_at_once(display.close)
def export_command(
    model: ModelPath,
    form: Annotated[Form, typer.Option("--as", help="Format of the file.", show_default=False)],
    out: OutOption,
) -> None:
    """Export the weights of a model for other programs.

    hf is a folder that transformers loads, without Byteloom there. Byteloom loads it too.
    The other formats are those of the authors' code. A model that one cannot express is refused.
    Heads of model.multi_byte are left out of all these formats.
    `byteloom checkpoint export` writes safetensors.
    """
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(model, progress=phase.update)
    further = checkpoint.state["config"]["model"].get("multi_byte")
    dropped = f"; without the {count(further['heads'] - 1, 'further head')} of model.multi_byte" if further else ""
    if form is Form.hf:
        run = run_of(model)
        results = evaluations_of(run, checkpoint) if run else []
        export_for_transformers(checkpoint, out, logged_losses(checkpoint), results)
        measured = f", {count(len(results), 'measured result')} in README.md" if results else ""
        say(f"{out}: a folder for transformers{measured}{dropped}")
        return
    export_foreign(form.value, checkpoint, out)
    say(f"{out}: weights for {form.value}{dropped}")


def _read_symbols(path: Path) -> list[int]:
    """Return the id of each line of a file.

    Raises:
        ForeignFileError: a line is no byte.
        OSError: the file cannot be read.
    """
    symbols = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = "256" if line.strip() == "<eos>" else line.strip()
        if not text.isdecimal() or int(text) > 257:
            raise ForeignFileError(f"{path}, line {number}: {line!r} is neither a byte (0 to 255) nor <eos>")
        symbols.append(int(text))
    return symbols
