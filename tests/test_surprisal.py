"""Negative log-likelihood and rank of labels, against whole logits in float64."""

import pytest
import torch

from trsd.live_bytes import LiveBytes
from trsd_kernels import token_surprisal, top_k_targets

SHAPES = [(1, 1, 1), (7, 13, 5), (123, 507, 31), (64, 1000, 17)]


def make_case(num_tokens, vocab_size, hidden_size, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(vocab_size, (num_tokens,), generator=generator)


def exact(hidden, weight, bias, labels, *, scale=1.0, softcap=None):
    logits = scale * (hidden.double() @ weight.double().T + (0 if bias is None else bias.double()))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    target = logits.gather(1, labels[:, None])
    return -logits.log_softmax(1).gather(1, labels[:, None])[:, 0], 1 + (logits > target).sum(1)


@pytest.mark.parametrize("chunk_bytes", [None, 1, 5000])
@pytest.mark.parametrize("shape", SHAPES)
def test_nll_and_rank_of_float64_equal_those_of_whole_logits(shape, chunk_bytes):
    hidden, weight, bias, labels = make_case(*shape, dtype=torch.float64)
    found = token_surprisal(hidden, weight, labels, student_lm_head_bias=bias, chunk_bytes=chunk_bytes)
    nll, rank = exact(hidden, weight, bias, labels)
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=1e-12)
    assert found.nll.dtype == torch.float64 and torch.equal(found.rank, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nll_is_that_of_the_inputs_as_they_are(dtype):
    hidden, weight, bias, labels = make_case(123, 507, 31, dtype=dtype)
    found = token_surprisal(hidden, weight, labels, student_lm_head_bias=bias)
    assert found.nll.dtype == torch.float32
    torch.testing.assert_close(found.nll.double(), exact(hidden, weight, bias, labels)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(scale=0.25), dict(softcap=3.0), dict(scale=2.0, softcap=5.0)])
def test_scale_and_softcap_are_the_models(options):
    hidden, weight, bias, labels = make_case(40, 97, 12, dtype=torch.float64)
    named = {f"student_logit_{name}": value for name, value in options.items()}
    found = token_surprisal(hidden, weight, labels, student_lm_head_bias=bias, chunk_bytes=4000, **named)
    nll, rank = exact(hidden, weight, bias, labels, **options)
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.rank, rank)


def test_equal_logits_do_not_push_a_label_back():
    weight = torch.tensor([[2.0], [1.0], [1.0], [1.0], [0.0]])
    found = token_surprisal(torch.ones(5, 1), weight, torch.arange(5))
    assert found.rank.tolist() == [1, 2, 2, 2, 5]


def test_ignored_rows_are_zero_and_never_multiplied():
    hidden, weight, _, labels = make_case(9, 21, 4, dtype=torch.float64)
    nll, rank = exact(hidden, weight, None, labels)
    ignored = torch.tensor([True, False, False, True, False, False, False, False, True])
    hidden[ignored] = torch.nan
    found = token_surprisal(hidden, weight, labels.masked_fill(ignored, -100))
    torch.testing.assert_close(found.nll, nll.masked_fill(ignored, 0.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.rank, rank.masked_fill(ignored, 0))


def test_no_rows_give_no_values():
    weight = torch.ones(5, 3)
    for labels in (torch.full((4,), -100), torch.empty(0, dtype=torch.int64)):
        found = token_surprisal(torch.ones(len(labels), 3), weight, labels)
        assert found.nll.tolist() == [0.0] * len(labels) and found.rank.tolist() == [0] * len(labels)


def test_a_label_that_cannot_be_is_infinitely_surprising():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    found = token_surprisal(torch.ones(1, 2), torch.zeros(3, 2), torch.tensor([1]), student_lm_head_bias=bias)
    assert found.nll.tolist() == [torch.inf] and found.rank.tolist() == [3]


def test_nothing_of_tokens_times_vocabulary_is_ever_held():
    num_tokens, vocab_size = 600, 3000
    hidden, weight, _, labels = make_case(num_tokens, vocab_size, 16)
    budget = 2**20
    with LiveBytes() as memory:
        token_surprisal(hidden, weight, labels, chunk_bytes=budget)
    assert memory.largest_numel < num_tokens * vocab_size / 8
    assert memory.peak < 2 * budget < 4 * num_tokens * vocab_size


def test_autocast_rounds_no_logits():
    hidden, weight, _, labels = make_case(50, 300, 64)
    alone, targets = token_surprisal(hidden, weight, labels), top_k_targets(hidden, weight, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, in_autocast = token_surprisal(hidden, weight, labels), top_k_targets(hidden, weight, 5)
    assert torch.equal(found.nll, alone.nll) and torch.equal(found.rank, alone.rank)
    assert torch.equal(in_autocast.log_probs, targets.log_probs)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(hidden=torch.ones(4, 2, 3)), "student_hidden_states: expected two dimensions.*flatten"),
        (dict(hidden=torch.ones(4, 2)), "hidden size 2 but student_lm_head_weight expects 3"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels: expected shape \(4,\)"),
        (dict(labels=torch.zeros(4)), "labels: expected int64"),
        (dict(labels=torch.tensor([0, 5, 1, 1])), r"labels\[1\] = 5 is outside \[0, 5\)"),
        (dict(student_lm_head_bias=torch.ones(4)), r"student_lm_head_bias: expected shape \(5,\)"),
        (dict(student_logit_softcap=-1.0), "student_logit_softcap: expected a positive number"),
        (dict(chunk_bytes=0), "chunk_bytes: expected a positive number"),
    ],
)
def test_inputs_that_do_not_fit_raise_by_name(change, message):
    arguments = dict(hidden=torch.ones(4, 3), weight=torch.ones(5, 3), labels=torch.zeros(4, dtype=torch.int64))
    arguments |= change
    with pytest.raises(ValueError, match=message):
        token_surprisal(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)
