"""What operations cost: the slower of products and bytes, by family, and views that cost nothing."""

import pytest
import torch

from trsd.step_meter import ELEMENTWISE, PRODUCTS, TEACHER, StepMeter

GIGA = 1e9


def meter():
    return StepMeter(products=100 * GIGA, copies=1 * GIGA)


def test_a_product_takes_its_operations_or_its_bytes():
    with meter() as large:
        torch.empty(1000, 1000, device="meta") @ torch.empty(1000, 1000, device="meta")
    assert large.flops[PRODUCTS] == 2e9 and large.seconds[PRODUCTS] == pytest.approx(2e9 / (100 * GIGA))
    with meter() as thin:
        torch.empty(1000, 1, device="meta") @ torch.empty(1, 1000, device="meta")
    assert thin.seconds[PRODUCTS] == pytest.approx(4 * (1000 + 1000 + 1e6) / GIGA)


def test_products_in_8_bits_are_twice_as_fast():
    left, right = (torch.empty(256, 256, device="meta", dtype=torch.float8_e4m3fn) for _ in range(2))
    scale = torch.empty(256, 1, device="meta")
    counted = StepMeter(products=1.0, copies=1e30)
    with counted:
        torch._scaled_mm(left, right.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)
    assert counted.seconds[PRODUCTS] == pytest.approx(2 * 256**3 / 2)


def test_views_cost_nothing_and_what_is_broadcast_is_read_once():
    with meter() as counted:
        row = torch.zeros(1000, device="meta")
        row.view(10, 100).T[3:]
        before = counted.seconds[ELEMENTWISE]
        row + torch.empty(1, device="meta").expand(1000)
    assert before == pytest.approx(4 * 1000 / GIGA)
    assert counted.seconds[ELEMENTWISE] - before == pytest.approx(
        4 * (2000 + 1 + 1) / GIGA
    )  # and the one that was made


def test_the_outermost_family_takes_everything_and_scratch_counts_for_the_peak():
    with meter() as counted, counted.family(TEACHER):
        held = torch.empty(100, device="meta")
        counted.hold(5000)
        assert counted.peak == held.nbytes + 5000
        held + held
    assert set(counted.seconds) == {TEACHER}
