"""Entropies whose context is a document or a line, and not the row around it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.corpus.entropies import EntropiesKey
from data_pipeline.documents import Piece
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.conformance import MODEL_LAWS, Subject
from pretrain.evaluation.modes import Mode, score_documents
from pretrain.models import build_model, small_config
from pretrain.models.document_entropies import ContextRule, ContextTracker
from pretrain.models.document_entropies import entropies_of as entropies_of_parts
from pretrain.models.entropy_model import EntropyModel, patcher_of, stored_entropies_of
from pretrain.models.patching.frozen import FrozenModelError
from pretrain.models.references.patches import entropies_of
from tests.pretrain.models.test_entropy_patches import entropy_config, exports  # noqa: F401 (a fixture)

NEWLINE = 10


def rows_of_lines() -> Tensor:
    """Two rows of what positions read, with lines, an empty line, a second document and padding."""
    ids = torch.randint(32, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = ids[1, 13] = SEPARATOR
    ids[0, 9] = ids[0, 10] = ids[0, 25] = ids[1, 4] = ids[1, 12] = NEWLINE
    ids[1, 29:] = PADDING
    return ids


def resetting(exports: Path, name: str = "small", **fields: Any) -> EntropyModel:  # noqa: F811
    config = entropy_config(exports, name, **fields or {"threshold": 4.98}, reset_at_newlines=True)
    return EntropyModel(config, 32, across_documents=True)


@pytest.mark.parametrize("name", ["small", "mamba"])
def test_entropies_of_a_line_are_those_of_the_line_alone(exports: Path, name: str):  # noqa: F811
    model, read = resetting(exports, name), rows_of_lines()
    found = model.entropies(read)
    for row, begin, end in ((0, 0, 9), (0, 9, 10), (0, 10, 25), (0, 25, 32), (1, 0, 4), (1, 4, 12), (1, 13, 29)):
        line = read[row : row + 1, begin:end].clone()
        line[0, 0] = SEPARATOR
        torch.testing.assert_close(found[row : row + 1, begin:end], model.entropies(line))


@pytest.mark.slow
def test_entropies_of_lines_are_those_of_the_released_code(exports: Path):  # noqa: F811
    """`model.py` of an export finds them in plain Python."""
    patcher, read = {"model": str(exports / "small"), "reset_at_newlines": True}, rows_of_lines()[:1]
    torch.testing.assert_close(
        torch.tensor(entropies_of(patcher, read[0].tolist(), True)), resetting(exports).entropies(read)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "mamba"])
def test_patches_of_a_prefix_are_those_of_the_row_with_lines(exports: Path, name: str):  # noqa: F811
    fields = {"threshold": 4.98 if name == "small" else 5.45}
    config = entropy_config(exports, name, **fields, reset_at_newlines=True)
    patcher, read = patcher_of(config, 32, 32, across_documents=True), rows_of_lines()
    whole = patcher(read)
    assert 4 < int(whole.starts.sum()) < 60
    for cut in (1, 9, 10, 11, 14, 31):
        state, starts = None, []
        for part in (read[:, :cut], *read[:, cut:].split(1, 1)):
            patches = patcher(part, state)
            starts.append(patches.starts)
            state = patches.state
        assert torch.equal(torch.cat(starts, 1), whole.starts)


def test_models_that_depend_on_the_place_are_refused(exports: Path):  # noqa: F811
    patcher = entropy_config(exports, "learned", threshold=4.98, reset_at_newlines=True).model_dump()
    with pytest.raises(FrozenModelError, match="positions: rotary"):
        build_model(small_config("blt", patcher=patcher))


def stored_model(exports: Path, *, name: str = "small", lines: bool = False) -> EntropyModel:  # noqa: F811
    config = entropy_config(exports, name, threshold=4.98, entropies="corpus", reset_at_newlines=lines)
    return EntropyModel(config, 32, across_documents=True)


def document(length: int) -> np.ndarray:
    """Return ids of a document with some lines, short and long ones, and of its end."""
    ids = np.random.default_rng(7).integers(32, 256, length + 1).astype(np.int16)
    ids[[3, 4, 20, length - 60, length - 1]] = NEWLINE
    ids[-1] = SEPARATOR
    return ids


def whole(model: EntropyModel, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Return the entropies of a document that is given in pieces, all of which are computed at once."""
    tracker = ContextTracker(ContextRule.of(model))
    parts = [tracker.add(piece) for piece in np.split(ids, cuts)]
    return np.concatenate(entropies_of_parts(model, parts, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overlap"), [("small", 7), ("mamba", 16)])
@pytest.mark.parametrize("lines", [False, True], ids=["documents", "lines"])
def test_stored_entropies_are_those_of_the_rule_however_a_document_is_cut(
    exports: Path,  # noqa: F811
    name: str,
    overlap: int,
    lines: bool,
):
    """The rule is that of the module's drawing. A byte depends on 2 x (4 - 1) + 1 bytes in 2 layers of window 4."""
    model, ids = stored_model(exports, name=name, lines=lines), document(150)
    rule = ContextRule.of(model)
    assert rule == (32, overlap, lines)
    starts = np.concatenate([[0], np.flatnonzero(ids == NEWLINE) + 1]) if lines else np.zeros(1, np.int64)
    expected = []
    for place in range(len(ids)):
        start = int(starts[starts <= place].max())
        first = max((place - start - 32) // (32 - overlap) + 1, 0) * (32 - overlap)
        if name == "small" and first:
            first = place - start - 31  # what the model reads at most is no more than what it depends on
        before = [] if first else [SEPARATOR]
        row = [*before, *ids[start + first : place + 1].tolist()]
        expected.append(float(model.of_ids(torch.tensor([row]))[0, -1]))
    for cuts in ([], [1], [16, 33, 34, 100], list(range(1, 151))):
        np.testing.assert_allclose(whole(model, ids, cuts), expected, atol=4e-3)  # fp16 has 2^-9 nats here


def test_entropies_of_a_row_that_begins_a_document_are_those_stored(exports: Path):  # noqa: F811
    """A decoder's row does. Rounding to fp16 may differ by one step where fp32 differs."""
    for lines in (False, True):
        model, ids = stored_model(exports, lines=lines), document(150)
        read = torch.from_numpy(np.concatenate([[SEPARATOR], ids[:31]]).astype(np.int64))[None]
        np.testing.assert_allclose(model.entropies(read)[0], whole(model, ids, [])[:32], atol=4e-3)


def test_entropies_of_later_documents_of_a_row_are_those_stored(exports: Path):  # noqa: F811
    model, ids = stored_model(exports), document(150)[-21:]
    read = torch.full((1, 32), 65)
    read[0, 0] = read[0, 9] = SEPARATOR
    read[0, 10:30] = torch.from_numpy(ids[:-1].astype(np.int64))
    np.testing.assert_allclose(model.entropies(read)[0, 9:30], whole(model, ids, []), atol=4e-3)


@pytest.mark.slow
def test_models_with_stored_entropies_obey_the_laws(exports: Path, tmp_path: Path):  # noqa: F811
    fields = {"threshold": 4.98, "max_patch_length": 6, "entropies": "corpus", "reset_at_newlines": True}
    patcher = entropy_config(exports, **fields).model_dump(mode="json")
    for law in MODEL_LAWS:
        if law.name in {"decoder", "reference"}:
            law.check(Subject.of("blt", patcher=patcher), tmp_path)
        if law.name == "decoder":
            law.check(Subject.of("spacebyte", patcher=patcher), tmp_path)


@torch.no_grad()
def test_windows_are_scored_with_the_entropies_of_their_documents(exports: Path):  # noqa: F811
    """Each window has the entropies of its bytes in the whole document, also where it begins in the middle."""
    patcher = entropy_config(exports, rule="monotonic", increase=0.02, entropies="corpus").model_dump()
    model, ids = build_model(small_config("blt", patcher=patcher)).eval(), document(90)
    found = whole(stored_model(exports), ids, [])
    for after_separator in (False, True):
        piece = Piece("document", "binary", 0, ids[:-1].astype(np.uint8).tobytes(), ends=True)
        seen = 0
        for windows, nats in score_documents(model, [piece], Mode.sliding, 2, after_separator=after_separator):
            for window, row in zip(windows, nats, strict=True):
                own = np.zeros(len(window.ids), np.float16)
                first = max(window.offset, 0)
                own[len(own) - (window.offset + len(own) - first) :] = found[first : window.offset + len(own)]
                expected = model(torch.from_numpy(window.ids)[None], torch.from_numpy(own)[None])[0]
                torch.testing.assert_close(row[: len(own)], expected, atol=1e-4, rtol=1e-4)
                seen += len(own) - window.context
        assert seen == 90


def test_passes_with_stored_entropies_do_not_count_the_model_of_bytes(exports: Path):  # noqa: F811
    config = entropy_config(exports, threshold=4.98, entropies="corpus")
    model = build_model(small_config("blt", patcher=config.model_dump()))
    assert model.flops(32) == build_model(small_config("blt")).flops(32)
    ids, given = model.empty_example(2, torch.device("cpu"))
    assert given is not None and model(ids, given).shape == (2, 32)
    assert config.digest is not None and stored_entropies_of(small_config("blt", patcher=config.model_dump())) == (
        EntropiesKey(config.digest, False)
    )
    assert stored_entropies_of(small_config("blt")) is None
