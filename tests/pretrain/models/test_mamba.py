"""Mamba-2: forms of the recurrence agree, and the first values are those of the authors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models import build_model, small_config
from pretrain.models.blocks.mamba2 import scan
from pretrain.models.families.mamba import Mamba


def mamba(**changes: object) -> Mamba:
    model = build_model(small_config("mamba", **changes))
    assert isinstance(model, Mamba)
    return model.double().eval()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 29), st.booleans(), st.integers(0, 2**31))
def test_scan_is_the_recurrence_for_every_chunk_and_cut(length: int, chunk: int, cut: int, resets: bool, seed: int):
    torch.manual_seed(seed)
    rows, heads, width, state = 2, 3, 4, 5
    x = torch.randn(rows, length, heads, width, dtype=torch.float64)
    steps = 3 * torch.rand(rows, length, heads, dtype=torch.float64)
    rates = -16 * torch.rand(heads, dtype=torch.float64)
    write, read = torch.randn(2, rows, length, state, dtype=torch.float64)
    documents = (torch.rand(rows, length) < 0.2).cumsum(1) * resets

    expected, held = [], torch.zeros(rows, heads, width, state, dtype=torch.float64)
    for t in range(length):
        goes_on = documents[:, t] == (documents[:, t - 1] if t else 0)
        held = held * goes_on[:, None, None, None] * (steps[:, t] * rates).exp()[..., None, None]
        held = held + (steps[:, t, :, None] * x[:, t])[..., None] * write[:, t, None, None]
        expected.append((held * read[:, t, None, None]).sum(-1))

    given_documents = documents if resets else None
    y, states = scan(x, steps, rates, write, read, chunk=chunk, documents=given_documents)
    torch.testing.assert_close(y, torch.stack(expected, 1))
    torch.testing.assert_close(states[-1].view_as(held), held)

    cut = min(cut, length - 1)
    if cut:  # two parts, of which the second begins with the state of the first
        parts = [slice(0, cut), slice(cut, length)]
        carried, before, document = [], None, None
        for part in parts:
            of_part = [values[:, part] for values in (x, steps, write, read)]
            y, states = scan(
                *of_part[:2],
                rates,
                *of_part[2:],
                chunk=chunk,
                documents=documents[:, part] if resets else None,
                before=before,
                before_document=document,
            )
            before = states[-1]
            document = documents[:, part][:, -1] if resets else None
            carried.append(y)
        torch.testing.assert_close(torch.cat(carried, 1), torch.stack(expected, 1))


def test_strong_decay_gives_finite_gradients():
    """The upper triangle of a chunk's decays would overflow if it were masked after the exponential."""
    x = torch.randn(1, 64, 1, 2, requires_grad=True)
    steps = torch.full((1, 64, 1), 50.0, requires_grad=True)
    y, _ = scan(x, steps, torch.tensor([-16.0]), torch.randn(1, 64, 3), torch.randn(1, 64, 3), chunk=64)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert steps.grad is not None and steps.grad.isfinite().all()


@pytest.mark.parametrize("strong", [1e4, 1e10, 3e38])
def test_positions_beside_a_very_strong_decay_stay_exact(strong: float):
    """A sum of decays over a chunk would round those of all later positions to the precision of the strong one."""
    generator = torch.Generator().manual_seed(0)
    x, write, read = (torch.randn(1, 64, *shape, generator=generator) for shape in ((2, 3), (4,), (4,)))
    steps = torch.rand(1, 64, 2, generator=generator) / 10
    x[:, 20], steps[:, 20] = 0, strong
    steps.requires_grad_()
    chunked, _ = scan(x, steps, torch.tensor([-1.0, -16.0]), write, read, chunk=64)
    stepwise, _ = scan(x, steps, torch.tensor([-1.0, -16.0]), write, read, chunk=1)
    torch.testing.assert_close(chunked, stepwise, rtol=0, atol=1e-4)
    chunked.sum().backward()
    assert steps.grad is not None and steps.grad.isfinite().all()


def test_result_does_not_depend_on_the_chunk():
    ids = torch.randint(0, SEPARATOR + 1, (2, 32), generator=torch.Generator().manual_seed(0))
    scores = []
    for chunk in (1, 5, 32, 100):
        torch.manual_seed(0)
        scores.append(mamba(chunk=chunk)(ids))
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_decoder_keeps_a_state_of_one_size_and_has_no_end():
    model = mamba()
    longer = mamba(sequence_length=61)
    longer.load_state_dict(model.state_dict())
    ids = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    decoder = model.decoder(2)
    logits = decoder.prime(ids[:, :20])
    sizes = [(s.state.shape, s.inputs.shape) for s in decoder._states]
    for place in range(20, 60):
        logits = decoder.step(ids[:, place])
    assert [(s.state.shape, s.inputs.shape) for s in decoder._states] == sizes
    torch.testing.assert_close(logits, longer.decoder(2).prime(ids))


@pytest.mark.parametrize(("parameter", "low", "high"), [("step_bias", 1e-3, 0.1), ("log_rate", 1, 16)])
def test_first_steps_and_rates_fill_the_range_of_the_authors(parameter: str, low: float, high: float):
    values = getattr(mamba(width=256, head_width=4).blocks[0].mixer, parameter)
    drawn = torch.nn.functional.softplus(values) if parameter == "step_bias" else values.exp()
    assert drawn.min() >= low * (1 - 1e-6) and drawn.max() <= high * (1 + 1e-6)
    share = (drawn.log() - torch.tensor(low).log()) / (torch.tensor(high).log() - torch.tensor(low).log())
    if parameter == "log_rate":
        share = (drawn - low) / (high - low)
    assert abs(share.mean() - 0.5) < 0.15  # 128 uniform numbers: six deviations of their mean
