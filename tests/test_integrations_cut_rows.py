"""Cuts and branches as rows for other trainers."""

import pytest
import torch
from conftest import make_traces
from integration_cases import batch_of, trsd_method, trsd_rows

from trsd.integrations.cut_rows import cut_rows
from trsd.methods.lsp import LSP
from trsd.truncation import fraction


def learnt(row, who=""):
    return [label for label in row[f"{who}labels"] if label != -100]


def test_rows_are_the_cuts_of_the_method_with_their_labels_in_place(tokenizer, think):
    method = trsd_method(tokenizer, think, branches=3)
    rows = trsd_rows(tokenizer, think, branches=3)
    assert len(rows) == 3 * len(method.traces)
    for index, trace in enumerate(method.traces):
        expected = []
        for cut in method.cuts(0, index):
            whole = cut == len(trace.reasoning_ids)
            close = trace.close_ids if whole else think.closer_ids
            expected.append([*trace.prompt_ids, *trace.reasoning_ids[:cut], *close, *trace.answer_ids])
        mine = rows[3 * index : 3 * index + 3]
        assert sorted(row["input_ids"] for row in mine) == sorted(expected)
        for row in mine:
            assert len(row["labels"]) == len(row["input_ids"])
            places = [place for place, label in enumerate(row["labels"]) if label != -100]
            assert [row["input_ids"][place] for place in places] == learnt(row) == trace.answer_ids
            assert row["teacher_input_ids"] == [
                *trace.prompt_ids,
                *trace.reasoning_ids,
                *trace.close_ids,
                *trace.answer_ids,
            ]
            assert learnt(row, "teacher_") == learnt(row)


def test_another_epoch_has_other_cuts(tokenizer, think):
    method = trsd_method(tokenizer, think)
    assert list(cut_rows(method, epoch=0)) == list(cut_rows(method, epoch=0)) != list(cut_rows(method, epoch=1))


def test_rows_of_lsp_hold_the_kept_half_and_no_teachers_columns(tokenizer, think):
    traces = make_traces(tokenizer, think, 3)
    method = LSP(traces, fraction(0.5), ("p", "cot", "a"))
    for trace, row in zip(traces, cut_rows(method), strict=True):
        whole = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
        assert row.keys() == {"input_ids", "labels"}
        assert row["input_ids"] == whole[: len(row["input_ids"])] and len(row["input_ids"]) == len(whole) // 2
        assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_batch_pads_student_and_teacher_each_to_its_longest(tokenizer, think):
    rows = trsd_rows(tokenizer, think)
    batch = batch_of(tokenizer, rows)
    for who in ("", "teacher_"):
        lengths = [len(row[f"{who}input_ids"]) for row in rows]
        assert batch[f"{who}input_ids"].shape == (len(rows), max(lengths))
        assert batch[f"{who}attention_mask"].sum(1).tolist() == lengths
        for index, row in enumerate(rows):
            assert batch[f"{who}input_ids"][index, : lengths[index]].tolist() == row[f"{who}input_ids"]
            assert (batch[f"{who}labels"][index, lengths[index] :] == -100).all()
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_become_a_hugging_face_data_set(tokenizer, think):
    datasets = pytest.importorskip("datasets")
    rows = trsd_rows(tokenizer, think)
    assert datasets.Dataset.from_list(rows).to_list() == rows
