"""The loss among what trainers put around it: compile, checkpointing, autocast, accumulation, tied heads, FSDP2."""

import pytest
import torch
import torch.distributed as dist
from distillation_cases import DIVERGENCES, make_case
from torch import nn

from trsd_kernels import FusedLinearDistillation, fused_linear_distillation
from trsd_kernels.linear_ops import linear_distill_tokens, linear_distill_vocab

PLANS = ("tokens", "vocab")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def gradients(case, loss):
    for tensor in case.trained().values():
        tensor.grad = None
    loss.backward()
    return [tensor.grad.clone() for tensor in case.trained().values()]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiles_whole_with_the_same_numbers(plan, divergence):
    case = make_case(dtype=torch.float32, bias=True, ignored=[2])
    options = dict(plan=plan, divergence=divergence, temperature=2.0, chunk_size=16)

    @torch.compile(fullgraph=True)
    def compiled(tensors):
        tensors = dict(tensors, student_hidden_states=tensors["student_hidden_states"] * 2.0)
        return fused_linear_distillation(**tensors, **options).loss + 1.0

    scaled = make_case(dtype=torch.float32, bias=True, ignored=[2])
    with torch.no_grad():
        scaled.student_hidden_states *= 2.0
    expected = fused_linear_distillation(**scaled.tensors(), **options).loss
    loss = compiled(case.tensors())
    torch.testing.assert_close(loss, expected + 1.0)
    got, wanted = gradients(case, loss), gradients(scaled, expected)
    torch.testing.assert_close(got[0], 2.0 * wanted[0])
    torch.testing.assert_close(got[1:], wanted[1:])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ignored", [(), range(23)])
