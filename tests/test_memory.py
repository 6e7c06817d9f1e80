"""What a call holds: the bytes its plan declares, and never a tensor of tokens x vocabulary."""

import pytest
import torch
from distillation_cases import DIVERGENCES, exact_loss, make_case

from trsd.live_bytes import LiveBytes
from trsd_kernels import DistillOptions, fused_linear_distillation
from trsd_kernels.products import Head
from trsd_kernels.token_plan import Needs, TokenPlan
from trsd_kernels.vocab_plan import VocabSweep

NUM_TOKENS, VOCAB, HIDDEN = 768, 4096, 24
EVERYTHING = dict(temperature=2.0, student_logit_softcap=9.0)


def heads(case):
    return (
        Head(case.student_hidden_states, case.student_lm_head_weight, case.student_lm_head_bias),
        Head(case.teacher_hidden_states, case.teacher_lm_head_weight, case.teacher_lm_head_bias),
    )


def token_plan(case, options, needs, *, chunk, rows=None):
    dtype = torch.float32
    return TokenPlan(
        *heads(case),
        case.labels,
        torch.ones(len(case.labels)),
        rows,
        options,
        needs,
        chunk=chunk,
        student_dtype=dtype,
        teacher_dtype=dtype,
    )


def result_bytes(needs, dtype):
    sizes = dict(hidden_states=NUM_TOKENS * HIDDEN, weight=VOCAB * HIDDEN, bias=VOCAB)
    return sum(dtype.itemsize * sizes[name] for name, need in needs._asdict().items() if need)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [Needs(True, True, True), Needs(True, False, False)])
@pytest.mark.parametrize("extra", [{}, EVERYTHING])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_plan_holds_what_its_formula_says(divergence, extra, needs, dtype):
    case = make_case(NUM_TOKENS, VOCAB, HIDDEN, dtype=dtype, bias=True)
    rows = torch.arange(0, NUM_TOKENS, 2)
    for chunk in (64, 256):
        plan = token_plan(case, DistillOptions(divergence=divergence, **extra), needs, chunk=chunk, rows=rows)
        with torch.no_grad(), LiveBytes() as memory:
            plan.run()
        declared = plan.live_bytes() + result_bytes(needs, dtype)
        assert 0.55 * declared <= memory.peak <= declared
        assert memory.largest_numel <= max(chunk * VOCAB, VOCAB * 2 * HIDDEN) < NUM_TOKENS * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocab_plan_holds_what_its_formula_says(divergence, dtype):
    case = make_case(NUM_TOKENS, VOCAB, HIDDEN, dtype=dtype, bias=True)
    needs = Needs(True, True, True)
    for chunk in (128, 1024):
        with torch.no_grad(), LiveBytes() as memory:
            sweep = VocabSweep(
                *heads(case),
                case.labels,
                DistillOptions(divergence=divergence, **EVERYTHING),
                chunk=chunk,
                student_dtype=torch.float32,
                teacher_dtype=torch.float32,
            )
            state = sweep.state()
            sweep.add_mixture(state)
            sweep.gradients(state, torch.ones(2, NUM_TOKENS), needs)
        declared = sweep.live_bytes(needs, gathered=False) + result_bytes(needs, dtype)
        assert 0.55 * declared <= memory.peak <= declared
        assert memory.largest_numel <= max(NUM_TOKENS * chunk, VOCAB * 2 * HIDDEN) < NUM_TOKENS * VOCAB


def test_a_byte_budget_is_kept():
    from trsd_kernels.linear_ops import chunk_length

    budget = 3 * 2**20
    case = make_case(NUM_TOKENS, VOCAB, HIDDEN, dtype=torch.float32)
    chunk = chunk_length(VOCAB, torch.float32, torch.device("cpu"), budget)
    plan = token_plan(case, DistillOptions(), Needs(True, False, False), chunk=chunk)
    assert 0.5 * budget <= plan.live_bytes() - plan.rows_class.scratch_bytes(plan.options, chunk, VOCAB, torch.float32)
    assert 2 * 4 * chunk * VOCAB <= budget


def test_whole_logits_take_more_than_four_times_the_memory():
    case = make_case(NUM_TOKENS, VOCAB, HIDDEN, dtype=torch.float32)
    with LiveBytes() as whole:
        exact_loss(case).backward()
    plan = token_plan(case, DistillOptions(), Needs(True, True, False), chunk=64)
    with torch.no_grad(), LiveBytes() as ours:
        plan.run()
    assert ours.peak < whole.peak / 4
    assert whole.largest_numel >= NUM_TOKENS * VOCAB


def test_the_counter_sees_what_is_made_and_freed():
    with LiveBytes() as memory:
        first = torch.ones(1000)
        second = first + 1
        del first
        assert memory.live == 4000
        view = second[:10]
        del second
        assert memory.live == 4000 and view.numel() == 10
        del view
        assert memory.live == 0
    assert memory.peak == 8000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_counter_sees_what_the_backward_pass_alone_keeps_and_counts_it_once(device):
    weight = torch.ones(1000, device=device, requires_grad=True)
    with LiveBytes() as memory:
        kept = weight.exp()  # its gradient is the result
        out = kept.sum()
        memory.hold_results([kept, kept[:10]])
        del kept
        assert memory.live == 4004
        out.backward()
        del out
        assert memory.live == weight.grad.nbytes == 4000
    weight.grad = None
    assert memory.live == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_gpu_holds_at_most_three_tenths_more_than_the_formula(divergence):
    case = make_case(2048, 65536, 512, dtype=torch.bfloat16, bias=False).on("cuda")
    fused_linear_distillation(**case.tensors(), divergence=divergence, chunk_size=512).loss.backward()
    gradients = sum(tensor.grad.nbytes for tensor in case.trained().values())
    for tensor in case.trained().values():
        tensor.grad = None
    plan = TokenPlan(
        *heads(case),
        case.labels,
        torch.ones(2048, device="cuda"),
        None,
        DistillOptions(divergence=divergence),
        Needs(True, True, False),
        chunk=512,
        student_dtype=torch.bfloat16,
        teacher_dtype=torch.bfloat16,
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_distillation(**case.tensors(), divergence=divergence, chunk_size=512).loss.backward()
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.3 * plan.live_bytes()
