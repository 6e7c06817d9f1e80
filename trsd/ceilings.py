"""What a device can do at best: dense products, bytes read and written, memory. Known by name, or measured here.

``stated`` figures are the makers' (dense, bf16 with fp32 sums); ``products`` and ``copies`` are what one large product
and one large copy reach, measured where the entry says so.
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from trsd.errors import InputError

# What large products and copies reach of what makers state, where nothing was measured: on an H200 0.80 and 0.90.
SHARE_OF_PRODUCTS, SHARE_OF_COPIES = 0.75, 0.85


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
    measured: bool = False


def _stated(name: str, tflops: float, terabytes: float, gigabytes: float) -> Ceilings:
    products, copies = tflops * 1e12, terabytes * 1e12
    return Ceilings(
        name=name,
        products=SHARE_OF_PRODUCTS * products,
        copies=SHARE_OF_COPIES * copies,
        memory=gigabytes * 2**30,
        stated_products=products,
    )


# Measured: products of 8,192 cubed in bf16 on random data, and device-to-device copies of some GB.
KNOWN = {
    "H200": replace(_stated("H200", 989.4, 4.8, 139.8), products=788e12, copies=4.3e12, measured=True),
    "H100": replace(_stated("H100", 989.4, 3.35, 79.2), products=798e12, copies=3.0e12, measured=True),
    "B200": _stated("B200", 2250, 8.0, 178),
    "A100-40GB": _stated("A100-40GB", 312, 1.555, 39.5),
    "A100": _stated("A100", 312, 2.039, 79.2),
    "L40S": _stated("L40S", 362, 0.864, 44.5),
    "RTX 4090": _stated("RTX 4090", 165, 1.008, 23.6),
    "RTX 3090": _stated("RTX 3090", 71, 0.936, 23.6),
}


def known(name: str) -> Ceilings:
    """The entry that ``name`` holds, such as "NVIDIA H200".

    Raises:
        InputError: none does; with those that are known.
    """

    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for key, entry in KNOWN.items():
        if all(part in plain for part in re.findall(r"[a-z0-9]+", key.lower())):
            return entry
    raise InputError(f"no figures for a device named {name!r}: known are {', '.join(KNOWN)}; or measure it where it is")


def stated_products(device: torch.device | str) -> float | None:
    """What the maker states of the device at hand; None where it is not known."""
    if torch.device(device).type != "cuda":
        return None
    try:
        return known(torch.cuda.get_device_name(device)).stated_products
    except InputError:
        return None


def measure(device: torch.device | str, *, dtype: torch.dtype | None = None) -> Ceilings:
    """The device at hand, in a second or so: medians of some large products and copies."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, length = (8192, 2**31) if on_gpu else (1024, 2**27)
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _median_seconds(lambda: left @ right, device)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return Ceilings(
        name=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        products=2 * size**3 / product,
        copies=2 * length / copy,
        memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        stated_products=stated_products(device),
        measured=True,
    )


def _median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    seconds = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
