"""Memory that is not there: said before weights are read, where that is certain, and else with the settings to turn."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trsd.errors import InputError
from trsd.recipe import ONLINE, Recipe
from trsd.weight_files import count_weights

# A container's limit, of both versions of control groups.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NO_CPU_MEMORY = "can't allocate memory"  # torch's words, in an error of no class of its own
# Bytes of a trained weight's moments, by optimizer.
MOMENTS = {"adamw_torch": 8.0, "adamw_torch_8bit": 2.0, "adamw_bnb_8bit": 2.0, "adamw_torch_4bit": 1.0}


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names the settings that take less."""


def total_memory(device: str) -> int:
    """Bytes of a device, "cuda" or "cpu", whatever is in use; on a CPU what a container may take of them."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([here, *(int(text) for text in texts if text.isdecimal())])


def refuse_too_large(folder: Path, *, dtype: torch.dtype, device: str) -> None:
    """Raise InputError for a model whose weights alone are more than a device holds, which no setting mends.

    Args:
        folder: of the model.
        dtype: the weights will be read in.
        device: they will be on; they come there by way of the CPU's memory.
    """
    needed = count_weights(folder) * dtype.itemsize
    for place in dict.fromkeys(("cpu", torch.device(device).type)):
        if needed > (there := total_memory(place)):
            raise InputError(
                f"the weights of {folder} alone take {_gib(needed)} in {str(dtype).removeprefix('torch.')}, and "
                f"{'the GPU' if place == 'cuda' else 'this machine'} has {_gib(there)} of memory: choose a smaller "
                f"model or a larger machine (python -m trsd.plan --model {folder} says what each takes)"
            )


def warn_of_training(folder: Path, recipe: Recipe, *, device: str) -> None:
    """Say on stderr that all weights of a student cannot be trained here: with gradients and moments they do not fit.

    Only a machine with swap could go on for all that, slowly.
    """
    if recipe.lora_rank is not None:
        return
    needed = count_weights(folder) * (4 + 4 + MOMENTS[recipe.optim])
    if needed > (there := total_memory(device)):
        print(
            f"warning: weights, gradients and optimizer of {folder} take {_gib(needed)}, and there are {_gib(there)}: "
            f"expect to run out of memory; {turned_down(recipe)}",
            file=sys.stderr,
        )


def turned_down(recipe: Recipe) -> str:
    """The settings of a recipe that take less memory in training, those first that change the result least."""
    found = [f"lower --max_tokens_per_batch (now {recipe.max_tokens_per_batch}, at least max_length)"]
    found.append("set a small --loss_chunk_bytes, such as 67108864")
    if recipe.teacher in ONLINE and recipe.alpha:
        found.append("--teacher hidden_cache")
    if not recipe.torch_compile:
        found.append("--torch_compile True")
    if not recipe.gradient_checkpointing:
        found.append("--gradient_checkpointing True")
    if recipe.optim == "adamw_torch":
        found.append("--optim adamw_torch_8bit")
    if recipe.lora_rank is None:
        found.append("--lora_rank 16")
    return f"{', '.join(found)}; python -m trsd.plan with the same flags says what each saves"


@contextmanager
def out_of_memory_says(advice: str) -> Iterator[None]:
    """Inside, memory that runs out raises OutOfMemory with ``advice``, unless it was said by another one further in."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_CPU_MEMORY in str(error)
        if not ran_out or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"out of memory{_in_short(error)}: {advice}") from error


def _in_short(error: Exception) -> str:
    """What was asked for, without the advice on the allocator that torch adds."""
    words = " ".join(str(error).partition("Including non-PyTorch")[0].partition("\n")[0].split())
    return f" ({words.rstrip('.')[:200]})" if words else ""


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
