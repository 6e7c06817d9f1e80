"""What the interpreter calculates in bf16, as ``interpreter.py`` has it, is what torch calculates, bit for bit."""

import pytest
import torch
from distillation_cases import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter alone: test_interpreted.py starts it")
triton = pytest.importorskip("triton")
tl = triton.language

SIDE = 16


@triton.jit
def calculate(left_ptr, right_ptr, out_ptr, length: tl.constexpr):
    at = tl.arange(0, length)
    left, right = tl.load(left_ptr + at), tl.load(right_ptr + at)
    tl.store(out_ptr + at, left + right)
    tl.store(out_ptr + length + at, left * right - left)
    tl.store(out_ptr + 2 * length + at, tl.where((left > right) & (right < 1.0), left, -right))
    tl.store(out_ptr + 3 * length + at, tl.maximum(left, right))
    tl.store(out_ptr + 4 * length + at, tl.abs(left))
    tl.store(out_ptr + 5 * length + at, (left.to(tl.float32) / 3.0).to(tl.bfloat16))
    tl.store(out_ptr + 6 * length + at, tl.load(left_ptr + at, mask=at < 5, other=1.1))
    tl.store(out_ptr + 7 * length + at, tl.full([length], 0.7, tl.bfloat16) + at.to(tl.bfloat16))


@triton.jit
def multiply(left_ptr, right_ptr, out_ptr, side: tl.constexpr):
    at = tl.arange(0, side)
    places = at[:, None] * side + at[None, :]
    product = tl.dot(tl.load(left_ptr + places), tl.trans(tl.load(right_ptr + places)))
    tl.store(out_ptr + places, product)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(100).bfloat16()


def test_elementwise_as_torch():
    left, right = drawn(512, seed=0), drawn(512, seed=1)
    left[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    right[:4] = torch.tensor([1.0, -0.0, 2.0, torch.nan])
    out = torch.empty(8, 512, dtype=torch.bfloat16)
    calculate[(1,)](left, right, out, 512)
    at = torch.arange(512)
    expected = [
        left + right,
        left * right - left,
        torch.where((left > right) & (right < 1.0), left, -right),
        None,
        left.abs(),
        (left.float() / 3).bfloat16(),
        torch.where(at < 5, left, 1.1),
        torch.tensor(0.7, dtype=torch.bfloat16) + at.bfloat16(),
    ]
    torch.testing.assert_close(out[3, 4:], torch.maximum(left, right)[4:], rtol=0, atol=0)
    for got, wanted in zip(out, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_ties_go_to_even_and_what_is_too_large_to_infinity():
    wide = torch.tensor([1.00390625, 1.01171875, 1.005, 3.4e38, -3.4e38, 1e-40], dtype=torch.float32)

    @triton.jit
    def narrow(wide_ptr, out_ptr, length: tl.constexpr):
        at = tl.arange(0, 8)
        tl.store(out_ptr + at, tl.load(wide_ptr + at, mask=at < length, other=0.0).to(tl.bfloat16), mask=at < length)

    out = torch.empty(6, dtype=torch.bfloat16)
    narrow[(1,)](wide, out, 6)
    torch.testing.assert_close(out, wide.bfloat16(), rtol=0, atol=0)
    assert out[:2].tolist() == [1.0, 1.015625]


def test_products_of_bf16_are_added_in_fp32():
    left, right = drawn(SIDE, SIDE, seed=2), drawn(SIDE, SIDE, seed=3)
    out = torch.empty(SIDE, SIDE)
    multiply[(1,)](left, right, out, SIDE)
    torch.testing.assert_close(out, left.float() @ right.float().T, rtol=1e-6, atol=1e-2)
    assert not torch.equal(out, out.bfloat16().float())
