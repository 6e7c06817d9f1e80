"""The fused losses with every operation in sight: the same numbers, and what they hold is seen."""

import pytest
import torch

from bench import contenders as c
from bench.in_sight import ops_in_sight
from bench.shapes import CE_KL, KL, Shape, draw
from trsd.live_bytes import LiveBytes
from trsd_kernels import distill_from_top_k, top_k_targets

SHAPE = Shape(300, 4096, 16, 24)


def from_top_k(inputs, loss):
    student_h, student_w, teacher_h, teacher_w, labels = inputs.positional()
    targets = top_k_targets(teacher_h, teacher_w, 8)
    return lambda: distill_from_top_k(student_h, student_w, targets, labels, alpha=loss.alpha).loss


TOP_K = c.Contender("top k", from_top_k)
CASES = [(c.TOKENS, CE_KL, True), (c.VOCAB, CE_KL, True), (TOP_K, KL, True)]
CASES += [(c.TOKENS, KL, False), (c.VECTORS, KL, False)]


def run(contender, loss, head_is_trained):
    inputs = draw(SHAPE, device="cpu", dtype=torch.float32, head_is_trained=head_is_trained)
    step = contender.step(inputs, loss)
    with LiveBytes() as memory:
        value = step()
        value.backward()
    return [value.detach(), *(tensor.grad for tensor in inputs.trained().values())], memory


@pytest.mark.parametrize("contender,loss,head_is_trained", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_numbers_stay_and_memory_is_seen(contender, loss, head_is_trained):
    wanted, opaque = run(contender, loss, head_is_trained)
    with ops_in_sight():
        got, seen = run(contender, loss, head_is_trained)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    logits = 4 * SHAPE.num_tokens * SHAPE.vocab_size
    assert opaque.peak < logits / 2 and seen.peak > logits  # a chunk holds all rows of so small a call
    again, _ = run(contender, loss, head_is_trained)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
