"""Sharding by FSDP2 (``torch.distributed.fsdp.fully_shard``): every rank holds its part of weights and optimizer state.

A layer's weights are gathered when the layer runs and its gradients are summed and scattered when its backward has run
(arXiv 2304.11277). Groups: each layer of the body; its final norm; lm_head where it is not tied; the rest, which is the
embeddings, with the whole. Layers compute in bf16 where that is on, embeddings and lm_head in fp32, as in
``working_weights.py``; gradients are summed in fp32, and not averaged, for the loss is normalised by the whole step.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from trsd.student_loss import LossHead, StudentLoss


def shard_student(
    student: StudentLoss, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, cpu_offload: bool = False
) -> None:
    """Shard the student's weights over ``mesh``, in place.

    Args:
        student: with its weights on the CPU or the device, the same on every rank.
        mesh: shards, or replicas and shards.
        dtype: that the layers compute in; None is that of the weights.
        cpu_offload: shards of weights, gradients and optimizer state stay in the CPU's memory.
    """
    model = student.model
    head = LossHead(model.get_output_embeddings())
    model.set_output_embeddings(head)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    exact = {"mesh": mesh, "offload_policy": offload}
    layers = exact | {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for module in _groups_of_the_body(model):
        fully_shard(module, **layers)
    if head.weight is not model.get_input_embeddings().weight:
        fully_shard(head, **exact)
    fully_shard(student, **exact)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def shard_teacher(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model that is only read; ``ranks.gathered`` gives its lm_head."""
    for module in _groups_of_the_body(model):
        fully_shard(module, mesh=mesh)
    head, body = model.get_output_embeddings(), model.get_decoder()
    if head.weight is not model.get_input_embeddings().weight:
        fully_shard(head, mesh=mesh)
    fully_shard(body, mesh=mesh, reshard_after_forward=True)


def last_row(student: nn.Module, is_last: bool) -> None:
    """Say before a backward pass whether it is the step's last: only then replicas sum their gradients."""
    if isinstance(student, FSDPModule):
        student.set_requires_all_reduce(is_last)


def give_back(student: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves."""
    if isinstance(student, FSDPModule):
        student.reshard()


def _groups_of_the_body(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Its layers, and what else has weights, the embeddings apart."""
    embeddings = model.get_input_embeddings()
    for module in model.get_decoder().children():
        if module is embeddings or not any(True for _ in module.parameters()):
            continue
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield module
