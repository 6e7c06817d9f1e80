"""TRSD itself: what the student sees, what it learns, and that packing changes neither."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model, make_traces

from trsd.batching import pack_examples
from trsd.cuts import uniform, with_anchor
from trsd.methods.trsd import TRSD, branched_examples, cut_example, full_example, with_thinking
from trsd.models import packed_hidden_states
from trsd.sentences import sentence_token_ends
from trsd.teachers import OnlineTeacher
from trsd.thinking import ThinkFormat, token_texts
from trsd_kernels import fused_linear_distillation


def whole(traces):
    """What the teacher runs."""
    return [full_example(trace, index) for index, trace in enumerate(traces)]


def loss_of(model, teacher, batches, *, num_items, **options):
    """Sum of the packed rows' losses, as the trainer computes it."""
    head = model.get_output_embeddings().weight
    losses = [
        fused_linear_distillation(
            packed_hidden_states(model, batch.input_ids, batch.layout)[batch.rows],
            head,
            *teacher.targets(batch.trace_indices),
            batch.labels,
            token_weights=batch.weights,
            num_items_in_batch=num_items,
            **options,
        ).loss
        for batch in batches
    ]
    return sum(losses)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_cut_example_is_prompt_cut_closer_answer(traces, think, tokenizer):
    trace = max(traces, key=lambda t: len(t.reasoning_ids))
    example = cut_example(trace, 3, 4, think)
    expected = [*trace.prompt_ids, *trace.reasoning_ids[:4], *think.closer_ids, *trace.answer_ids]
    assert example.input_ids == expected[:-1] and example.labels == trace.answer_ids
    first = len(example.input_ids) - len(example.labels)
    assert example.input_ids[first] == think.closer_ids[-1]  # the last closer token predicts y_1
    assert example.labels[-1] == tokenizer.eos_token_id


def test_a_cut_at_the_end_keeps_the_traces_own_close(traces, tokenizer):
    trace = replace(traces[0], close_ids=[9, 9, 9])
    think = ThinkFormat.of(tokenizer, closer="anytime")
    assert cut_example(trace, 0, len(trace.reasoning_ids), think) == full_example(trace, 0)
    assert full_example(trace, 0).input_ids[-len(trace.answer_ids) - 2 : -len(trace.answer_ids) + 1] == [9, 9, 9]


@pytest.mark.parametrize("cut", [-1, 10**6])
def test_a_cut_outside_the_trace_is_refused(traces, think, cut):
    with pytest.raises(ValueError, match="outside"):
        cut_example(traces[0], 0, cut, think)


def test_cuts_are_drawn_anew_every_epoch_and_repeat_with_the_seed(traces, think):
    trace = max(range(len(traces)), key=lambda i: len(traces[i].reasoning_ids))
    method = TRSD(traces, think, uniform, seed=5)
    (cuts,) = zip(*(method.cuts(epoch, trace) for epoch in range(20)), strict=True)
    assert len(set(cuts)) > 5
    again = TRSD(traces, think, uniform, seed=5)
    assert list(cuts) == [again.cuts(epoch, trace)[0] for epoch in range(20)]


def test_thinking_labels_are_the_reasoning_shown_each_at_the_position_before_it(traces, think):
    method = TRSD(traces, think, with_anchor(uniform, 0.4), seed=1, keep_thinking=True)
    members = [(epoch, index) for epoch in range(5) for index in range(len(traces))]
    kinds = set()
    for (epoch, index), example in zip(members, method.examples(members), strict=True):
        trace, (cut,) = traces[index], method.cuts(epoch, index)
        whole = cut == len(trace.reasoning_ids)
        kinds.add(whole)
        shown = [*trace.reasoning_ids, *trace.close_ids] if whole else trace.reasoning_ids[:cut]
        assert example.thinking_labels == shown
        first = example.thinking_start
        assert example.input_ids[first + 1 : first + 1 + len(shown)] == shown
        assert example.input_ids[: first + 1] == trace.prompt_ids
        (batch,) = pack_examples([full_example(trace, 0), example], 4096, "cpu")
        later = batch.input_ids[batch.thinking_rows + 1]
        assert later.tolist() == batch.thinking_labels.tolist() == shown
    assert kinds == {True, False}


def test_a_forced_close_is_not_learnt(traces, think):
    forced = [replace(trace, closed=False) for trace in traces]
    method = TRSD(forced, think, with_anchor(uniform, 1.0), seed=1, keep_thinking=True)
    for index, example in enumerate(method.examples([(0, i) for i in range(len(forced))])):
        assert example.thinking_labels == forced[index].reasoning_ids


def test_without_keep_thinking_only_answers_are_learnt(traces, think):
    method = TRSD(traces, think, with_anchor(uniform, 0.5), seed=1)
    assert all(not example.thinking_labels for example in method.examples([(0, i) for i in range(len(traces))]))


