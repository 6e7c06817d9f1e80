"""What devices can do: names, and a measurement."""

import pytest

from trsd.ceilings import known, measure, stated_products
from trsd.errors import InputError


@pytest.mark.parametrize(
    "name,entry",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("rtx4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_what_they_call_themselves(name, entry):
    found = known(name)
    assert found.name == entry
    assert 0.5 * found.stated_products < found.products < found.stated_products and found.copies < 1e13


def test_an_unknown_device_says_which_are_known():
    with pytest.raises(InputError, match="H200"):
        known("Abacus 3")


def test_this_cpu_is_measured():
    found = measure("cpu")
    assert found.measured and 1e9 < found.products < 1e14 and 1e8 < found.copies < 1e13
    assert stated_products("cpu") is None
