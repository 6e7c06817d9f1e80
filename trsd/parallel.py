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
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.placement import Placement
from trsd.ranks import Ranks
from trsd.student_loss import LossHead, StudentLoss
from trsd.working_weights import kept_in_fp32


def check_ranks(placement: Placement, ranks: Ranks) -> None:
    """Raise InputError for a recipe that these ranks cannot run, with what to do."""
    recipe = placement.recipe
    if ranks.size == 1:
        several = {"shard_group_size": None, "cpu_offload": False, "vocab_parallel": False}
        for name, default in several.items():
            if getattr(recipe, name) != default:
                raise InputError(f"{name}: this run has one rank: start it by torchrun, or leave it out")
        return
    ranks.num_shards(recipe.shard_group_size)
    if recipe.optim != "adamw_torch":
        raise InputError(f"optim: {recipe.optim} runs in one process: use adamw_torch under torchrun")
    if recipe.lora_base == "nf4":
        raise InputError("lora_base: nf4 runs in one process: use full under torchrun, which is sharded")
    if recipe.teacher == "online_fp8":
        raise InputError("teacher: online_fp8 runs in one process: under torchrun use online, which is sharded")
    if recipe.cpu_offload and placement.device == "cpu":
        raise InputError("cpu_offload: there is no GPU to take anything off: leave it out")
    if not recipe.vocab_parallel:
        return
    if recipe.shard_group_size or recipe.cpu_offload or recipe.lora_rank:
        raise InputError(
            "vocab_parallel: spreads lm_head over all ranks and trains it: leave out shard_group_size, "
            "cpu_offload and lora_rank"
        )
    if placement.student_config.get_text_config().tie_word_embeddings:
        raise InputError("vocab_parallel: this student's lm_head is its embeddings, which all ranks need: leave it out")
    if recipe.alpha > 0 and recipe.teacher not in ("online", "hidden_cache"):
        raise InputError(f"vocab_parallel: teacher {recipe.teacher} gives no hidden states: use online or hidden_cache")


def refuse_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Raise InputError for a model with parameters that must stay fp32 in bf16 layers: sharding casts whole layers."""
    kept = kept_in_fp32(model, dtype) if dtype else set()
    if names := [name for name, parameter in model.named_parameters() if id(parameter) in kept]:
        raise InputError(f"{type(model).__name__} keeps {names[0]} in fp32: several ranks train it with --bf16 False")


def shard_student(
    student: StudentLoss,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    vocab_parallel: bool = False,
) -> None:
    """Shard the student's weights over ``mesh``, in place.

    Args:
        student: with its weights on the CPU or the device, the same on every rank.
        mesh: shards, or replicas and shards.
        dtype: that the layers compute in; None is that of the weights.
        cpu_offload: shards of weights, gradients and optimizer state stay in the CPU's memory.
        vocab_parallel: lm_head's shards stay shards when it is used, for ``sharded_heads.py``.
    """
    model = student.model
    head = LossHead(model.get_output_embeddings())
    model.set_output_embeddings(head)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    exact = {"mesh": mesh, "offload_policy": offload}
    layers = exact | {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for module in _groups_of_the_body(model):
        fully_shard(module, **layers)
    apart = set()
    if vocab_parallel:
        whole = head.weight.detach().to(mesh.device_type)
        head.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        apart.add(head.weight)
    elif head.weight is not model.get_input_embeddings().weight:
        fully_shard(head, **exact)
    fully_shard(student, ignored_params=apart, **exact)
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