def test_snapped_cuts_end_at_sentences(traces, think, tokenizer):
    texts = token_texts(tokenizer, len(tokenizer))
    method = TRSD(traces, think, uniform, seed=0, snap_texts=texts)
    plain = TRSD(traces, think, uniform, seed=0)
    snapped = set()
    for index, trace in enumerate(traces):
        ends = [0, *sentence_token_ends(trace.reasoning_ids, texts)]
        for epoch in range(10):
            (cut,), (free,) = method.cuts(epoch, index), plain.cuts(epoch, index)
            assert cut == max(end for end in ends if end <= free)
            snapped.add(cut < free)
    assert snapped == {True, False}


def test_a_cut_trace_never_leaks_a_later_token(traces, think, tiny_model):
    trace = max(traces, key=lambda t: len(t.reasoning_ids))
    cut = len(trace.reasoning_ids) // 2
    other_tail = replace(trace, reasoning_ids=[*trace.reasoning_ids[:cut], *[7] * 11], close_ids=[7, 7])
    examples = [cut_example(t, 0, cut, think) for t in (trace, other_tail)]
    assert examples[0] == examples[1]
    # and inside a packed row: another sequence's tokens leave this one's hidden states bit-identical
    neighbours = [full_example(t, 1) for t in (trace, replace(other_tail, reasoning_ids=trace.reasoning_ids[::-1]))]
    neighbours[1] = replace(neighbours[1], input_ids=neighbours[1].input_ids[: len(neighbours[0].input_ids) - 1] + [8])
    hidden = []
    for neighbour in neighbours:
        (batch,) = pack_examples([examples[0], neighbour], 4096, "cpu")
        states = packed_hidden_states(tiny_model, batch.input_ids, batch.layout)
        hidden.append(states[: len(examples[0].input_ids)])
    assert torch.equal(*hidden)


