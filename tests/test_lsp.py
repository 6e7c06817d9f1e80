"""LSP: what is kept, which tokens learn, and that the loss is the authors' formula."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model, make_traces
from hypothesis import given
from hypothesis import strategies as st

from trsd.batching import pack_examples
from trsd.methods.lsp import CHOICES, LSP, NO_LABEL, kept_example, learnable, lost_sections
from trsd.models import packed_hidden_states
from trsd.objective import Objective
from trsd.teachers import OnlineTeacher
from trsd.thinking import token_texts
from trsd.traces import Trace
from trsd.truncation import build_truncation, endpoints, fraction

# prompt 10..13, reasoning 20..24, close 30 31, answer 40..42: 14 tokens.
PROMPT, COT, ANSWER = [10, 11, 12, 13], [20, 21, 22, 23, 24, 30, 31], [40, 41, 42]
WHOLE = [*PROMPT, *COT, *ANSWER]
TRACE = Trace(
    id="t",
    question="q",
    gold=None,
    prompt_ids=PROMPT,
    reasoning_ids=COT[:5],
    close_ids=COT[5:],
    answer_ids=ANSWER,
    reasoning="r",
    answer="a",
    closed=True,
    correct=None,
    tokenizer="x",
)
# What each choice learns of the whole sequence; its first token is predicted by nothing.
LEARNT = {
    "a": ANSWER,
    "p+a": [*PROMPT[1:], *ANSWER],
    "cot": COT,
    "cot+a": [*COT, *ANSWER],
    "p+cot": [*PROMPT[1:], *COT],
    "p+cot+a": WHOLE[1:],
}


def learnt(example):
    return example.labels if example else []


def test_the_hand_written_table_covers_the_papers_six_combinations():
    assert set(LEARNT) == set(CHOICES)


@pytest.mark.parametrize("choice", CHOICES)
def test_sections_of_the_whole_sequence_are_the_hand_written_ones(choice):
    example = kept_example(TRACE, 3, ((0, 14),), choice.split("+"))
    assert example.labels == LEARNT[choice] and example.trace_index == 3
    assert [WHOLE[row + 1] for row in example.rows] == example.labels
    assert example.input_ids == WHOLE[: example.rows[-1] + 1]  # nothing behind the last one that learns is run


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kept", range(1, 15))
def test_sections_of_a_cut_sequence_are_what_the_cut_left_of_them(choice, kept):
    """Every length, so also traces cut before the close tag, inside it, and inside the prompt."""
    example = kept_example(TRACE, 0, ((0, kept),), choice.split("+"))
    assert learnt(example) == [token for token in LEARNT[choice] if token in WHOLE[:kept]]


@pytest.mark.parametrize(
    "name,side,kept",
    [
        ("fraction", "left", WHOLE[:7]),
        ("fraction", "right", WHOLE[7:]),
        ("fraction", "middle", WHOLE[3:10]),
        ("endpoints", "left", [*WHOLE[:4], *WHOLE[11:]]),
    ],
)
def test_truncations_keep_the_hand_written_tokens(name, side, kept):
    spans = build_truncation(name, share=0.5, side=side, texts=[])(TRACE)
    assert [token for start, end in spans for token in WHOLE[start:end]] == kept
    example = kept_example(TRACE, 0, spans, ["p", "cot", "a"])
    assert example.input_ids == kept[:-1]


def test_the_token_behind_a_gap_is_not_learnt():
    example = kept_example(TRACE, 0, endpoints(0.5)(TRACE), ["p", "cot", "a"])
    assert example.labels == [11, 12, 13, 41, 42]  # not 40, which stands behind 13 and does not follow it
    assert [example.input_ids[row] for row in example.rows] == [10, 11, 12, 40, 41]


@given(st.floats(0.001, 1.0), st.sampled_from(["left", "middle", "right"]), st.integers(1, 400))
def test_a_fraction_keeps_the_authors_count_of_tokens(share, side, length):
    trace = replace(TRACE, reasoning_ids=[5] * length)
    ((start, end),) = fraction(share, side)(trace)
    whole = trace.num_tokens
    assert end - start == max(1, int(whole * share)) and 0 <= start < end <= whole
    assert {"left": start == 0, "right": end == whole, "middle": abs(start - (whole - end)) <= 1}[side]
    spans = endpoints(share)(trace)
    assert sum(end - start for start, end in spans) == max(1, int(whole * share))
    assert spans[0][0] == 0 and all(start < end for start, end in spans)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1])
def test_a_fraction_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="keep_fraction"):
        fraction(share)


def test_first_derivation_keeps_the_prompt_and_the_reasoning_up_to_it(tokenizer, traces):
    truncation = build_truncation("first_derivation", share=1.0, side="left", texts=token_texts(tokenizer, 640))
    trace = traces[1]
    ((start, end),) = truncation(trace)
    shown = tokenizer.decode(trace.reasoning_ids[: end - len(trace.prompt_ids)])
    assert start == 0 and shown.endswith(f"={trace.gold}") and len(shown) < len(trace.reasoning)
    assert truncation(replace(trace, gold="12345")) == ((0, trace.num_tokens),)


def test_a_forced_close_is_not_learnt():
    example = kept_example(replace(TRACE, closed=False), 0, ((0, 14),), ["cot", "a"])
    assert example.labels == [20, 21, 22, 23, 24, 40, 41, 42]


def test_sections_that_the_cut_removed_are_counted_and_traces_with_nothing_left_are_dropped():
    short = replace(TRACE, answer_ids=[40] * 14)  # at one half its answer begins to show
    kept, dropped, lost = learnable([TRACE, short, TRACE], fraction(0.5), ["a"])
    assert kept == [short] and dropped == Counter({NO_LABEL: 2}) and lost == Counter(a=2)
    kept, dropped, lost = learnable([TRACE, short, TRACE], fraction(0.5), ["p", "a"])
    assert len(kept) == 3 and not dropped and lost == Counter(a=2)
    assert lost_sections(TRACE, fraction(0.5, "right")(TRACE), ["p", "cot", "a"]) == ["p"]


def test_every_epoch_has_the_same_examples_and_the_teacher_runs_the_same_tokens(traces):
    method = LSP(traces, fraction(0.6), ["p", "cot", "a"])
    assert method.examples([(0, 2), (5, 2)]) == [method.teacher_example(2)] * 2


def authors_loss(teacher, student, trace, kept, choice, *, alpha, temperature):
    """(1 - alpha) CE - alpha T^2 sum p log q by the masked mean, and the teacher's entropy term; plain models."""
    ids = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
    close = len(trace.prompt_ids) + len(trace.reasoning_ids) + len(trace.close_ids)
    section = ["p"] * len(trace.prompt_ids) + ["cot"] * (close - len(trace.prompt_ids)) + ["a"] * len(trace.answer_ids)
    chosen = choice.split("+")
    mask = torch.tensor([name in chosen for name in section[1:kept]]).double()
    input_ids = torch.tensor([ids[:kept]])
    z, y = (model(input_ids).logits[0, :-1] for model in (student, teacher))
    cross_entropy = torch.nn.functional.cross_entropy(z, input_ids[0, 1:], reduction="none")
    p, log_q = (y / temperature).softmax(-1), (z / temperature).log_softmax(-1)
    soft = -(p * log_q).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    loss = (mask * ((1 - alpha) * cross_entropy + alpha * temperature**2 * soft)).sum() / mask.sum()
    return loss, alpha * temperature**2 * (mask * entropy).sum() / mask.sum(), int(mask.sum())


