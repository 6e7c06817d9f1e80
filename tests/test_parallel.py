"""What sharding makes of a model's precision; the losses of sharded models are in test_faults_ranks.py."""

from contextlib import nullcontext

import pytest
import torch

from trsd.errors import InputError
from trsd.models import packed_hidden_states
from trsd.objective import Objective
from trsd.parallel import refuse_kept_in_fp32, shard_student
from trsd.student_loss import StudentLoss
from trsd.working_weights import WorkingWeights
from trsd_kernels import packed_layout


def seen_dtypes(model):
    """Of the inputs and weights of the layers, and of the embeddings' weights, filled when the model runs."""
    seen = {}

    def look(name, module, inputs):
        seen[name] = {inputs[0].dtype, *(parameter.dtype for parameter in module.parameters())}

    decoder = model.get_decoder()
    for name, module in (
        ("layer", decoder.layers[1].mlp),
        ("norm", decoder.norm),
        ("embeddings", decoder.embed_tokens),
    ):
        module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs))
    return seen


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layers_compute_in_bf16_and_embeddings_and_gradients_stay_fp32(one_rank, tiny_model, dtype):
    objective = Objective(vocab_size=640, chunk_bytes=None, alpha=0.0)
    options = dict(thinking_weight=0.0, backend="sdpa", compute=nullcontext)
    student = StudentLoss(tiny_model, objective, objective, **options)
    seen = seen_dtypes(tiny_model)
    shard_student(student, one_rank.mesh(), dtype=dtype)
    working, layout = WorkingWeights(tiny_model, dtype, copied=False), packed_layout([4])
    student.forward = lambda ids: packed_hidden_states(tiny_model, ids, layout, backend="sdpa").float().sum()
    with working.in_use():
        student(torch.tensor([5, 6, 7, 8])).backward()
    layers = dtype or torch.float32
    assert seen == {"layer": {layers}, "norm": {layers}, "embeddings": {torch.int64, torch.float32}}
    assert {parameter.grad.dtype for parameter in tiny_model.parameters()} == {torch.float32}


def test_a_model_that_keeps_layers_in_fp32_is_refused_in_bf16(tiny_model):
    refuse_kept_in_fp32(tiny_model, torch.bfloat16)
    tiny_model._keep_in_fp32_modules_strict = {"gate_proj"}
    refuse_kept_in_fp32(tiny_model, None)
    with pytest.raises(InputError, match="gate_proj.*--bf16 False"):
        refuse_kept_in_fp32(tiny_model, torch.bfloat16)
