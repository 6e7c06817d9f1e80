"""What compiled code counts as: operations that are fused as one, products by themselves, the results exact."""

import pytest
import torch
from torch import nn

from trsd.fused_meter import fused
from trsd.live_bytes import LiveBytes
from trsd.step_meter import ELEMENTWISE, PRODUCTS, StepMeter

N, WIDTH = 50, 64
ROWS = 4 * N * WIDTH  # bytes of [N, WIDTH]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(function, *inputs):
    """The meter of a compiled call, whose products are free."""
    compiled = torch.compile(function, backend=fused, dynamic=True)
    with StepMeter(products=1e30, copies=1.0) as meter:
        kept = compiled(*inputs)
    del kept
    return meter


def test_operations_that_are_fused_read_and_write_once():
    x = torch.randn(N, WIDTH)
    meter = counted(lambda x: torch.nn.functional.silu(x).square() * x + 1, x)
    assert meter.seconds[ELEMENTWISE] == 2 * ROWS and meter.peak == ROWS


def test_a_norm_is_one_kernel_and_its_sums_with_it():
    meter = counted(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), torch.randn(N, WIDTH))
    assert meter.seconds[ELEMENTWISE] == 2 * ROWS


def test_what_a_product_stands_between_is_not_one_kernel():
    weight = torch.randn(WIDTH, WIDTH)
    meter = counted(lambda x: (x.exp() @ weight) + x.exp(), torch.randn(N, WIDTH))
    # exp reads and writes; the sum reads the product and either the exponential or x again, and writes.
    assert meter.seconds[ELEMENTWISE] == 5 * ROWS
    assert meter.flops[PRODUCTS] == 2 * N * WIDTH * WIDTH
    assert meter.seconds[PRODUCTS] == 2 * ROWS + weight.nbytes


def test_views_cost_nothing():
    meter = counted(lambda x: x.view(-1).view(WIDTH, N).T[3:], torch.randn(N, WIDTH))
    assert meter.peak == 0 and ELEMENTWISE not in meter.seconds


def test_what_the_backward_needs_is_held_until_it_has_run():
    layer = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH)).double()
    x = torch.randn(N, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend=fused, dynamic=True)
    want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with LiveBytes() as live:
        out = compiled(x)
        # Its output, and of 4 * WIDTH what goes into the activation and what comes out of it: a product needs that.
        held = live.live
        got = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        del out
        assert live.live == sum(gradient.nbytes for gradient in got)
    assert held == 2 * ROWS * (1 + 4 + 4)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_without_a_meter_it_computes_what_is_not_compiled():
    function = torch.compile(lambda x, y: (torch.softmax(x, -1) @ y.T, x.sum(0)), backend=fused, dynamic=True)
    for n in (3, 7):
        x, y = torch.randn(n, WIDTH, dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
        one, other = function(x, y)
        torch.testing.assert_close(one, torch.softmax(x, -1) @ y.T)
        torch.testing.assert_close(other, x.sum(0))