def plain(model):
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("choice", ["p+cot+a", "cot"])
def test_loss_and_gradient_are_the_authors_formula_in_float64(tokenizer, think, alpha, temperature, choice):
    trace = max(make_traces(tokenizer, think, 5), key=lambda t: t.num_tokens)
    kept = int(0.7 * trace.num_tokens)
    models = [make_tiny_model(tokenizer, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    theirs, entropy, count = authors_loss(
        *map(plain, models), trace, kept, choice, alpha=alpha, temperature=temperature
    )
    wanted = torch.autograd.grad(theirs, list(models[1].parameters()))

    teacher, student = (make_tiny_model(tokenizer, seed=seed, dtype=torch.float64) for seed in (0, 1))
    method = LSP([trace], fraction(0.7), choice.split("+"))
    online = OnlineTeacher(teacher, [method.teacher_example(0)], max_tokens_per_batch=4096)
    objective = Objective(vocab_size=10**6, chunk_bytes=None, alpha=alpha, temperature=temperature)
    (batch,) = pack_examples(method.examples([(0, 0)]), 4096, "cpu")
    assert batch.num_items == count
    loss = objective(
        packed_hidden_states(student, batch.input_ids, batch.layout)[batch.rows],
        student.get_output_embeddings().weight,
        online.targets(batch.trace_indices) if alpha else None,
        batch.labels,
        token_weights=batch.weights,
        num_items_in_batch=batch.num_items,
    ).loss
    # The models' norms run in fp32 in any case.
    torch.testing.assert_close(loss, theirs - entropy, rtol=1e-6, atol=1e-7)
    for mine, their in zip(torch.autograd.grad(loss, list(student.parameters())), wanted, strict=True):
        assert (mine - their).norm() <= 1e-6 * their.norm() + 1e-9


def test_a_cut_token_changes_nothing(tokenizer, think, tiny_model):
    """What the cut removed never enters: another end of the trace gives the same example, bit for bit."""
    trace = max(make_traces(tokenizer, think, 5), key=lambda t: t.num_tokens)
    other = replace(trace, answer_ids=[9] * len(trace.answer_ids))
    spans = fraction(0.6)(trace)
    assert spans[0][1] < trace.num_tokens - len(trace.answer_ids)
    assert kept_example(trace, 0, spans, ["p", "cot"]) == kept_example(other, 0, spans, ["p", "cot"])
