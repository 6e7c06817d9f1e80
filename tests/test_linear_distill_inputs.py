"""What ``fused_linear_distillation`` takes and refuses: options, tensors, plans, chunks, derivatives."""

from dataclasses import replace

import pytest
import torch
from distillation_cases import NUM_TOKENS, make_case

from trsd_kernels import FusedLinearDistillation, fused_linear_distillation
from trsd_kernels.linear_distill import Execution, autocast_dtype
from trsd_kernels.torch_rows import even_chunk, row_chunks

PLANS = ("tokens", "vocab")
NO_TEACHER = dict(teacher_hidden_states=None, teacher_lm_head_weight=None)


def distill(case, **options):
    return fused_linear_distillation(**case.tensors(), **options)


def test_auto_takes_the_vocabulary_plan_where_rows_would_be_too_few_or_losses_are_wanted():
    tokens, few = torch.zeros(4096), torch.zeros(8)
    assert Execution().chosen_plan(151936, tokens) == "tokens"
    assert Execution(chunk_bytes=2**26).chosen_plan(151936, tokens) == "vocab"
    assert Execution(chunk_bytes=2**26).chosen_plan(151936, few) == "tokens"
    assert Execution(reduction="none").chosen_plan(151936, tokens) == "vocab"
    assert Execution(plan="tokens", chunk_bytes=2**10).chosen_plan(151936, tokens) == "tokens"


def test_options_of_other_number_types_mean_the_same():
    case = make_case()
    for plan in PLANS:
        expected = distill(case, plan=plan, alpha=1.0, temperature=2.0, temperature_squared=True, ignore_index=-100)
        same = distill(case, plan=plan, alpha=1, temperature=2, temperature_squared=1, ignore_index=-100.0)
        assert same.loss == expected.loss


def test_num_items_may_be_any_single_number():
    case = make_case()
    expected = distill(case, num_items_in_batch=7).loss
    for number in (7.0, torch.tensor(7), torch.tensor([7.0])):
        out = distill(case, num_items_in_batch=number)
        assert out.loss == expected and out.num_items.shape == ()


def test_a_second_derivative_is_refused():
    for plan in PLANS:
        case = make_case()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(distill(case, plan=plan).loss, case.student_hidden_states, create_graph=True)


def test_a_forward_mode_derivative_is_refused():
    case = make_case()
    hidden = case.student_hidden_states.detach()
    for plan in PLANS:
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(
                lambda h, plan=plan: distill(replace(case, student_hidden_states=h), plan=plan).loss,
                (hidden,),
                (torch.ones_like(hidden),),
            )


def test_module_is_the_function():
    case = make_case(bias=True)
    options = dict(alpha=0.3, divergence="jsd", beta=0.7, temperature=1.5)
    module = FusedLinearDistillation(chunk_size=3, **options)
    torch.testing.assert_close(module(**case.tensors()).loss, distill(case, **options).loss)
    assert "divergence='jsd'" in repr(module) and "chunk_size=3" in repr(module)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(labels=torch.full((NUM_TOKENS,), 61)), r"labels\[0\] = 61 is outside \[0, 61\)"),
        (dict(labels=torch.full((NUM_TOKENS,), -1)), "outside"),
        (dict(labels=torch.zeros(22, dtype=torch.int64)), "one per hidden state"),
        (dict(labels=torch.zeros(NUM_TOKENS, dtype=torch.int32)), "int64"),
        (dict(student_hidden_states=torch.randn(2, 3, 16)), "flatten"),
        (dict(student_hidden_states=torch.randn(23, 8)), "hidden size 8"),
        (dict(student_hidden_states=torch.zeros(NUM_TOKENS, 16, dtype=torch.int64)), "floating"),
        (dict(student_lm_head_weight=torch.zeros(0, 16)), "vocabulary of 1"),
        (dict(student_lm_head_bias=torch.zeros(60)), "student_lm_head_bias"),
        (dict(teacher_lm_head_bias=torch.zeros(61, dtype=torch.int64)), "teacher_lm_head_bias"),
        (dict(teacher_hidden_states=torch.randn(NUM_TOKENS - 1, 24)), f"{NUM_TOKENS - 1} tokens"),
        (dict(teacher_lm_head_weight=torch.randn(64, 24)), "teacher vocabulary 64"),
        (dict(teacher_lm_head_weight=None), "together"),
        (NO_TEACHER, "teacher tensors are needed"),
        (dict(NO_TEACHER, alpha=0.0, teacher_lm_head_bias=torch.ones(61)), "without teacher"),
        (dict(token_weights=torch.ones(22)), "token_weights"),
        (dict(token_weights=torch.ones(NUM_TOKENS, dtype=torch.int64)), "floating"),
        (dict(labels=torch.zeros(NUM_TOKENS, dtype=torch.int64, device="meta")), "one device"),
        (dict(alpha=1.5), "alpha"),
        (dict(beta=-0.1), "beta"),
        (dict(skew=1.0), "skew"),
        (dict(temperature=0.0), "temperature"),
        (dict(divergence="kl"), "forward_kl"),
        (dict(student_logit_softcap=0.0), "student_logit_softcap"),
        (dict(teacher_logit_scale=float("inf")), "teacher_logit_scale"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(chunk_bytes=0), "chunk_bytes"),
        (dict(plan="rows"), "tokens"),
        (dict(reduction="average"), "mean"),
        (dict(reduction="none", plan="tokens"), 'plan="vocab"'),
        (dict(num_items_in_batch=torch.ones(NUM_TOKENS)), "one number"),
        (dict(num_items_in_batch=-3), "expected 0 or more, got -3"),
        (dict(reduction="sum", num_items_in_batch=3), "num_items_in_batch"),
    ],
)  # fmt: skip
def test_wrong_input_raises_a_value_error_that_says_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation(**make_case().tensors() | change)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="temprature"):
        distill(make_case(), temprature=2.0)
    with pytest.raises(TypeError, match="alhpa"):
        FusedLinearDistillation(alhpa=2.0)


@pytest.mark.parametrize("total,limit,expected", [(4096, 2208, 2048), (8192, 2208, 2048), (300, 512, 300), (0, 5, 1)])
def test_chunks_come_out_even(total, limit, expected):
    assert even_chunk(total, limit) == expected


@pytest.mark.parametrize("limit", [1, 7, 100, 128, 129, 1000])
def test_a_chunk_never_exceeds_its_limit(limit):
    for total in range(0, 2000, 37):
        chunk = even_chunk(total, limit)
        assert 1 <= chunk <= limit
        assert len(list(row_chunks(total, chunk))) == -(-total // limit)


def test_autocast_on_a_gpu_says_what_it_rounds_to():
    assert autocast_dtype(torch.device("cuda")) is None
    torch.set_autocast_enabled("cuda", True)
    try:
        assert autocast_dtype(torch.device("cuda")) == torch.get_autocast_dtype("cuda")
        assert autocast_dtype(torch.device("cpu")) is None
    finally:
        torch.set_autocast_enabled("cuda", False)
