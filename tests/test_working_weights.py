"""bf16 copies that compute for fp32 weights: whose gradients they are, and that nothing of them stays."""

import pytest
import torch
from conftest import make_tiny_model

from trsd.models import PACKED_ATTENTION, packed_hidden_states
from trsd.recomputation import recompute_activations
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
        recompute_activations(model, "full")
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


def routed_model():
    """A tiny mixture of experts whose class keeps its router in fp32."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
        tie_word_embeddings=True,
    )
    model = Ernie4_5_MoeForCausalLM(config)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.eval()


def test_parameters_that_transformers_keeps_in_fp32_have_no_copy(tmp_path):
    model = routed_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = {name: p.dtype for name, p in loaded.named_parameters() if "embed" not in name}
    routers = {name for name, dtype in wanted.items() if dtype == torch.float32}
    assert routers and all("gate.weight" in name or "moe_statics" in name for name in routers)
    weights = WorkingWeights(model, torch.bfloat16)
    with weights.in_use():
        inside = {name: p.dtype for name, p in model.named_parameters() if "embed" not in name}
        hidden = hidden_states(model)
        assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
        hidden.float().pow(2).sum().backward()
    assert inside == wanted
    assert all(p.grad.dtype == torch.float32 for _, p in model.named_parameters() if p.grad is not None)


def test_a_name_of_a_module_to_keep_covers_all_below_it_and_the_fp16_list_is_for_fp16(tokenizer):
    def copied(dtype):
        model = make_tiny_model(tokenizer)
        model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"input_layernorm"}, {"layers.*.mlp"}
        with WorkingWeights(model, dtype).in_use():
            return {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}

    every = {name for name, _ in make_tiny_model(tokenizer).named_parameters() if "embed" not in name}
    assert copied(torch.bfloat16) == {name for name in every if "input_layernorm" not in name}
    assert copied(torch.float16) == {name for name in every if "input_layernorm" not in name and "mlp" not in name}
