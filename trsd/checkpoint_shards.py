"""The parts of a checkpoint that the ranks of a run make together: gathered weights, and optimizer state in shards.

Weights are gathered to rank 0, which writes them as a plain model folder. Optimizer state, twice as large, stays where
it is: every rank writes its shards, by ``torch.distributed.checkpoint`` in safetensors, in the background. Shards are
read by any number of ranks, one included.
"""

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from trsd.errors import InputError
from trsd.ranks import Ranks

SHARDS = "state/optimizer"


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whole and on the CPU, on rank 0; empty on the others, which must ask too."""
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first: dict[Any, str] = {}  # tied weights were gathered under each of their names, and stay one tensor
    same = {name: first.setdefault(_storage(tensor), name) for name, tensor in model.state_dict().items()}
    return {name: found[same[name]] for name in found}


def _storage(tensor: Tensor) -> tuple[int, torch.Size]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr() or id(tensor), tensor.shape


def save_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> Future[Any]:
    """Begin to write every rank's shards of ``tensors`` to ``folder``/state/optimizer; copied before this returns.

    On rank 0 the future is done when all ranks have written.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcp.async_save(tensors, storage_writer=writer, process_group=ranks.savers)


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<state>/<parameter name>`` tensors, each rank's shards of them."""
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def first_failure(error: BaseException) -> BaseException:
    """What went wrong on the first of the ranks that failed; of another error, itself."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return failures[min(failures)][0] if failures else error


def load_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill ``tensors``, sharded or not, from the optimizer state of a checkpoint that one rank or several wrote.

    Raises:
        InputError: the state is that of another model.
    """
    path = folder / SHARDS if (folder / SHARDS).is_dir() else folder / "state"
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, process_group=ranks.savers, no_dist=ranks.size == 1)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path} fits no optimizer of this model: {first_failure(error)}") from error


def empty_state(model: nn.Module) -> dict[str, Tensor]:
    """What AdamW keeps of every trained parameter, by the names that checkpoints give it, without content."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"step/{name}"] = torch.zeros(())
            found |= {f"{key}/{name}": torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return found