def test_compiles_with_transposed_inputs(plan, ignored):
    case = make_case(dtype=torch.float32, ignored=ignored)
    tensors = {
        name: tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad) if tensor.ndim == 2 else tensor
        for name, tensor in case.tensors().items()
        if tensor is not None
    }

    @torch.compile(fullgraph=True)
    def compiled(tensors):
        return fused_linear_distillation(**tensors, plan=plan).loss

    loss = compiled(tensors)
    loss.backward()
    wanted = gradients(case, fused_linear_distillation(**case.tensors(), plan=plan).loss)
    torch.testing.assert_close([tensors[name].grad for name in case.trained()], wanted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compilation_serves_every_length(as_module, plan, dtype):
    options = dict(divergence="jsd", alpha=0.3, plan=plan)
    module = FusedLinearDistillation(**options)

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(**tensors):
        return module(**tensors) if as_module else fused_linear_distillation(**tensors, **options)

    for num_tokens in (5, 9, 13):
        case = make_case(num_tokens, dtype=dtype)
        eager = fused_linear_distillation(**case.tensors(), **options).loss
        wanted = gradients(case, eager)
        with torch._dynamo.config.patch(error_on_recompile=num_tokens > 5):
            loss = compiled(**case.tensors()).loss
            torch.testing.assert_close(loss, eager)
            torch.testing.assert_close(gradients(case, loss), wanted)


@pytest.mark.parametrize("op", [linear_distill_tokens, linear_distill_vocab])
def test_the_ops_pass_torchs_own_checks(op):
    from trsd_kernels import DistillOptions

    case = make_case(bias=True)
    tensors = list(case.tensors().values())
    arguments = [*tensors[:2], tensors[5], *tensors[2:4], tensors[6], tensors[4]]
    weights = torch.ones(len(case.labels), dtype=torch.float64)
    options = DistillOptions(divergence="jsd").encode()
    torch.library.opcheck(op, (*arguments, weights, options, 8, None, None, True, True, True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_recomputes_the_same(plan, reentrant):
    case = make_case(dtype=torch.float32)

    def loss(hidden):
        return fused_linear_distillation(**case.tensors() | dict(student_hidden_states=hidden), plan=plan).loss

    plain = gradients(case, loss(case.student_hidden_states))
    again = torch.utils.checkpoint.checkpoint(loss, case.student_hidden_states, use_reentrant=reentrant)
    torch.testing.assert_close(gradients(case, again), plain)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_rounds_neither_logits_nor_gradients(plan):
    case = make_case(dtype=torch.float32, regime="near")
    plain = fused_linear_distillation(**case.tensors(), plan=plan).loss
    expected = gradients(case, plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_distillation(**case.tensors(), plan=plan).loss
    assert loss == plain
    torch.testing.assert_close(gradients(case, loss), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plan", PLANS)
def test_autocast_on_a_gpu_rounds_the_operands_only(plan):
    case = make_case(257, 1000, 128, dtype=torch.float32, regime="near").on("cuda")
    rounded = make_case(257, 1000, 128, dtype=torch.float32, regime="near").on("cuda")
    with torch.no_grad():
        for name, tensor in rounded.tensors().items():
            if tensor is not None and tensor.is_floating_point():
                getattr(rounded, name).copy_(tensor.bfloat16())
    expected = gradients(rounded, fused_linear_distillation(**rounded.tensors(), plan=plan).loss)
    with torch.autocast("cuda", torch.bfloat16):
        loss = fused_linear_distillation(**case.tensors(), plan=plan).loss
    for got, wanted in zip(gradients(case, loss), expected, strict=True):
        assert got.dtype == torch.float32
        assert ((got - wanted).norm() / wanted.norm()).item() <= 4e-3


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_accumulate_over_micro_batches(plan):
    case = make_case(20, dtype=torch.float32, ignored=range(0, 20, 3))
    count = (case.labels != -100).sum()
    whole = gradients(case, fused_linear_distillation(**case.tensors(), plan=plan).loss)
    for tensor in case.trained().values():
        tensor.grad = None
    for part in (slice(0, 3), slice(3, 14), slice(14, 20)):
        rows = ("student_hidden_states", "teacher_hidden_states", "labels")
        tensors = case.tensors() | {name: getattr(case, name)[part] for name in rows}
        fused_linear_distillation(**tensors, num_items_in_batch=count, plan=plan).loss.backward()
    torch.testing.assert_close([tensor.grad for tensor in case.trained().values()], whole)


@pytest.mark.parametrize("plan", PLANS)
def test_a_tied_embedding_gets_both_gradients(plan):
    case = make_case(vocab=31, dtype=torch.float64)
    embedding = nn.Embedding(31, 16, dtype=torch.float64)
    ids = torch.arange(len(case.labels)) % 31

    def loss(fused):
        hidden = torch.tanh(embedding(ids))
        tensors = case.tensors() | dict(student_hidden_states=hidden, student_lm_head_weight=embedding.weight)
        if fused:
            return fused_linear_distillation(**tensors, plan=plan, alpha=1.0).loss
        log_q = torch.log_softmax(hidden @ embedding.weight.T, -1)
        p = torch.softmax(case.teacher_hidden_states @ case.teacher_lm_head_weight.T, -1)
        return nn.functional.kl_div(log_q, p, reduction="batchmean")

    torch.testing.assert_close(
        torch.autograd.grad(loss(True), embedding.weight), torch.autograd.grad(loss(False), embedding.weight)
    )


class Student(nn.Module):
    """A body of one layer and a head module that owns its weight and computes the loss in its forward."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(16, 16, bias=False)
        self.head = Head(case)

    def forward(self, case):
        return self.head(torch.tanh(self.body(case.student_hidden_states.detach())), case)


class Head(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.weight = nn.Parameter(case.student_lm_head_weight.detach().clone())
        self.distill = FusedLinearDistillation(divergence="jsd")

    def forward(self, hidden, case):
        teacher = case.teacher_hidden_states, case.teacher_lm_head_weight
        return self.distill(hidden, self.weight, *teacher, case.labels).loss


def run_fsdp(file):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    case = make_case(vocab=31, dtype=torch.float32)
    student = Student(case)
    sharded = fully_shard(student.head), fully_shard(student)
    assert len(sharded) == 2
    try:
        fused_linear_distillation(**case.tensors() | dict(student_lm_head_weight=student.head.weight))
    except ValueError as error:
        assert "DTensor" in str(error)
    else:
        raise AssertionError("a sharded weight was taken")
    student(case).backward()
    full = {name: parameter.grad.full_tensor() for name, parameter in student.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(full, file)


def test_fsdp2_gives_the_gradients_of_one_process(tmp_path, launch):
    launch.call(run_fsdp, str(tmp_path / "gradients.pt"))
    case = make_case(vocab=31, dtype=torch.float32)
    student = Student(case)
    student(case).backward()
    got = torch.load(tmp_path / "gradients.pt")
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
