"""bf16 copies that compute for fp32 weights: whose gradients they are, and that nothing of them stays."""

import pytest
import torch
from conftest import make_tiny_model

from trsd.models import packed_hidden_states
from trsd.working_weights import WorkingWeights
from trsd_kernels import packed_layout


def hidden_states(model, seed=0):
    layout = packed_layout([7, 12])
    ids = torch.randint(len(model.get_input_embeddings().weight), (19,), generator=torch.Generator().manual_seed(seed))
    return packed_hidden_states(model, ids, layout, backend="sdpa")


def backward(model, seed=0):
    hidden_states(model, seed).float().pow(2).sum().backward()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_bf16_model_added_up_in_fp32(tokenizer, checkpointing):
    model = make_tiny_model(tokenizer)
    plain = make_tiny_model(tokenizer, dtype=torch.bfloat16)
    plain.get_decoder().rotary_emb = model.get_decoder().rotary_emb  # whose frequencies are fp32 in a model as loaded
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    wanted = []
    with WorkingWeights(model, torch.bfloat16).in_use():
        for seed in (0, 1):
            backward(model, seed)
            backward(plain, seed)
            wanted.append(gradients(plain))
    got = gradients(model)
    assert got.keys() == wanted[0].keys() and len(got) > 10
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        exact = wanted[0][name].float() + wanted[1][name].float()
        if "embed" in name:  # summed in fp32 here and in bf16 there
            assert (gradient - exact).norm() < 2e-2 * exact.norm()
        else:
            assert torch.equal(gradient, exact)


def test_activations_are_bf16_and_the_weights_come_back(tokenizer):
    model = make_tiny_model(tokenizer)
    before = dict(model.named_parameters())
    weights = WorkingWeights(model, torch.bfloat16)
    with pytest.raises(RuntimeError, match="stop"), weights.in_use():
        assert hidden_states(model).dtype == torch.bfloat16
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        raise RuntimeError("stop")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert weights.num_bytes == 2 * sum(p.numel() for name, p in before.items() if "embed" not in name)


def test_a_frequent_tokens_gradient_is_summed_in_fp32(tokenizer):
    def gradient(dtype):
        model = make_tiny_model(tokenizer)
        ids = torch.full((3000,), 7)
        with WorkingWeights(model, dtype).in_use():
            out = model.get_input_embeddings()(ids)
            (out * torch.linspace(0.5, 1.0, 3000)[:, None].to(out.dtype)).sum().backward()
        return gradients(model)["model.embed_tokens.weight"][7]

    exact = gradient(None)
    assert (gradient(torch.bfloat16) - exact).norm() < 2e-3 * exact.norm()


def test_copies_follow_the_weights_when_they_are_told(tokenizer):
    model = make_tiny_model(tokenizer)
    weights = WorkingWeights(model, torch.bfloat16)
    norm = model.get_decoder().norm.weight
    with torch.no_grad():
        norm.mul_(2)
    with weights.in_use():
        stale = hidden_states(model)
    weights.refresh()
    with weights.in_use():
        torch.testing.assert_close(hidden_states(model), 2 * stale, rtol=1e-2, atol=1e-2)


def test_frozen_weights_get_no_gradient_and_bf16_ones_no_copy(tokenizer):
    model = make_tiny_model(tokenizer)
    model.get_input_embeddings().requires_grad_(False)
    with WorkingWeights(model, torch.bfloat16).in_use():
        backward(model)
    found = gradients(model)
    assert "model.norm.weight" in found and "model.embed_tokens.weight" not in found
    assert WorkingWeights(make_tiny_model(tokenizer, dtype=torch.bfloat16), torch.bfloat16).num_bytes == 0


def test_without_a_dtype_the_parameters_themselves_work(tokenizer):
    model = make_tiny_model(tokenizer)
    wanted = hidden_states(model)
    weights = WorkingWeights(model, None)
    weights.refresh()
    with weights.in_use():
        assert torch.equal(hidden_states(model), wanted)
    assert weights.num_bytes == 0
