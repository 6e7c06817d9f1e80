"""Numbers that must not depend on how the work is cut up, on what lies beside it, or on the machine's moods."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses
from distillation_cases import (
    DIVERGENCES,
    IGNORE,
    INTERPRETED,
    exact_token_losses,
    make_case,
    not_interpreted,
    poisoned_memory,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trsd.batching import pack_examples
from trsd.methods.trsd import branched_examples, cut_example, full_example
from trsd.metrics import read_metrics
from trsd.models import packed_hidden_states
from trsd_kernels import fused_distillation, fused_linear_distillation, packed_layout

ROOT = Path(__file__).parent.parent


def run_python(code, *words, **environment):
    environment = os.environ | {"PYTHONPATH": ".:kernels:tests", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", code, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# 13: nothing to learn


@not_interpreted
def test_fault_13_a_run_whose_cuts_show_no_thinking_learns_its_answers(run):
    """The thinking term has no token at all in any step."""
    folder = run("run", max_steps=2, cut="budgets", cut_budgets="0", anchor_share=0)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["thinking_cross_entropy"] for row in rows] == [0.0, 0.0]
    assert all(0 < row["loss"] < float("inf") and 0 < row["grad_norm"] < float("inf") for row in rows)


@not_interpreted
@pytest.mark.parametrize("plan", ["tokens", "vocab"])
def test_fault_13_a_row_without_labels_gives_every_parameter_a_gradient_of_zero(tiny_model, plan):
    hidden = packed_hidden_states(tiny_model, torch.arange(1, 12), packed_layout([4, 7]))
    head = tiny_model.get_output_embeddings().weight
    labels = torch.full((11,), IGNORE)
    with poisoned_memory():
        loss = fused_linear_distillation(hidden, head, hidden.detach(), head.detach(), labels, plan=plan).loss
        loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in tiny_model.parameters())


@not_interpreted
@pytest.mark.parametrize("plan", ["tokens", "vocab"])
def test_fault_13_chunks_without_a_label_add_nothing(plan):
    learnt = slice(10, 15)
    case = make_case(20, dtype=torch.float32, ignored=[*range(10), *range(15, 20)])
    out = fused_linear_distillation(**case.tensors(), plan=plan, chunk_size=5)
    rows = ("student_hidden_states", "teacher_hidden_states", "labels")
    part = case.tensors() | {name: getattr(case, name)[learnt] for name in rows}
    assert out.loss.item() == fused_linear_distillation(**part, plan=plan, chunk_size=5).loss.item()


RANK = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from distillation_cases import make_case
from trsd_kernels import fused_linear_distillation
torch.set_num_threads(1)
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
case = make_case(8, dtype=torch.float32, ignored=range(8) if rank else ())
head = torch.nn.Linear(16, 61, bias=False)
head.weight.data.copy_(case.student_lm_head_weight)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 16))
loss = fused_linear_distillation(
    model(case.student_hidden_states.detach()), head.weight, case.teacher_hidden_states, case.teacher_lm_head_weight,
    case.labels, num_items_in_batch=8,
).loss
loss.backward()
norm = torch.stack([p.grad.norm() for p in model.parameters()])
print(f"{loss.item()} {norm.tolist()}", flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads may abort a process that ends in an orderly way
"""


