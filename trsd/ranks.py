"""The processes of one run: torchrun starts one a device and says in RANK, WORLD_SIZE and LOCAL_RANK which is which.

Every rank runs the same program over the same traces. What a step holds is a function of its number, so no rank has to
tell another what it works on; what they exchange are gradients, sums of metrics, and results of generation. Rank 0
alone prints and writes. A run of one process is rank 0 of one, and then nothing here communicates.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from trsd.errors import InputError
from trsd.launch import launched_ranks

# While rank 0 prepares, the others wait, maybe for hours; torchrun ends all ranks when one has failed.
LONGEST_PREPARATION = timedelta(days=7)
# What gloo says, in errors of no class of their own.
LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Application timeout")
REPLICAS, SHARDS = "replicas", "shards"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Of this rank: "cuda" is the GPU that became its current one."""
    patient: Any = None
    """The group of those who wait for long."""
    savers: Any = None
    """The group of what writes checkpoints in the background."""
    timeout: timedelta | None = None
    """After which an exchange that another rank does not take part in ends the run; None: torch's own."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def told(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.patient)
        return box[0]

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.patient)
        return found

    def agree(self, what: str, value: Any) -> None:
        """Raise InputError on every rank unless all have the same ``value``, such as a hash of their input."""
        values = self.everyone(value)
        if len(set(values)) > 1:
            odd = next(rank for rank in range(self.size) if values[rank] != values[0])
            raise InputError(
                f"rank {odd} has other {what} than rank 0: every rank reads the same files, so put them where all "
                "nodes see them"
            )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Inside, rank 0 works while the others wait; then they go in and find it done."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """For all ranks to be here."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def num_shards(self, shard_group_size: int | None = None) -> int:
        """Ranks over which weights are sharded, all unless ``shard_group_size`` says.

        Raises:
            InputError: the ranks do not divide into groups of that size.
        """
        shards = shard_group_size or self.size
        if self.size % shards:
            raise InputError(f"shard_group_size: {self.size} ranks do not divide into groups of {shards}")
        return shards

    def mesh(self, shard_group_size: int | None = None) -> DeviceMesh:
        """Devices of the run: weights are sharded over ``num_shards`` of them and replicated over the rest."""
        shards = self.num_shards(shard_group_size)
        if shards == self.size:
            return init_device_mesh(self.device, (self.size,), mesh_dim_names=(SHARDS,))
        table = torch.arange(self.size).view(-1, shards)
        # Groups that init_device_mesh makes would wait as long as torch's default says, which is less for GPUs.
        across, within = (
            dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=self.timeout)[0] for ranks in (table.T, table)
        )
        return DeviceMesh.from_group([across, within], self.device, mesh=table, mesh_dim_names=(REPLICAS, SHARDS))


@contextmanager
def open_ranks(timeout_seconds: int) -> Iterator[Ranks]:
    """The ranks of this run, joined as long as the context lasts.

    Args:
        timeout_seconds: after which an exchange that another rank does not take part in ends the run.

    Raises:
        InputError: torchrun's environment is not whole, or a node has fewer GPUs than ranks.
    """
    rank, size = launched_ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if size == 1:
        yield Ranks(device=device)
        return
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} is number {local} on its node, which has {torch.cuda.device_count()} GPUs: lower "
                "--nproc_per_node"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, timeout=timeout)
    patient, savers = (dist.new_group(backend="gloo", timeout=LONGEST_PREPARATION) for _ in range(2))
    with open(os.devnull, "w") as silence, redirect_stdout(silence) if rank else nullcontext():
        yield Ranks(rank, size, device, patient, savers, timeout)
        dist.barrier(group=patient)
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


@contextmanager
def ended_at_once() -> Iterator[None]:
    """A rank of several leaves the process at the end of this, with its exit code; a run of one process goes on.

    What ends a process in an orderly way would wait for exchanges that other ranks take part in no more, and gloo's
    threads now and then abort a process whose work is done.
    """
    code: Any = 0
    try:
        yield
    except BaseException as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif not isinstance(code, int):
            print(code, file=sys.stderr)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an exchange failed because another rank ended, or took part in it no more."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)


def gathered(weight: Tensor) -> Tensor:
    """The whole of a weight that may be sharded; every rank must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
