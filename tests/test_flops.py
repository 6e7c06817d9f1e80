"""Operations of a step against those that torch counts while it runs."""

import pytest
import torch
from conftest import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from trsd.batching import Branch, Example, pack_examples
from trsd.flops import FlopCounter, head_flops


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def plain(tokenizer):
    model = make_tiny_model(tokenizer)
    model.set_attn_implementation("eager")  # whose products over all pairs, masked ones too, are counted
    return model


def test_reading_counts_what_torch_counts_but_the_masked_pairs(plain):
    length = 50
    example = Example(trace_index=0, input_ids=[5] * length, labels=[6] * length)
    seen = counted(lambda: plain(torch.tensor([example.input_ids])))
    masked = 4 * 2 * 4 * 16 * (length**2 - length * (length + 1) // 2)  # 2 layers, 4 heads of 16
    head = head_flops(plain.get_output_embeddings().weight.numel(), length)
    places = torch.arange(length)[None]
    rotary = counted(lambda: plain.model.rotary_emb(torch.zeros(1), places))  # a product too, in some releases
    assert FlopCounter(plain).reading([example]) == seen - masked - rotary - head


def test_training_is_three_forwards_and_four_when_recomputed(plain):
    example = Example(trace_index=0, input_ids=[5] * 50, labels=[6] * 20)
    batches = pack_examples([example], 100, "cpu")
    counter = FlopCounter(plain)
    body = counter.reading([example])
    head = 2 * 20 * plain.get_output_embeddings().weight.numel()
    assert counter.training(batches, recomputed=False) == pytest.approx(3 * body + 3 * head)
    assert counter.training(batches, recomputed=True) == pytest.approx(4 * body + 3 * head)


def test_a_branch_costs_its_own_tokens_and_the_pairs_with_its_trunk(plain):
    trunk = dict(trace_index=0, input_ids=[5] * 40, labels=[6])
    alone = pack_examples([Example(**trunk)], 100, "cpu")[0]
    branched = pack_examples([Example(**trunk, branches=(Branch(cut=30, input_ids=[7] * 3, labels=[8]),))], 100, "cpu")[
        0
    ]
    assert branched.num_tokens - alone.num_tokens == 3
    assert branched.num_pairs - alone.num_pairs == 31 + 32 + 33
