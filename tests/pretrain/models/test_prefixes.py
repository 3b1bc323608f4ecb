"""A Transformer with prefixes: the ids of a prefix see each other, and each later id sees those before it."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.models import ByteModel, build_model, small_config

T = 10
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def model() -> ByteModel:
    torch.manual_seed(0)
    built = build_model(small_config("transformer", sequence_length=T, window=None)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    built.nats = lambda states, ids: F.cross_entropy(built.logits(states).transpose(1, 2), ids, reduction="none")
    return built


@torch.no_grad()
def test_scores_of_the_rest_depend_on_the_whole_prefix_and_on_no_later_id(model: ByteModel):
    ids, prefix = torch.randint(256, (2, T)), torch.tensor([4, 7])
    before = model(ids, prefix)
    for place in range(T):
        other = ids.clone()
        other[:, place] = (ids[:, place] + 1) % 256
        differs = (model(other, prefix) - before).abs() > TOLERANCE
        for row, length in enumerate(prefix.tolist()):
            expected = [place < at or place == at for at in range(length, T)]
            assert differs[row, length:].tolist() == expected, (row, place)
            if place < length - 1:  # the positions of the prefix read it, also those before
                assert differs[row, 1:length].all()


@torch.no_grad()
def test_empty_prefix_is_causal(model: ByteModel):
    ids = torch.randint(256, (2, T))
    torch.testing.assert_close(model(ids, torch.zeros(2, dtype=torch.long)), model(ids), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_decoder_that_reads_prompts_whole_agrees_with_forward(model: ByteModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "reads_prompts_whole", True)
    ids = torch.randint(256, (2, T))
    for length in range(1, T):
        expected = model(ids, torch.full((2,), length))
        decoder = model.decoder(2)
        logits = decoder.prime(ids[:, :length])
        for place in range(length, T):
            nats = F.cross_entropy(logits, ids[:, place], reduction="none")
            torch.testing.assert_close(nats, expected[:, place], atol=TOLERANCE, rtol=0)
            if place + 1 < T:
                logits = decoder.step(ids[:, place])
