"""Fault 31: backward twice, a kept graph, a frozen head, tied embeddings; of the loss alone and of training an adapter.

Where the loss allows a second backward its gradients are those of the first; where it does not, torch says so.
"""

import pytest
import torch
from conftest import make_tiny_model
from distillation_cases import make_case
from safetensors.torch import load_file
from torch import nn

from trsd.adapters import add_adapter, merged_state
from trsd.models import packed_hidden_states
from trsd_kernels import (
    distill_from_top_k,
    distill_from_vectors,
    fused_distillation,
    fused_linear_distillation,
    packed_layout,
    teacher_vectors,
    top_k_targets,
)

HEAD_FIRST = ("student_lm_head_weight", "student_hidden_states")


def whole_loss(case):
    """The loss by plain torch operations, cross-entropy and forward KL in equal parts."""
    logits = case.student_hidden_states @ case.student_lm_head_weight.T
    log_q = torch.log_softmax(logits, -1)
    p = torch.softmax(case.teacher_hidden_states @ case.teacher_lm_head_weight.T, -1)
    return 0.5 * nn.functional.nll_loss(log_q, case.labels) + 0.5 * nn.functional.kl_div(
        log_q, p, reduction="batchmean"
    )


def fused(plan):
    return lambda case: fused_linear_distillation(**case.tensors(), plan=plan, alpha=0.5).loss


def from_logits(case):
    student, teacher = (
        getattr(case, f"{who}_hidden_states") @ getattr(case, f"{who}_lm_head_weight").T
        for who in ("student", "teacher")
    )
    return fused_distillation(student, teacher, case.labels, alpha=0.5).loss


def from_top_k(case):
    vocab_size = len(case.teacher_lm_head_weight)
    targets = top_k_targets(case.teacher_hidden_states, case.teacher_lm_head_weight, vocab_size)
    return distill_from_top_k(
        case.student_hidden_states, case.student_lm_head_weight, targets, case.labels, alpha=0.5
    ).loss


LOSSES = {"tokens": fused("tokens"), "vocab": fused("vocab"), "logits": from_logits, "top k": from_top_k}


def gradients_of(loss, case, **options):
    return torch.autograd.grad(loss, list(case.trained().values()), **options)


@pytest.mark.parametrize("name", LOSSES)
def test_fault_31_a_second_backward_through_a_kept_graph_gives_the_same_gradients(name):
    case = make_case()
    expected = gradients_of(whole_loss(case), case)
    loss = LOSSES[name](case)
    first = gradients_of(loss, case, retain_graph=True)
    second = gradients_of(loss, case)
    for one, other, exact in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_fault_31_accumulated_backwards_of_a_kept_graph_add_up(name):
    case = make_case()
    loss = LOSSES[name](case)
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in case.trained().values()]
    (2 * loss).backward()
    for tensor, one in zip(case.trained().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * one)


