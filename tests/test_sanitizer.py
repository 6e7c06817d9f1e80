"""The checks of ``sanitizer.py``, which every kernel's test in the interpreter runs under, find what they are for."""

import pytest
import torch
from distillation_cases import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter alone: test_interpreted.py starts it")
triton = pytest.importorskip("triton")
tl = triton.language

WIDTH = 16


@triton.jit
def shift(from_ptr, to_ptr, stride, by, length, BARRIER: tl.constexpr, WIDTH: tl.constexpr):
    """Each program moves a row of ``length`` by ``by`` elements."""
    at = tl.arange(0, WIDTH)
    row = tl.program_id(0) * stride
    values = tl.load(from_ptr + row + at, mask=at < length, other=0.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(to_ptr + row + by + at, values.to(to_ptr.dtype.element_ty), mask=at < length)


def rows(num_rows=2, width=WIDTH):
    return torch.arange(num_rows * width, dtype=torch.float32).view(num_rows, width)


def test_a_row_each_is_no_conflict():
    tensor = rows()
    shift[(2,)](tensor, tensor, WIDTH, 0, WIDTH, False, WIDTH)
    shift[(2,)](tensor, torch.empty(2, WIDTH), WIDTH, 0, WIDTH, False, WIDTH)
    assert torch.equal(tensor, rows())


@pytest.mark.parametrize("stride", [4, WIDTH - 1])
def test_a_program_writing_where_another_reads_or_writes(stride):
    tensor = rows()
    with pytest.raises(AssertionError, match="shift: a program writes what another"):
        shift[(2,)](tensor, tensor, stride, 0, WIDTH, True, WIDTH)
    with pytest.raises(AssertionError, match="shift: a program writes what another"):
        shift[(2,)](rows(), tensor, stride, 0, WIDTH, True, WIDTH)


def test_rows_half_as_wide_lie_in_other_rows_bytes():
    tensor = rows()
    with pytest.raises(AssertionError, match="shift: a program writes what another"):
        shift[(2,)](tensor, tensor.view(torch.bfloat16), WIDTH, 0, WIDTH, True, WIDTH)


def test_a_thread_writing_what_another_reads_needs_a_barrier():
    tensor = rows(1)
    shift[(1,)](tensor, tensor, WIDTH, 1, WIDTH - 1, True, WIDTH)
    assert tensor[0, 1:].tolist() == [*range(WIDTH - 1)]
    with pytest.raises(AssertionError, match="shift: a thread writes .* without a barrier"):
        shift[(1,)](tensor, tensor, WIDTH, 1, WIDTH - 1, False, WIDTH)


def test_half_as_wide_in_the_same_bytes_needs_a_barrier():
    tensor = rows(1)
    shift[(1,)](tensor, tensor.view(torch.bfloat16), WIDTH, 0, WIDTH, True, WIDTH)
    assert tensor.view(torch.bfloat16)[0, :WIDTH].tolist() == [*range(WIDTH)]
    with pytest.raises(AssertionError, match="without a barrier"):
        shift[(1,)](tensor, tensor.view(torch.bfloat16), WIDTH, 0, WIDTH, False, WIDTH)


@pytest.mark.parametrize("by", [-1, 1])
def test_an_access_outside_of_what_was_given(by):
    whole = rows(3)
    middle = whole[1:2]  # the memory around it exists, so that nothing but this check would tell
    with pytest.raises(Exception, match="shift: an access outside every tensor it was given, in program 0"):
        shift[(1,)](whole.clone(), middle, WIDTH, by, WIDTH, False, WIDTH)