@pytest.mark.parametrize("options", [dict(alpha=1.0), dict(alpha=0.5, divergence="jsd", temperature=2.0)])
def test_packed_gradient_equals_the_sum_over_separate_sequences_in_float64(tokenizer, think, options):
    traces = make_traces(tokenizer, think, 6)
    teacher_model, student = (make_tiny_model(tokenizer, seed=seed, dtype=torch.float64) for seed in (0, 1))
    teacher = OnlineTeacher(teacher_model, whole(traces), max_tokens_per_batch=4096)
    rng = random.Random(0)
    examples = [cut_example(t, i, rng.randint(0, len(t.reasoning_ids)), think) for i, t in enumerate(traces)]
    num_items = sum(len(example.labels) for example in examples)
    longest = max(len(example.input_ids) for example in examples)

    separate = loss_of(student, teacher, pack_examples(examples, longest, "cpu"), num_items=num_items, **options)
    one_by_one = sum(
        loss_of(student, teacher, pack_examples([example], 4096, "cpu"), num_items=num_items, **options)
        for example in examples
    )
    packed = pack_examples(examples, 4096, "cpu")
    assert len(packed) == 1
    together = loss_of(student, teacher, packed, num_items=num_items, **options)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(separate, one_by_one, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(student, together), gradients(student, one_by_one), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_loss_equals_equation_one_written_out_in_float64(tokenizer, think):
    """Plain Hugging Face logits of each whole sequence, answer positions picked by hand."""
    traces = make_traces(tokenizer, think, 4)
    teacher_model, student = (make_tiny_model(tokenizer, seed=seed, dtype=torch.float64) for seed in (0, 1))
    teacher = OnlineTeacher(teacher_model, whole(traces), max_tokens_per_batch=4096)
    cuts = [len(trace.reasoning_ids) // 2 for trace in traces]
    examples = [cut_example(t, i, c, think) for i, (t, c) in enumerate(zip(traces, cuts, strict=True))]
    num_items = sum(len(trace.answer_ids) for trace in traces)
    ours = loss_of(student, teacher, pack_examples(examples, 4096, "cpu"), num_items=num_items, alpha=1.0)

    plain_teacher, plain_student = (make_tiny_model(tokenizer, seed=seed, dtype=torch.float64) for seed in (0, 1))
    total = 0.0
    for model in (plain_teacher, plain_student):
        model.set_attn_implementation("sdpa")  # eager rounds its softmax to fp32
    for trace, cut in zip(traces, cuts, strict=True):
        n = len(trace.answer_ids)
        full = trace.prompt_ids + trace.reasoning_ids + trace.close_ids + trace.answer_ids
        short = trace.prompt_ids + trace.reasoning_ids[:cut] + list(think.closer_ids) + trace.answer_ids
        log_p = plain_teacher(torch.tensor([full])).logits[0, -n - 1 : -1].log_softmax(-1)
        log_q = plain_student(torch.tensor([short])).logits[0, -n - 1 : -1].log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(ours, total / num_items, rtol=1e-9, atol=1e-12)


def test_full_traces_give_zero_loss_to_a_student_that_is_the_teacher(traces, tiny_model, tokenizer):
    teacher = OnlineTeacher(make_tiny_model(tokenizer), whole(traces), max_tokens_per_batch=4096)
    examples = [full_example(trace, index) for index, trace in enumerate(traces)]
    loss = loss_of(tiny_model, teacher, pack_examples(examples, 512, "cpu"), num_items=1, alpha=1.0)
    assert abs(loss.item()) < 1e-4


# Several cuts of one trace in one step.


def test_branches_hold_what_the_separate_examples_hold(traces, think):
    trace = max(traces, key=lambda t: len(t.reasoning_ids))
    length, start = len(trace.reasoning_ids), len(trace.prompt_ids)
    (example,) = branched_examples(trace, 3, [4, length, 0, 4, 9], think)
    assert example.input_ids == full_example(trace, 3).input_ids and example.count == 1
    assert [(branch.cut - start, branch.count) for branch in example.branches] == [(0, 1), (4, 2), (9, 1)]
    for branch in example.branches:
        alone = cut_example(trace, 3, branch.cut - start, think)
        assert [*example.input_ids[: branch.cut], *branch.input_ids] == alone.input_ids
        assert branch.labels == alone.labels == trace.answer_ids
    assert example.num_tokens < sum(len(cut_example(trace, 3, cut, think).input_ids) for cut in (4, length, 0, 9))


def test_branches_that_do_not_fit_become_examples_of_their_own(traces, think):
    trace = max(traces, key=lambda t: len(t.reasoning_ids))
    length = len(trace.reasoning_ids)
    cuts = [0, 1, 3, 7, 12, length]
    together = branched_examples(trace, 0, cuts, think)[0].num_tokens
    limit = len(full_example(trace, 0).input_ids) + 30
    assert together > limit
    examples = branched_examples(trace, 0, cuts, think, max_tokens=limit)
    assert len(examples) > 1 and all(example.num_tokens <= limit for example in examples)
    sequences = [e.input_ids for e in examples]
    sequences += [[*e.input_ids[: b.cut], *b.input_ids] for e in examples for b in e.branches]
    assert sorted(sequences) == sorted(cut_example(trace, 0, cut, think).input_ids for cut in cuts)


def test_the_first_of_several_cuts_is_the_only_one_of_one(traces, think):
    one, three = (TRSD(traces, think, uniform, seed=2, branches_per_trace=count) for count in (1, 3))
    for index in range(len(traces)):
        assert three.cuts(1, index)[:1] == one.cuts(1, index)
        assert len(three.cuts(1, index)) == 3


@pytest.mark.parametrize("seed", range(4))
def test_branches_give_the_loss_and_gradients_of_separate_sequences(tokenizer, think, seed):
    """Random numbers of cuts, at the ends too; several traces in a row; both terms of the loss; float64 and fp32."""
    rng = random.Random(seed)
    traces = make_traces(tokenizer, think, 4, seed=seed)
    cuts = []
    for trace in traces:
        length = len(trace.reasoning_ids)
        cuts.append([rng.choice([0, length, rng.randint(0, length)]) for _ in range(rng.randint(1, 6))])
    separate = [
        with_thinking(cut_example(trace, index, cut, think), trace, cut)
        for index, (trace, places) in enumerate(zip(traces, cuts, strict=True))
        for cut in places
    ]
    branched = [e for i, t in enumerate(traces) for e in branched_examples(t, i, cuts[i], think, max_tokens=700)]
    batches = {"separate": pack_examples(separate, 700, "cpu"), "branched": pack_examples(branched, 700, "cpu")}
    assert sum(b.num_tokens for b in batches["branched"]) < sum(b.num_tokens for b in batches["separate"])
    totals = {name: (sum(b.num_items for b in bs), sum(b.num_thinking for b in bs)) for name, bs in batches.items()}
    assert totals["separate"] == totals["branched"]
    num_items, num_thinking = totals["separate"]

    def loss_and_gradients(dtype, batches):
        teacher_model, student = (make_tiny_model(tokenizer, seed=s, dtype=dtype) for s in (0, 1))
        teacher = OnlineTeacher(teacher_model, whole(traces), max_tokens_per_batch=4096)
        loss = loss_of(student, teacher, batches, num_items=num_items, alpha=0.7)
        head = student.get_output_embeddings().weight
        for batch in batches:
            hidden = packed_hidden_states(student, batch.input_ids, batch.layout)[batch.thinking_rows]
            loss = (
                loss
                + fused_linear_distillation(
                    *(hidden, head, None, None, batch.thinking_labels),
                    alpha=0.0,
                    token_weights=batch.thinking_weights,
                    num_items_in_batch=num_thinking,
                ).loss
            )
        return loss.detach(), gradients(student, loss)

    exact_loss, exact = loss_and_gradients(torch.float64, batches["separate"])
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):  # the model's norms are fp32 in any case
        loss, found = loss_and_gradients(dtype, batches["branched"])
        assert abs(loss - exact_loss) <= bound * abs(exact_loss)
        for a, b in zip(found, exact, strict=True):
            assert (a.double() - b).norm() <= bound * b.norm()
