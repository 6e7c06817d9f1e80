"""The row passes in plain torch: all of them at once, one by one, in blocks of any size."""

import math
from itertools import product

import pytest
import torch
from distillation_cases import DIVERGENCES, not_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trsd_kernels import DistillOptions, fused_distillation, torch_rows
from trsd_kernels.linear_ops import CPU_CHUNK_ROWS, rows_per_chunk
from trsd_kernels.logits_distill import _has_values
from trsd_kernels.row_state import finish, new_state
from trsd_kernels.torch_rows import SEGMENT, TorchRows, row_maximum

pytestmark = not_interpreted
NUM_ROWS, VOCAB_SIZE = 7, 5 * SEGMENT + 3
SETTINGS = [
    dict(divergence=divergence, alpha=alpha, temperature=temperature, student_logit_softcap=softcap)
    for divergence, alpha, temperature, softcap in product(DIVERGENCES, (0.4, 1.0), (1.0, 2.0), (None, 6.0))
] + [dict(alpha=0.0), dict(divergence="jsd", beta=0.3), dict(divergence="reverse_kl", student_logit_scale=-0.5)]


def logits(kind: str, *, impossible: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, NUM_ROWS, VOCAB_SIZE, generator=generator) * 3
    student[1, 3] = math.nan  # of the row that weighs nothing
    if impossible:
        student[2, 5:60] = teacher[2, 20:60] = student[6, 1:] = teacher[6, 1:] = -math.inf
        if kind != "reverse_kl":  # which would be infinite
            teacher[4, 7:30] = -math.inf
    return student, teacher


def passes(options: DistillOptions, *, impossible: bool, at_once: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms, gradient) of the same rows, one of which weighs nothing."""
    state = new_state(NUM_ROWS, dtype=torch.float32, device=torch.device("cpu"))
    weights = torch.tensor([[0.2, 0.0, 0.1, 0.1, 0.3, 0.1, 0.2], [0.3, 0.0, 0.2, 0.1, 0.1, 0.2, 0.1]])

    def rows() -> TorchRows:
        student, teacher = logits(options.kind, impossible=impossible)
        labels = torch.arange(NUM_ROWS) * 100
        return TorchRows(options, student, None if options.kind == "none" else teacher, labels)

    if at_once:
        gradient = rows().complete(state, weights, torch.float32)
    else:
        rows().accumulate(state)
        rows().accumulate_mixture(state)
        gradient = rows().gradient(state, weights, torch.float32)
    return torch.stack(finish(state, options)), gradient


@pytest.mark.parametrize("impossible", [False, True], ids=["possible", "impossible"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_all_passes_at_once_are_those_one_by_one(settings, impossible, monkeypatch):
    options = DistillOptions(**settings)
    terms, gradient = passes(options, impossible=impossible, at_once=False)
    for block_rows in (1, 3, NUM_ROWS):
        monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 4 * VOCAB_SIZE * block_rows)
        found_terms, found_gradient = passes(options, impossible=impossible, at_once=True)
        torch.testing.assert_close(found_terms, terms, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-7)
        assert not found_gradient[1].any() and found_gradient[0].any() and found_gradient.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_block_takes_no_more_than_its_formula_says(settings, monkeypatch):
    options, taken = DistillOptions(**settings), []
    take = torch_rows._Scratch.take

    def counted(scratch, num_rows):
        buffer = take(scratch, num_rows)
        taken.append(sum(buffer.nbytes for buffer in scratch.buffers))
        return buffer

    monkeypatch.setattr(torch_rows._Scratch, "take", counted)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 4 * VOCAB_SIZE * 3)
    for at_once in (True, False):
        passes(options, impossible=False, at_once=at_once)
    allowed = TorchRows.scratch_bytes(options, NUM_ROWS, VOCAB_SIZE, torch.float32)
    assert 0.5 * allowed <= max(taken) <= allowed


@pytest.mark.parametrize("width", [1, 100, 4 * SEGMENT, 4 * SEGMENT + 1, 7 * SEGMENT - 1])
def test_the_maximum_of_wide_rows_is_the_first_of_equals_and_sees_what_is_not_a_number(width):
    rows = torch.randint(-50, 50, (40, width), generator=torch.Generator().manual_seed(0)).float()
    rows[0] = -math.inf
    rows[1] = 3.0
    rows[2, -1] = math.inf
    rows[3, width // 2] = math.nan
    expected, found = rows.max(1), row_maximum(rows)
    torch.testing.assert_close(found[0], expected.values, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(found[1], expected.indices)


def test_a_cpu_takes_no_more_rows_at_a_time_than_fill_a_product():
    small = rows_per_chunk(64, torch.float32, torch.device("cpu"), None)
    assert small == rows_per_chunk(64, torch.float32, torch.device("cpu"), 2**30) == CPU_CHUNK_ROWS
    assert rows_per_chunk(2**20, torch.float32, torch.device("cpu"), 2**26) == 8
    assert rows_per_chunk(64, torch.float32, torch.device("meta"), 2**26) == 2**26 // (2 * 4 * 64)


def test_only_what_lies_on_a_cpu_and_is_not_traced_is_looked_at():
    seen = []

    def trace(tensor):
        seen.append(_has_values(tensor))
        return tensor + 1

    logits = torch.ones(2, 3)
    make_fx(trace)(logits)
    with FakeTensorMode() as mode:
        seen += [_has_values(mode.from_tensor(logits)), _has_values(torch.empty(2, 3, device="cuda"))]
    assert seen == [False] * 3 and not _has_values(logits.to("meta"))
    assert _has_values(logits) and _has_values(torch.nn.Parameter(logits))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_are_walked_in_blocks_with_the_numbers_of_whole_tensors(divergence, monkeypatch):
    """A traced pass works on whole tensors, for it may not look whether a token is impossible."""
    found = []
    for traced in (False, True):
        if traced:
            monkeypatch.setattr("trsd_kernels.logits_distill._has_values", lambda tensor: False)
        student, teacher = logits(divergence, impossible=True)
        student.requires_grad_()
        fused_distillation(student, teacher, torch.arange(NUM_ROWS), divergence=divergence, alpha=0.5).loss.backward()
        found.append(student.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7, equal_nan=True)
