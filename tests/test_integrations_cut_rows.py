"""Cuts as a data transform: rows that hold what the packed examples hold, and a collator that keeps them aligned."""

from collections import Counter

import pytest
import torch

from trsd.batching import pack_examples
from trsd.cuts import fractions, uniform
from trsd.errors import InputError
from trsd.integrations.cut_rows import IGNORE, CutRowCollator, cut_rows
from trsd.methods.lsp import LSP
from trsd.methods.trsd import TRSD
from trsd.truncation import endpoints, fraction


@pytest.fixture
def branched(traces, think):
    return TRSD(traces, think, uniform, seed=3, branches_per_trace=3, keep_thinking=True)


def learnt(row, name="labels"):
    return [label for label in row[name] if label != IGNORE]


def test_every_cut_is_a_row_of_prompt_shown_reasoning_closer_and_answer(traces, think, branched):
    rows = cut_rows(branched)
    assert len(rows) == 3 * len(traces)
    wanted = Counter()
    for index, trace in enumerate(traces):
        for cut in branched.cuts(0, index):
            close = trace.close_ids if cut == len(trace.reasoning_ids) else think.closer_ids
            wanted[(*trace.prompt_ids, *trace.reasoning_ids[:cut], *close, *trace.answer_ids)] += 1
    assert Counter(tuple(row["input_ids"]) for row in rows) == wanted


def test_labels_are_unshifted_and_the_answer_alone(traces, branched):
    for row, trace in zip(cut_rows(branched), [trace for trace in traces for _ in range(3)], strict=True):
        start = len(row["labels"]) - len(trace.answer_ids)
        assert row["labels"] == [IGNORE] * start + trace.answer_ids
        assert row["input_ids"][start:] == trace.answer_ids


def test_the_teacher_sees_the_whole_trace_and_has_the_same_labels(traces, branched):
    for row, trace in zip(cut_rows(branched), [trace for trace in traces for _ in range(3)], strict=True):
        whole = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
        assert row["teacher_input_ids"] == whole
        assert row["teacher_labels"] == [IGNORE] * (len(whole) - len(trace.answer_ids)) + trace.answer_ids


@pytest.mark.parametrize("choices", [(0.4, 0.4), (0.0, 0.3, 1.0), (1.0, 1.0)])
def test_rows_learn_as_often_what_packed_branches_learn(traces, think, choices):
    method = TRSD(traces, think, fractions(choices), seed=0, branches_per_trace=4, keep_thinking=True)
    (batch,) = pack_examples(method.examples([(0, index) for index in range(len(traces))]), 10**6, "cpu")
    rows = cut_rows(method)
    assert sum(len(learnt(row)) for row in rows) == batch.num_items
    assert sum(len(learnt(row, "thinking_labels")) for row in rows) == batch.num_thinking
    for name, labels, weights in (
        ("labels", batch.labels, batch.weights),
        ("thinking_labels", batch.thinking_labels, batch.thinking_weights),
    ):
        packed = Counter()
        for label, weight in zip(labels.tolist(), weights.tolist(), strict=True):
            packed[label] += weight
        assert Counter(label for row in rows for label in learnt(row, name)) == packed


def test_thinking_labels_are_the_reasoning_shown(traces, think):
    method = TRSD(traces, think, fractions([0.5]), seed=0, keep_thinking=True)
    for row, trace in zip(cut_rows(method), traces, strict=True):
        cut = len(trace.reasoning_ids) // 2
        assert learnt(row, "thinking_labels") == trace.reasoning_ids[:cut]
        first = len(trace.prompt_ids)
        assert row["thinking_labels"][first : first + cut] == trace.reasoning_ids[:cut]


def test_without_thinking_there_is_no_such_column(traces, think):
    assert "thinking_labels" not in cut_rows(TRSD(traces, think, uniform, seed=0))[0]


def test_rows_without_shown_reasoning_have_the_column_that_others_have(traces, think):
    rows = cut_rows(TRSD(traces, think, fractions([0.0, 1.0]), seed=0, branches_per_trace=4, keep_thinking=True))
    assert {frozenset(row) for row in rows} == {frozenset(rows[0])} and "thinking_labels" in rows[0]
    assert any(not learnt(row, "thinking_labels") for row in rows)


@pytest.mark.parametrize("truncation", [fraction(0.6), fraction(0.5, "middle"), endpoints(0.7)])
def test_lsp_rows_are_the_kept_tokens_for_student_and_teacher_alike(traces, truncation):
    method = LSP(traces, truncation, ("p", "cot", "a"))
    for index, row in enumerate(cut_rows(method)):
        example = method.example(index)
        assert row["input_ids"][:-1] == example.input_ids and learnt(row) == example.labels
        assert [place - 1 for place, label in enumerate(row["labels"]) if label != IGNORE] == list(example.rows)
        assert row["teacher_input_ids"] == row["input_ids"] and row["teacher_labels"] == row["labels"]


