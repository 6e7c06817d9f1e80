"""Traces held out: never learnt from, their loss right, the same on ranks and after a resume, and the best kept."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import losses, make_traces, refusal
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from trsd import training
from trsd.batching import Example, TraceStream
from trsd.checkpoint_folders import checkpoints
from trsd.compiled_layers import CompiledLayers
from trsd.cuts import build_policy
from trsd.loop import Loop
from trsd.methods.trsd import TRSD
from trsd.metrics import read_metrics
from trsd.objective import Objective
from trsd.parallel import shard_student
from trsd.recipe import Recipe
from trsd.report import write_report
from trsd.student_loss import StudentLoss
from trsd.traces import write_traces
from trsd.validation import held_out_traces, validation_loss
from trsd.working_weights import WorkingWeights
from trsd_kernels.reference import distillation_rows

FLAGS = dict(validation_samples=3, save_steps=2)
HELD_OUT = held_out_traces(Recipe(validation_samples=3), 10)


def validation_losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_traces_held_out_never_come_and_the_others_once_an_epoch():
    stream = TraceStream(10, batch_size=4, seed=3, held_out=HELD_OUT)
    members = [member for step in range(7) for member in stream.step(step)]
    learnt = sorted(set(range(10)) - set(HELD_OUT))
    assert sorted(members) == [(epoch, index) for epoch in range(4) for index in learnt]


def test_which_traces_are_held_out_is_the_seeds_choice_alone():
    assert len(set(HELD_OUT)) == 3 and set(HELD_OUT) < set(range(10))
    assert held_out_traces(Recipe(validation_samples=3), 10) == HELD_OUT
    assert any(held_out_traces(Recipe(validation_samples=3, seed=seed), 10) != HELD_OUT for seed in (1, 2, 3))
    assert held_out_traces(Recipe(), 10) == ()


def test_what_is_held_out_changes_the_validation_loss_and_no_training_loss(run, trace_file, tokenizer, think):
    one = run("one", **FLAGS)
    given, others = make_traces(tokenizer, think, 10), make_traces(tokenizer, think, 10, seed=5)
    write_traces(trace_file, [others[i] if i in HELD_OUT else trace for i, trace in enumerate(given)])
    other = run("other", **FLAGS)
    assert losses(one) == losses(other)
    assert validation_losses(one).keys() == validation_losses(other).keys() == {2, 4, 6}
    assert all(validation_losses(one)[step] != validation_losses(other)[step] for step in (2, 4, 6))


@pytest.mark.parametrize("flags", [{}, dict(bf16=True, teacher="online", gradient_checkpointing=True)])
def test_measuring_changes_no_bit_of_training(run, flags):
    often, seldom = run("often", **FLAGS | flags | dict(save_steps=1)), run("seldom", **flags, validation_samples=3)
    assert losses(often) == losses(seldom)
    assert len(validation_losses(often)) == 6 and validation_losses(seldom).keys() == {6}
    assert validation_losses(often)[6] == validation_losses(seldom)[6]


def test_in_bf16_it_is_that_of_the_newest_weights(run):
    exact, rounded = (validation_losses(run(f"{bf16}", bf16=bf16, **FLAGS, max_steps=2)) for bf16 in (False, True))
    assert exact != rounded and rounded == pytest.approx(exact, rel=4e-3)  # 2e-3 measured; a step before: 2.5e-2


def test_it_is_measured_without_dropout_gradients_or_random_numbers(run, monkeypatch):
    true, seen = StudentLoss.forward, []

    def forward(self, *arguments):
        before = torch.get_rng_state()
        found = true(self, *arguments)
        if not found[0].is_meta:  # as the step is whose memory the report counts
            seen.append((self.model.training, found[0].requires_grad, torch.equal(before, torch.get_rng_state())))
        return found

    monkeypatch.setattr(StudentLoss, "forward", forward)
    run(max_steps=2, validation_samples=3, save_steps=1)
    assert seen == [(True, True, True), (False, False, True)] * 2


def expected_loss(folder, teacher, tokenizer, think, *, alpha, branches):
    """Of the model in ``folder`` on the traces held out, from whole logits, every sequence by itself."""
    traces = make_traces(tokenizer, think, 10)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    policy = build_policy("uniform", cut_fractions=(), cut_budgets=(), texts=(), judged_cuts={}, anchor=0.2)
    method = TRSD(traces, think, policy, seed=0, branches_per_trace=branches)
    learnt, shown = [], []

    def logits_of(model, context, answer):
        ids = torch.tensor([[*context, *answer]])
        return model(input_ids=ids, use_cache=False).logits[0, :-1]

    for index in HELD_OUT:
        trace = traces[index]
        whole = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids]
        labels, num = torch.tensor(trace.answer_ids), len(trace.answer_ids)
        for cut in method.cuts(0, index):
            is_whole = cut == len(trace.reasoning_ids)
            context = whole if is_whole else [*trace.prompt_ids, *trace.reasoning_ids[:cut], *think.closer_ids]
            logits = logits_of(student, context, trace.answer_ids)
            targets = logits_of(teacher, whole, trace.answer_ids)[-num:]
            rows = distillation_rows(logits[-num:], targets, labels, alpha=alpha, divergence="forward_kl")
            learnt.append((1 - alpha) * rows.cross_entropy + alpha * rows.divergence)
            first, thinking = len(trace.prompt_ids), context[len(trace.prompt_ids) :] if is_whole else []
            thinking = torch.tensor(thinking or trace.reasoning_ids[:cut], dtype=torch.int64)
            predicting = logits[first - 1 : first - 1 + len(thinking)]
            shown.append(torch.nn.functional.cross_entropy(predicting, thinking, reduction="none"))
    return torch.cat(learnt).mean() + 0.5 * torch.cat(shown).mean()


@pytest.mark.parametrize("flags", [dict(alpha=0.7), dict(alpha=1.0, branches_per_trace=3, train_batch_size=2)])
def test_it_is_the_objective_of_whole_logits(run, tiny_folder, tokenizer, think, flags):
    folder = run(**FLAGS | flags, thinking_weight=0.5, max_steps=2)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    with torch.no_grad():
        wanted = expected_loss(
            *(folder / "checkpoint-2", teacher, tokenizer, think),
            alpha=flags["alpha"],
            branches=flags.get("branches_per_trace", 1),
        )
    assert validation_losses(folder)[2] == pytest.approx(float(wanted), rel=1e-5)


def test_two_ranks_measure_what_one_does(launch, words, tmp_path):
    for name, num_ranks in (("one", 1), ("two", 2)):
        codes, logs, _ = launch(words(name, **FLAGS, max_steps=4), num_ranks)
        assert codes == [0] * num_ranks, "\n".join(logs)
    one, two = (validation_losses(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() == {2, 4}
    assert [two[step] for step in two] == pytest.approx([one[step] for step in one], rel=2e-6)
    for left, right in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=2e-6)


def test_two_ranks_train_alike_however_often_they_measure(launch, words, tmp_path):
    for name, save_steps in (("often", 1), ("seldom", 4)):
        codes, logs, _ = launch(words(name, validation_samples=3, save_steps=save_steps, max_steps=4), 2)
        assert codes == [0, 0], "\n".join(logs)
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")


def test_gathered_weights_are_given_back(one_rank, tiny_model):
    objective = Objective(vocab_size=640, chunk_bytes=None, alpha=0.0)
    options = dict(thinking_weight=0.0, backend="sdpa", compute=nullcontext)
    student = StudentLoss(tiny_model, objective, objective, **options)
    shard_student(student, one_rank.mesh())
    method = SimpleNamespace(examples=lambda members: [Example(trace_index=0, input_ids=[5, 6], labels=[6, 7])])
    loop = Loop.__new__(Loop)
    loop.placement = SimpleNamespace(recipe=Recipe(), device="cpu")
    loop.model, loop.student, loop.teacher, loop.method, loop.held_out = tiny_model, student, None, method, (0,)
    loop.ranks, loop.weights, loop.layers = one_rank, WorkingWeights(tiny_model, None), CompiledLayers([])
    assert validation_loss(loop) > 0
    assert all(isinstance(parameter, DTensor) for parameter in student.parameters())


def test_resume_with_validation_is_bit_exact(run, tmp_path):
    whole = run("whole", **FLAGS)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for later in (4, 6):
        shutil.rmtree(part / f"checkpoint-{later}")
    run("part", **FLAGS, resume_from_checkpoint="latest")
    assert losses(part) == losses(whole) and validation_losses(part) == validation_losses(whole)
    assert (part / "best.json").read_text() == (whole / "best.json").read_text()


def test_the_checkpoint_of_the_least_loss_is_named_and_kept(run, monkeypatch, capsys):
    given = iter([0.5, 0.25, 0.75, 1.0])
    monkeypatch.setattr(training, "validation_loss", lambda loop, beat: next(given))
    folder = run(validation_samples=3, save_steps=1, max_steps=4, save_total_limit=1)
    best = {"checkpoint": "checkpoint-2", "step": 2, "validation_loss": 0.25}
    assert json.loads((folder / "best.json").read_text()) == best
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    printed = capsys.readouterr().out
    assert "validation loss 0.7500" in printed and f"best    {folder / 'checkpoint-2'}" in printed


def test_the_report_says_the_least_loss(run):
    folder = run(**FLAGS)
    least = min(validation_losses(folder).values())
    assert f"Least validation loss: {least:.4f}" in write_report(folder).read_text()


def test_an_epoch_counts_the_learnt_traces_alone(run):
    folder = run(validation_samples=2, max_steps=None, num_train_epochs=1)
    assert len(read_metrics(folder / "metrics.jsonl")) == 2  # 8 of 10 traces, 4 a step


def test_a_signals_checkpoint_does_not_wait_for_it(launch, words, tmp_path):
    codes, logs, _ = launch(words("run", validation_samples=3, save_steps=100), 1, accident="term")
    assert codes == [143], "\n".join(logs)
    assert (tmp_path / "run" / "checkpoint-3").exists() and not validation_losses(tmp_path / "run")


@pytest.mark.parametrize("number", [10, 11])
def test_holding_out_every_trace_is_refused_before_any_teacher(run, capsys, tmp_path, number):
    error = refusal(capsys, lambda: run(validation_samples=number))
    assert f"validation_samples: {number} held out of 10 traces leave none to learn from" in error
    assert "expected at most 9" in error and not (tmp_path / "run" / "teacher").exists()
    assert len(read_metrics(run(validation_samples=9, max_steps=1) / "metrics.jsonl")) == 1


def test_a_number_below_one_is_refused(run, capsys):
    assert "validation_samples: expected at least 1, got 0" in refusal(capsys, lambda: run(validation_samples=0))


def test_other_traces_held_out_are_another_run(run, capsys):
    run(**FLAGS)
    error = refusal(capsys, lambda: run(**FLAGS | dict(validation_samples=4), resume_from_checkpoint="latest"))
    assert "validation_samples: 3 -> 4" in error


def test_a_row_of_the_held_out_traces_is_a_sign_of_life(run, monkeypatch):
    beats, measured = [], []

    def counted(loop, *, beat):
        before = len(beats)
        found = validation_loss(loop, beat=lambda: (beats.append(0), beat()))
        measured.append((len(beats) - before, len(loop.packed([(0, index) for index in loop.held_out]).batches)))
        return found

    monkeypatch.setattr(training, "validation_loss", counted)
    run(**FLAGS | dict(max_steps=2, validation_samples=8))
    ((found, rows),) = measured
    assert found == rows > 1