@not_interpreted
def test_fault_13_a_rank_without_a_label_keeps_step_with_the_others(tmp_path):
    """Gradients are averaged over both ranks inside the backward, which waits for a rank that makes none."""
    environment = os.environ | {"PYTHONPATH": ".:kernels:tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    (loss, norms), (nothing, same) = (out.split(" ", 1) for out, _ in outputs)
    assert float(loss) > 0 and float(nothing) == 0
    assert norms == same and all(norm > 0 for norm in json.loads(norms))


# 16: how the work is cut up


@not_interpreted
def test_fault_16_chunks_rows_and_recomputing_change_a_run_by_rounding_only(run):
    """The first step's loss to 1e-5 relative; its gradient norm, of 60,000 numbers that were summed otherwise, too."""
    ways = dict(
        plain={},
        rows=dict(max_tokens_per_batch=8192),
        few_bytes=dict(loss_chunk_bytes=3000),
        recomputed=dict(gradient_checkpointing=True),
        online=dict(teacher="online", max_tokens_per_batch=1024, loss_chunk_bytes=10_000),
    )
    found = {
        name: losses(run(name, max_steps=1, train_batch_size=10, alpha=0.7, **flags))[0] for name, flags in ways.items()
    }
    for name, (_, loss, norm) in found.items():
        assert loss == pytest.approx(found["plain"][1], rel=1e-5), name
        assert norm == pytest.approx(found["plain"][2], rel=1e-5), name


@not_interpreted
def test_fault_16_padding_with_a_mask_gives_the_loss_of_packing_without(tiny_model, traces, think):
    """transformers on a padded batch with an attention mask, whole logits and its own cross-entropy, against ours.

    Each trace is cut at three places, which share its tokens in our row and are sequences of their own in theirs.
    """
    cuts = [(0, len(trace.reasoning_ids) // 2, len(trace.reasoning_ids)) for trace in traces]
    examples = [cut_example(trace, 0, cut, think) for trace, places in zip(traces, cuts, strict=True) for cut in places]
    together = [branched_examples(trace, 0, places, think)[0] for trace, places in zip(traces, cuts, strict=True)]
    (batch,) = pack_examples(together, 4096, "cpu")
    assert batch.layout.has_branches
    hidden = packed_hidden_states(tiny_model, batch.input_ids, batch.layout)
    head = tiny_model.get_output_embeddings().weight
    packed = fused_linear_distillation(
        hidden[batch.rows], head, None, None, batch.labels, token_weights=batch.weights, alpha=0.0
    ).loss
    longest = max(len(example.input_ids) for example in examples)
    ids, mask = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(2))
    labels = torch.full((len(examples), longest), IGNORE)
    for number, example in enumerate(examples):
        length = len(example.input_ids)
        ids[number, :length] = torch.tensor(example.input_ids)
        mask[number, :length] = 1
        labels[number, length - len(example.labels) : length] = torch.tensor(example.labels)
    tiny_model.set_attn_implementation("sdpa")
    logits = tiny_model(input_ids=ids, attention_mask=mask).logits
    padded = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)


# 17: memory

PEAK = """
import resource, sys, torch
from trsd_kernels import fused_linear_distillation
torch.set_num_threads(1)
tokens, vocab, hidden = 3072, 32768, 32
def tensors(n):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, hidden, generator=generator) for _ in "st")
    heads = [torch.randn(vocab, hidden, generator=generator) / 6 for _ in "st"]
    return student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], torch.arange(n) % vocab
def call(n):
    for plan in ("tokens", "vocab"):
        fused_linear_distillation(*tensors(n), plan=plan, chunk_bytes=2**23).loss.backward()
call(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(tokens)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * tokens * vocab))
"""


@not_interpreted
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units there")
def test_fault_17_a_process_never_holds_tokens_times_vocabulary():
    """What the process's peak grows by, of the bytes of one fp32 [tokens, vocabulary] tensor: 384 MiB.

    Whole logits take more than four of them. 8 MiB of chunks, the heads' gradients (12 MiB with the fp32 sum) and what
    the allocator keeps take less than a fifth of one.
    """
    assert float(run_python(PEAK)) < 0.2


# 18: leaks


@not_interpreted
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_fault_18_a_packed_sequence_moves_no_bit_of_another_through_the_whole_model(tiny_model, changed):
    layout = packed_layout([9, 14, 5])
    ids = torch.arange(28) * 7 % 600
    other = ids.clone()
    place = layout.sequence(changed)
    other[place] = (other[place] + 11) % 600
    before, after = (packed_hidden_states(tiny_model, row, layout) for row in (ids, other))
    rest = torch.ones(28, dtype=torch.bool)
    rest[place] = False
    assert torch.equal(before[rest], after[rest]) and not torch.equal(before[place], after[place])


@not_interpreted
def test_fault_18_no_gradient_flows_into_another_sequence_or_branch(tiny_model, traces, think):
    """Of the loss of one sequence for the embeddings of every token of the row."""
    examples = [
        *branched_examples(traces[0], 0, [1, 4, len(traces[0].reasoning_ids)], think),
        *branched_examples(traces[1], 1, [0, 2], think),
        full_example(traces[2], 2),
    ]
    (batch,) = pack_examples(examples, 4096, "cpu")
    embeddings = []
    tiny_model.get_input_embeddings().register_forward_hook(lambda _, __, out: embeddings.append(out))
    hidden = packed_hidden_states(tiny_model, batch.input_ids, batch.layout)
    for segment, (start, length, _, _) in enumerate(batch.layout.segments()):
        (gradient,) = torch.autograd.grad(hidden[start : start + length].sum(), embeddings[0], retain_graph=True)
        seen = torch.zeros(batch.num_tokens, dtype=torch.bool)
        seen[batch.layout.sequence(segment)] = True
        assert (gradient[0, ~seen] == 0).all() and (gradient[0, seen].norm(dim=-1) > 0).all()


# 30: odd input

LONGEST = 6 if INTERPRETED else 300
ODD = ("plain", "equal", "large", "huge", "tiny", "impossible for both", "one token possible")
HUGE = 1e30
SLOW_IN_THE_INTERPRETER = settings(
    max_examples=8 if INTERPRETED else 100, suppress_health_check=list(HealthCheck), deadline=None
)


@st.composite
def odd_logits(draw):
    """(student, teacher, labels): fp32 rows of odd numbers, as views of wider tensors; labels name possible tokens."""
    num_tokens, vocab = draw(st.integers(1, LONGEST)), draw(st.integers(1, LONGEST))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = torch.randn(2, num_tokens, vocab, generator=generator)
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    for kind in draw(st.lists(st.sampled_from(ODD), min_size=1, max_size=3)):
        row = draw(st.integers(0, num_tokens - 1))
        label, other = int(labels[row]), int(torch.randint(vocab, (1,), generator=generator))
        for logits in (student, teacher):
            if kind == "equal":
                logits[row] = 3.25
            elif kind == "huge":
                logits[row, label] = HUGE
            elif kind == "large":
                logits[row] *= 1000
            elif kind == "tiny":
                logits[row] *= 1e-30
            elif kind == "impossible for both" and other != label:
                logits[row, other] = -torch.inf
            elif kind == "one token possible":
                logits[row, torch.arange(vocab) != label] = -torch.inf
    labels[torch.rand(num_tokens, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = IGNORE
    return strided(draw, student), strided(draw, teacher), labels


def strided(draw, tensor):
    """``tensor`` as it lies in memory, or among NaNs that are not its own."""
    kind = draw(st.sampled_from(("dense", "wider rows", "every other column", "transposed")))
    if kind == "dense":
        return tensor
    if kind == "transposed":
        return tensor.T.contiguous().T
    step = 2 if kind == "every other column" else 1
    wide = torch.full((tensor.shape[0], step * tensor.shape[1] + 5), torch.nan)
    view = wide[:, 3 : 3 + step * tensor.shape[1] : step]
    view.copy_(tensor)
    return view


def strided_like(tensor, values):
    """``values`` in memory as ``tensor`` lies there."""
    like = torch.empty_strided(tensor.shape, tensor.stride())
    return like.copy_(values)


def assert_within_fp64(got, gradient, student, teacher, labels, options):
    """Each row's loss, and its gradient, whose entries add up to at most 2, to 1e-5 and four roundings of its logits.

    A token of 1e30 is certain, so such rows have nothing to round.
    """
    exact = student.double().requires_grad_()
    expected = exact_token_losses(exact, teacher.double(), labels, **options)
    expected.sum().backward()
    largest = torch.cat([student, teacher], 1).nan_to_num(neginf=0.0).abs().amax(1).double()
    bound = 1e-5 + 4 * torch.finfo(torch.float32).eps * torch.where(largest < HUGE, largest, 0.0)
    same = (got.double() == expected) | ((got - expected).abs() <= bound * (1 + expected.abs()))
    assert same.all(), (got, expected)
    assert ((gradient.double() - exact.grad).abs() <= bound[:, None]).all()


@SLOW_IN_THE_INTERPRETER
@given(
    odd_logits(),
    st.sampled_from(DIVERGENCES),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from((1.0, 2.5)),
    st.booleans(),
)
def test_fault_30_odd_logits_stay_within_the_fp64_bound(case, divergence, alpha, temperature, broken):
    """``broken``: rows that are ignored are NaN."""
    student, teacher, labels = case
    if broken:
        student[labels == IGNORE] = torch.nan
        teacher[labels == IGNORE] = torch.nan
    options = dict(divergence=divergence, alpha=alpha, temperature=temperature)
    leaf = student.detach().requires_grad_()
    with poisoned_memory():
        losses = fused_distillation(leaf, teacher, labels, reduction="none", **options).loss
        losses.sum().backward()
    assert_within_fp64(losses.detach(), leaf.grad, student, teacher, labels, options)


@SLOW_IN_THE_INTERPRETER
@given(
    odd_logits(),
    st.sampled_from(DIVERGENCES),
    st.sampled_from(("tokens", "vocab")),
    st.integers(1, LONGEST),
    st.booleans(),
)
def test_fault_30_odd_sizes_and_strides_of_the_linear_loss_stay_within_the_fp64_bound(
    case, divergence, plan, chunk, strided_labels
):
    """The odd logits as the lm_head of one-hot hidden states, so that products give them back as they are."""
    student, teacher, labels = case
    student, teacher = (strided_like(x, x.nan_to_num(neginf=-1e9)) for x in (student, teacher))  # 0 x inf is NaN
    if strided_labels:
        labels = torch.stack([labels, labels], 1)[:, 0]
    leaf = student.detach().requires_grad_()
    one_hot = torch.eye(student.shape[0])
    options = dict(divergence=divergence, alpha=0.5)
    with poisoned_memory():
        out = fused_linear_distillation(
            one_hot, leaf.T, one_hot, teacher.T, labels, plan=plan, chunk_size=chunk, reduction="sum", **options
        )
        out.loss.backward()
    rows = fused_distillation(student, teacher, labels, reduction="none", **options).loss
    torch.testing.assert_close(out.loss.detach(), rows.sum(), rtol=1e-5, atol=1e-5)
    assert_within_fp64(rows, leaf.grad, student, teacher, labels, options)


@not_interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fault_30_logits_that_are_all_huge_stay_finite(divergence):
    """Beyond 2^24 fp32 has no room for the logarithm of a sum beside its largest term: the values mean little."""
    logits = torch.full((3, 50), HUGE, requires_grad=True)
    out = fused_distillation(logits, logits.detach(), torch.arange(3), divergence=divergence, alpha=0.5)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all()


@not_interpreted
def test_fault_30_the_triton_kernels_pass_the_same_tests():
    from test_interpreted import run_in_the_interpreter

    names = "odd_logits", "odd_sizes_and_strides_of_the_linear_loss"
    tests = (f"test_faults_numerics.py::test_fault_30_{name}_stay_within_the_fp64_bound" for name in names)
    run_in_the_interpreter(*tests)


# 34: threads, hash seeds, order

ONE_RUN = """
import sys, torch
from trsd import train
torch.set_num_threads(int(sys.argv[1]))
train.main(sys.argv[2:])
"""


@not_interpreted
@pytest.mark.parametrize(
    "hash_seed,flags",
    [
        ("1", dict(branches_per_trace=3, anchor_share=0.3)),
        pytest.param("4242", dict(method="sft"), marks=pytest.mark.slow),
    ],
)
def test_fault_34_hash_seeds_and_what_ran_before_change_no_bit(run, words, hash_seed, flags, tmp_path):
    """A fresh process with a hash seed of its own, and this one, which has run other things and drawn numbers."""
    torch.rand(17)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = losses(run("here", max_steps=3, **flags))
    finally:
        torch.set_num_threads(threads)
    run_python(ONE_RUN, 1, *words("fresh", max_steps=3, **flags), PYTHONHASHSEED=hash_seed)
    assert losses(tmp_path / "fresh") == here


@not_interpreted
def test_fault_34_the_number_of_threads_changes_losses_by_rounding_only(run):
    """Sums are split by thread, so bits may differ; three steps at a learning rate of 1e-3 keep 1e-5 relative."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(losses(run(f"threads{threads}", max_steps=3)))
    finally:
        torch.set_num_threads(before)
    one, two = ([loss for _, loss, _ in rows] for rows in found)
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two == pytest.approx(one, rel=1e-5)