@pytest.mark.parametrize("name", LOSSES)
def test_fault_31_a_second_backward_without_a_kept_graph_is_refused(name):
    case = make_case()
    loss = LOSSES[name](case)
    loss.backward()
    kept = [tensor.grad.clone() for tensor in case.trained().values()]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert all(torch.equal(tensor.grad, one) for tensor, one in zip(case.trained().values(), kept, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", ["student_hidden_states", "student_lm_head_weight"])
def test_fault_31_what_is_frozen_gets_no_gradient_and_the_other_the_same(name, trained):
    case = make_case(trained=[trained])
    both = make_case(trained=HEAD_FIRST)
    LOSSES[name](case).backward()
    whole_loss(both).backward()
    for field in HEAD_FIRST:
        if field == trained:
            torch.testing.assert_close(getattr(case, field).grad, getattr(both, field).grad, rtol=1e-5, atol=1e-7)
        else:
            assert getattr(case, field).grad is None


def test_fault_31_vectors_for_a_frozen_head_refuse_one_that_learns():
    case = make_case(trained=["student_hidden_states"])
    heads = case.teacher_lm_head_weight, case.student_lm_head_weight
    targets = teacher_vectors(case.teacher_hidden_states, *heads)
    loss = distill_from_vectors(
        case.student_hidden_states, case.student_lm_head_weight, targets, case.labels, alpha=0.5
    ).loss
    first = gradients_of(loss, case, retain_graph=True)
    assert torch.equal(first[0], gradients_of(loss, case)[0])
    torch.testing.assert_close(first, gradients_of(whole_loss(case), case), rtol=1e-5, atol=1e-6)
    case.student_lm_head_weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen|requires_grad|head"):
        distill_from_vectors(case.student_hidden_states, case.student_lm_head_weight, targets, case.labels)


def adapter_loss(model, plan="tokens"):
    """The loss of one sequence against targets that are drawn, in the way the trainer puts them together."""
    ids = (5, 6, 7, 8, 9)
    hidden = packed_hidden_states(model, torch.tensor(ids), packed_layout([len(ids)], [[]]), backend="sdpa")
    head = model.get_output_embeddings().weight
    teacher = torch.randn(len(ids), head.shape[1], generator=torch.Generator().manual_seed(0)).to(hidden.dtype)
    labels = torch.tensor([6, 7, 8, 9, 10])
    out = fused_linear_distillation(hidden, head, teacher, head.detach(), labels, plan=plan, alpha=0.5)
    return out.loss


@pytest.fixture
def adapted(tokenizer):
    """Makes a tiny model with an adapter that does something."""
    pytest.importorskip("peft")

    def adapted(**options):
        model = make_tiny_model(tokenizer, **options)
        add_adapter(model, 4, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        return model

    return adapted


def trained_gradients(model, loss, **options):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], **options)


@pytest.mark.parametrize("plan", ["tokens", "vocab"])
@pytest.mark.parametrize("tie", [True, False])
def test_fault_31_an_adapters_backward_twice_is_right_and_touches_nothing_frozen(adapted, tie, plan):
    model = adapted(tie=tie)
    loss = adapter_loss(model, plan)
    first = trained_gradients(model, loss, retain_graph=True)
    second = trained_gradients(model, loss)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    again = adapter_loss(model, plan)
    again.backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), first, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("tie", [True, False])
def test_fault_31_an_adapters_gradients_are_those_of_the_matrices_it_is_merged_into(adapted, tokenizer, tie):
    """By the chain rule through W + s B A, from a plain model of the merged weights in which everything learns."""
    model = adapted(tie=tie).double()
    adapter_loss(model).backward()
    plain = make_tiny_model(tokenizer, tie=tie).double()
    plain.load_state_dict({name: tensor.double() for name, tensor in merged_state(model).items()})
    adapter_loss(plain).backward()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        layer, whole = model.get_submodule(name), plain.get_submodule(name).weight.grad
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(down.grad, 2 * up.T @ whole, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(up.grad, 2 * whole @ down.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}, {"lora_rank": 4, "teacher": "vector_cache"}])
@pytest.mark.parametrize("tie", [True, False])
def test_fault_31_training_moves_tied_and_untied_heads_as_it_says(run, tokenizer, tmp_path, flags, tie):
    if flags:
        pytest.importorskip("peft")
    folder = tmp_path / "model"
    make_tiny_model(tokenizer, tie=tie).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trained = run(model_name_or_path=folder, max_steps=2, **flags) / "checkpoint-2" / "model.safetensors"
    before, after = load_file(folder / "model.safetensors"), load_file(trained)
    outer = {"model.embed_tokens.weight"} | (set() if tie else {"lm_head.weight"})
    assert before.keys() == after.keys() and outer <= before.keys()
    assert ("lm_head.weight" in before) == (not tie)
    moved = {name for name in outer if not torch.equal(before[name], after[name])}
    assert moved == (set() if flags else outer)
