"""Trainers of others that spread weights over processes by FSDP2: which are taken, and what is made of a teacher."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, Trainer

from trsd.errors import InputError
from trsd.parallel import shard_teacher


def check_shards(trainer: Trainer) -> None:
    """Raise InputError where a trainer spreads weights over its processes in another way than FSDP2.

    Warns where it was told to and does not.
    """
    accelerator = trainer.accelerator
    kinds = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1": trainer.is_fsdp_enabled and not accelerator.is_fsdp2,
        "parallelism_config": accelerator.parallelism_config is not None,
    }
    if found := [name for name, value in kinds.items() if value]:
        raise InputError(
            f"{found[0]} is not supported here: train with DDP, with FSDP2 (fsdp=True), or by torchrun -m trsd.train"
        )
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        warnings.warn(
            "fsdp has no effect: accelerate spreads weights over processes that have a GPU each; here every process "
            "holds both models whole",
            stacklevel=4,
        )


def refuse_compiled(trainer: Trainer) -> None:
    """Raise InputError where accelerate compiles the student: its forward, which is what would be compiled, is not run.

    And DDP's would not be run either, for accelerate takes a compiled model out of it when it is unwrapped.
    """
    if trainer.args.torch_compile or trainer.accelerator.state.dynamo_plugin.backend != "NO":
        raise InputError("torch_compile compiles the model's forward, and this trainer runs its parts: leave it out")


def shard_as_student(teacher: PreTrainedModel, trainer: Trainer) -> None:
    """Spread a teacher over the processes of a trainer that does so with its student; elsewhere leave it.

    Afterwards each process has its part of the teacher, layers are gathered where they run, and ``ranks.gathered``
    gives the lm_head.
    """
    if not trainer.is_fsdp_enabled:
        return
    device, plugin = trainer.accelerator.device, trainer.accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        _fill_from_the_first(teacher, device)
    shard_teacher(teacher, init_device_mesh(device.type, (trainer.accelerator.num_processes,)))


@torch.no_grad()
def _fill_from_the_first(model: nn.Module, device: torch.device) -> None:
    """Give every process the first one's weights: transformers loads them in that one, and zeros in the others."""
    for tensor in model.state_dict().values():
        whole = tensor.to(device)
        dist.broadcast(whole, 0)
        tensor.copy_(whole)
