"""What devices can do: names, and a measurement."""

import pytest
import torch

from trsd import ceilings
from trsd.ceilings import KNOWN, known, known_device, large_copy, large_product, measure, stated_products
from trsd.errors import InputError


@pytest.mark.parametrize(
    "name,entry",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("rtx4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_what_they_call_themselves(name, entry):
    found = known(name)
    assert found.name == entry
    assert 0.5 * found.stated_products < found.products < found.stated_products
    assert 0.5 * found.stated_copies < found.copies < found.stated_copies < 1e13


@pytest.mark.parametrize("name", ["Abacus 3", "NVIDIA RTX A1000", "NVIDIA GH200 480GB"])
def test_an_unknown_device_says_which_are_known_and_is_not_taken_for_one_of_a_similar_name(name):
    with pytest.raises(InputError, match="H200"):
        known(name)


def test_the_device_at_hand_is_found_by_what_it_calls_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert stated_products("cuda") == 989.4e12 and known_device("cuda").stated_copies == 4.8e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Abacus")
    assert stated_products("cuda") is None and known_device("cuda") is None


def test_work_says_how_much_it_is():
    product, copy = large_product("cpu", torch.float32), large_copy("cpu")
    result = product.run()
    assert result.shape == (1024, 1024) and product.amount == 2 * 1024**3
    assert copy.run().nbytes * 2 == copy.amount


def test_this_cpu_is_measured():
    found = measure("cpu")
    assert found.measured and 1e9 < found.products < 1e14 and 1e8 < found.copies < 1e13
    assert stated_products("cpu") is None


@pytest.mark.parametrize("dtype,stated", [(torch.bfloat16, 989.4e12), (torch.float32, None)], ids=str)
def test_what_a_maker_states_of_products_is_kept_for_the_precision_it_holds_for(monkeypatch, dtype, stated):
    monkeypatch.setattr(ceilings, "known_device", lambda device: KNOWN["H200"])
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    # A large product in bf16 takes seconds on a CPU that has no unit for it.
    monkeypatch.setattr(ceilings, "large_product", lambda device, dtype: large_copy(device))
    found = measure("cpu", dtype=dtype)
    assert (found.stated_products, found.stated_copies) == (stated, 4.8e12)
