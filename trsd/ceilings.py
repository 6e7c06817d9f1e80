"""What a device can do at best: dense products, bytes read and written, memory. Known by name, or measured here.

``stated`` figures are the makers' (dense, bf16 with fp32 sums); ``products`` and ``copies`` are what one large product
and one large copy reach, measured where the entry says so.
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from trsd.errors import InputError

# What large products and copies reach of what makers state, where nothing was measured: on an H200 0.80 and 0.90.
SHARE_OF_PRODUCTS, SHARE_OF_COPIES = 0.75, 0.85
# Of one product or copy, over and over: long enough that a GPU's clock is what it is under load.
SECONDS, MIN_ROUNDS = 0.5, 5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """One device."""

    name: str
    products: float
    """Floating-point operations a second of a large dense product in the precision that is trained in."""
    copies: float
    """Bytes a second of a large copy, read and written."""
    memory: float | None
    """Bytes of memory; None where it is shared with everything else."""
    stated_products: float | None = None
    """By the maker; what model FLOPs utilisation is counted against."""
    stated_copies: float | None = None
    """By the maker: bytes a second of the memory."""
    measured: bool = False


def _stated(name: str, tflops: float, terabytes: float, gigabytes: float) -> Ceilings:
    products, copies = tflops * 1e12, terabytes * 1e12
    return Ceilings(
        name=name,
        products=SHARE_OF_PRODUCTS * products,
        copies=SHARE_OF_COPIES * copies,
        memory=gigabytes * 2**30,
        stated_products=products,
        stated_copies=copies,
    )


# Measured: products of 8,192 cubed in bf16 on random data, and device-to-device copies of some GB.
KNOWN = {
    "H200": replace(_stated("H200", 989.4, 4.8, 139.8), products=788e12, copies=4.3e12, measured=True),
    "H100 PCIe": _stated("H100 PCIe", 756, 2.0, 79.2),
    "H100 NVL": _stated("H100 NVL", 835, 3.9, 93.1),
    "H100": replace(_stated("H100", 989.4, 3.35, 79.2), products=798e12, copies=3.0e12, measured=True),
    "B200": _stated("B200", 2250, 8.0, 178),
    "A100-40GB": _stated("A100-40GB", 312, 1.555, 39.5),
    "A100": _stated("A100", 312, 2.039, 79.2),
    "L40S": _stated("L40S", 362, 0.864, 44.5),
    "RTX 4090": _stated("RTX 4090", 165, 1.008, 23.6),
    "RTX 3090": _stated("RTX 3090", 71, 0.936, 23.6),
}


def known(name: str) -> Ceilings:
    """The entry that ``name`` holds as a word of its own, such as "NVIDIA H200", but not "NVIDIA GH200".

    Raises:
        InputError: none does; with those that are known.
    """
    for key, entry in KNOWN.items():
        parts = re.findall(r"[a-z0-9]+", key.lower())
        if re.search(rf"(?<![a-z0-9]){'.*'.join(parts)}(?![a-z0-9])", name.lower()):
            return entry
    raise InputError(f"no figures for a device named {name!r}: known are {', '.join(KNOWN)}; or measure it where it is")


def known_device(device: torch.device | str) -> Ceilings | None:
    """The entry of the device at hand; None where it is not known."""
    if torch.device(device).type != "cuda":
        return None
    try:
        return known(torch.cuda.get_device_name(device))
    except InputError:
        return None


def stated_products(device: torch.device | str) -> float | None:
    """What the maker states of the device at hand; None where it is not known."""
    entry = known_device(device)
    return entry and entry.stated_products


class Work(NamedTuple):
    """Something large for a device to do, over and over."""

    run: Callable[[], object]
    amount: float
    """Floating-point operations, or bytes read and written."""


def large_product(device: torch.device | str, dtype: torch.dtype) -> Work:
    """The product of two random square matrices."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Work(lambda: left @ right, 2 * size**3)


def large_copy(device: torch.device | str) -> Work:
    """A copy within the device's memory, too large for any of its caches."""
    length = 2**31 if torch.device(device).type == "cuda" else 2**27
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2 * length)


def measure(device: torch.device | str, *, dtype: torch.dtype | None = None) -> Ceilings:
    """The device at hand, in a second or so: medians of some large products and copies."""
    device = torch.device(device)
    on_gpu, entry = device.type == "cuda", known_device(device)
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    return Ceilings(
        name=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        products=_rate(large_product(device, dtype), device),
        copies=_rate(large_copy(device), device),
        memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        stated_products=entry.stated_products if entry and dtype.itemsize == 2 else None,
        stated_copies=entry and entry.stated_copies,
        measured=True,
    )


def _rate(work: Work, device: torch.device) -> float:
    """The amount of ``work`` a second, in a round of median length."""
    for _ in range(2):
        _seconds(work, device)
    seconds, begun = [], time.perf_counter()
    while len(seconds) < MIN_ROUNDS or time.perf_counter() - begun < SECONDS:
        seconds.append(_seconds(work, device))
    return work.amount / statistics.median(seconds)


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