def test_an_epoch_has_its_own_cuts_and_always_the_same(branched):
    assert cut_rows(branched, epoch=1) == cut_rows(branched, epoch=1) != cut_rows(branched)


def test_chosen_traces_alone_make_rows(branched):
    assert cut_rows(branched, trace_indices=[4, 1]) == cut_rows(branched)[12:15] + cut_rows(branched)[3:6]


def test_rows_survive_a_data_set(branched):
    datasets = pytest.importorskip("datasets")
    rows = cut_rows(branched)
    assert datasets.Dataset.from_list(rows).to_list() == rows


def test_padding_is_masked_and_not_learnt(branched):
    rows = cut_rows(branched)[:7]
    batch = CutRowCollator(pad_token_id=5, pad_to_multiple_of=16)(rows)
    for who in ("", "teacher_"):
        ids, mask = batch[f"{who}input_ids"], batch[f"{who}attention_mask"]
        assert ids.shape == mask.shape == batch[f"{who}labels"].shape and ids.shape[1] % 16 == 0
        assert [ids[i, : mask[i].sum()].tolist() for i in range(7)] == [row[f"{who}input_ids"] for row in rows]
        assert (ids[mask == 0] == 5).all() and (batch[f"{who}labels"][mask == 0] == IGNORE).all()
    assert batch["thinking_labels"].shape == batch["input_ids"].shape


def test_labels_of_a_batch_stand_in_one_order_for_student_and_teacher(branched):
    batch = CutRowCollator()(cut_rows(branched))
    student, teacher = (batch[name][batch[name] != IGNORE] for name in ("labels", "teacher_labels"))
    assert torch.equal(student, teacher)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda row: {"labels": row["labels"][:20], "input_ids": row["input_ids"][:20]}, "row 1 .* no label to learn"),
        (lambda row: {"labels": row["labels"][:-1], "input_ids": row["input_ids"][:-1]}, "row 1 .*student learns"),
        (lambda row: {"labels": row["labels"][:-1]}, "row 1 .* labels for"),
        (lambda row: {"teacher_labels": row["teacher_labels"][1:]}, "row 1 .* teacher_labels for"),
        (lambda row: {"thinking_labels": [IGNORE]}, "row 1 .* thinking_labels for"),
    ],
)
def test_a_row_that_was_cut_is_refused_by_its_number(traces, think, change, message):
    rows = cut_rows(TRSD(traces, think, uniform, seed=0))
    with pytest.raises(InputError, match=message + ".*was it cut"):
        CutRowCollator()([rows[0], rows[1] | change(rows[1])])


def test_dropped_columns_are_refused_with_what_keeps_them(branched):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in cut_rows(branched)]
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        CutRowCollator()(rows)


def test_a_row_longer_than_asked_for_is_refused(branched):
    rows = cut_rows(branched)
    longest = max(len(row["teacher_input_ids"]) for row in rows)
    CutRowCollator(max_length=longest)(rows)
    with pytest.raises(InputError, match=f"{longest} tokens.*max_length"):
        CutRowCollator(max_length=longest - 1)(rows)


def test_rows_of_all_epochs_have_the_same_columns(traces, think):
    """Of two traces that are cut to nothing or not at all, some epochs show no reasoning."""
    method = TRSD(traces[:2], think, fractions([0.0, 1.0]), seed=0, keep_thinking=True)
    epochs = [cut_rows(method, epoch=epoch) for epoch in range(20)]
    assert any(not any(learnt(row, "thinking_labels") for row in rows) for rows in epochs)
    assert len({frozenset(row) for rows in epochs for row in rows}) == 1


@pytest.mark.parametrize("first", ["with", "without"])
def test_rows_with_and_without_shown_reasoning_may_stand_in_one_batch(branched, first):
    """As where data of two methods are mixed."""
    row = next(row for row in cut_rows(branched) if learnt(row, "thinking_labels"))
    without = {name: column for name, column in row.items() if name != "thinking_labels"}
    found = CutRowCollator()([row, without] if first == "with" else [without, row])["thinking_labels"]
    kept, none = found if first == "with" else found.flip(0)
    assert kept.tolist() == row["thinking_labels"] and (none == IGNORE).all()


def test_a_first_token_that_is_a_label_is_none_for_nothing_predicts_it(branched):
    row = cut_rows(branched)[0]
    labels = [row["input_ids"][0], *[IGNORE] * (len(row["labels"]) - 1)]
    with pytest.raises(InputError, match="row 0 .* no label to learn"):
        CutRowCollator()([row | {"labels": labels, "teacher_labels": labels + row["teacher_labels"][len(labels) :]}])
