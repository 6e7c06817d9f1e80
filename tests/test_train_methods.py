"""Whole runs of LSP, P-ALIGN and supervised fine-tuning at tiny size."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import losses, make_tiny_model, make_traces, refusal
from transformers import AutoTokenizer

from trsd import judging
from trsd.derivations import first_derivation_tokens
from trsd.methods.trsd import cut_example
from trsd.metrics import read_metrics
from trsd.models import tokenizer_fingerprint
from trsd.sentences import sentence_token_ends
from trsd.thinking import token_texts
from trsd.traces import read_traces


@pytest.fixture
def teacher(tokenizer, tmp_path):
    """Another model of the same tokens, its head padded further."""
    model = make_tiny_model(tokenizer, seed=3)
    model.resize_token_embeddings(len(tokenizer) + 64)
    model.save_pretrained(tmp_path / "teacher_model")
    tokenizer.save_pretrained(tmp_path / "teacher_model")
    return tmp_path / "teacher_model"


@pytest.fixture
def lsp(run, teacher):
    def lsp(name="run", **flags):
        return run(name, **(dict(method="lsp", teacher_model_name_or_path=teacher) | flags))

    return lsp


def first(folder):
    return read_metrics(folder / "metrics.jsonl")[0]


def test_lsp_mixes_both_terms_by_its_own_alpha(lsp):
    row = first(lsp(max_steps=1))
    assert row["loss"] == pytest.approx(0.5 * row["cross_entropy"] + 0.5 * row["divergence"], rel=1e-5)
    assert row["divergence"] > 0 and row["thinking_cross_entropy"] == 0


def test_lsp_runs_the_kept_share_of_the_tokens_and_learns_all_but_the_first(lsp, tokenizer):
    folder = lsp(max_steps=1, keep_fraction=0.3, train_batch_size=10)
    traces = read_traces(folder / "traces" / "train.jsonl", tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    kept = sum(int(0.3 * trace.num_tokens) for trace in traces)
    row = first(folder)
    assert row["tokens"] == row["supervised_tokens"] == kept - len(traces)


def test_every_teacher_gives_the_loss_of_the_hidden_cache(lsp, tokenizer):
    flags = dict(max_steps=3, temperature=1.5)
    cached = losses(lsp("cached", **flags))
    whole = dict(teacher="top_k_cache", teacher_top_k=len(tokenizer))  # nothing is left for the tail
    for other in (lsp("online", teacher="online", **flags), lsp("top", **whole, **flags)):
        for one, two in zip(cached, losses(other), strict=True):
            assert one[1] == pytest.approx(two[1], rel=1e-5)


def test_a_top_k_cache_names_what_it_was_made_for(lsp, tokenizer):
    folder = lsp(max_steps=1, teacher="top_k_cache", teacher_top_k=8, temperature=1.5)
    made_for = json.loads((folder / "teacher" / "manifest.json").read_text())["fingerprint"]
    assert (made_for["k"], made_for["temperature"], made_for["vocab_size"]) == ("8", "1.5", str(len(tokenizer)))


def test_top_k_loss_is_below_the_whole_divergence(lsp):
    whole, some = (
        first(lsp(name, max_steps=1, alpha=1.0, **flags))
        for name, flags in (("whole", {}), ("some", dict(teacher="top_k_cache", teacher_top_k=8)))
    )
    assert 0 < some["divergence"] < whole["divergence"]


def test_lsp_resumes_bit_exact(lsp, tmp_path):
    flags = dict(max_steps=4, save_steps=2, teacher="top_k_cache", teacher_top_k=16)
    whole = lsp("whole", **flags)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-4")
    lsp("part", resume_from_checkpoint="latest", **flags)
    assert losses(part) == losses(whole)


def test_every_cut_of_lsp_reaches_the_loss(lsp):
    options = dict(
        half={},
        more=dict(keep_fraction=0.9),
        right=dict(keep_side="right"),
        middle=dict(keep_side="middle"),
        ends=dict(truncation="endpoints"),
        derivation=dict(truncation="first_derivation"),
        cot=dict(loss_sections="cot"),
        answer=dict(loss_sections="a", keep_fraction=1.0),
        alpha=dict(alpha=0.25),
        temperature=dict(temperature=2.0),
        reverse=dict(divergence="reverse_kl"),
    )
    found = {
        name: first(lsp(name, max_steps=1, train_batch_size=10, **flags))["loss"] for name, flags in options.items()
    }
    assert len({round(loss, 6) for loss in found.values()}) == len(options), found


def test_sections_that_the_cut_took_are_counted_and_a_run_with_nothing_to_learn_is_refused(lsp, capsys):
    lsp("some", max_steps=1, loss_sections="p+a", keep_fraction=0.3)
    assert "the cut leaves nothing of section a in 10 of 10 traces" in capsys.readouterr().out
    error = refusal(capsys, lambda: lsp("none", loss_sections="a", keep_fraction=0.3))
    assert "no trace is left to learn from; dropped: 10 x no token to learn is left by the cut" in error


@pytest.mark.parametrize("share", ["0", "-0.1", "1.01", "nan"])
def test_a_fraction_outside_its_range_exits_2(lsp, capsys, share):
    assert "keep_fraction: expected more than 0 and at most 1" in refusal(capsys, lambda: lsp(keep_fraction=share))


def test_lsp_without_a_teacher_is_refused_with_what_to_do(run, capsys):
    error = refusal(capsys, lambda: run(method="lsp"))
    assert "lsp learns from a larger teacher: name one" in error


@pytest.mark.parametrize("flags", [dict(branches_per_trace=2), dict(cut="budgets"), dict(judge="answer")])
def test_a_field_of_another_method_is_refused_by_name(lsp, capsys, flags):
    name = next(iter(flags))
    assert f"{name}: method lsp does not read it" in refusal(capsys, lambda: lsp(**flags))


def test_the_example_that_is_shown_marks_what_is_learnt(lsp, capsys):
    lsp(max_steps=1, loss_sections="cot", keep_fraction=0.8)
    shown = capsys.readouterr().out.split("what is learnt in [[ ]]:\n")[1].split("\n\nstep")[0]
    before, inside = shown.split("[[", 1)
    assert before.endswith("<think>\n") and inside.count("]]") == 1


def test_sft_learns_the_text_alone(run):
    folder = run(method="sft", max_steps=2)
    assert not (folder / "teacher").exists()
    row = first(folder)
    assert row["loss"] == pytest.approx(row["cross_entropy"]) and row["divergence"] == 0
    assert "Trained on traces as text" in (folder / "checkpoint-2" / "README.md").read_text()


@pytest.fixture
def sufficient_from(monkeypatch):
    """A judge that finds any prefix of at least so many tokens sufficient, and what it was asked."""
    asked = []

    def judge_from(count):
        def judge(self, items):
            asked.append(items)
            return [cut >= min(count, len(trace.reasoning_ids)) for trace, cut in items]

        monkeypatch.setattr(judging.AnswerJudge, "judge", judge)
        return asked

    return judge_from


@pytest.fixture
def palign(run):
    flags = dict(method="palign", judge="answer", completion="close", max_answer_tokens=6)
    return lambda name="run", **more: run(name, **(flags | more))


@pytest.fixture
def finished(monkeypatch, tokenizer):
    """Completions that end, whatever the random model would write."""
    from trsd.decoding import Decoder

    ending = tokenizer(r"\boxed{7}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    monkeypatch.setattr(Decoder, "complete", lambda self, contexts, max_new_tokens: [ending for _ in contexts])


def test_palign_learns_the_shortest_sufficient_prefix_and_the_completion(palign, sufficient_from, finished, tokenizer):
    asked = sufficient_from(12)
    folder = palign(max_steps=2, max_answer_tokens=12)
    fingerprint = tokenizer_fingerprint(tokenizer)
    given, done = (
        read_traces(folder / "traces" / f"{name}.jsonl", tokenizer_fingerprint=fingerprint)
        for name in ("given", "train")
    )
    assert 0 < len(done) <= len(given) == 10 and len(asked) <= 6  # rounds, for all traces together
    by_id = {trace.id: trace for trace in given}
    for trace in done:
        source = by_id[trace.sampling["completed"]]
        assert source.reasoning_ids[: trace.sampling["cut"]] == trace.reasoning_ids
        assert trace.answer.strip() == r"\boxed{7}"
    assert any(len(t.reasoning_ids) < len(by_id[t.sampling["completed"]].reasoning_ids) for t in done)
    assert first(folder)["divergence"] == 0 < first(folder)["cross_entropy"]


def test_palign_goes_on_from_its_verdicts_after_an_interruption(
    palign, sufficient_from, finished, tmp_path, monkeypatch
):
    asked = sufficient_from(12)
    true = judging.AnswerJudge.judge

    def third_time_dies(self, items):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return true(self, items)

    monkeypatch.setattr(judging.AnswerJudge, "judge", third_time_dies)
    with pytest.raises(SystemExit, match="130"):
        palign("part", max_steps=2)
    known = {(trace.id, cut) for items in asked for trace, cut in items}
    monkeypatch.setattr(judging.AnswerJudge, "judge", true)
    palign("part", max_steps=2, resume_from_checkpoint="latest")
    again = [(trace.id, cut) for items in asked[2:] for trace, cut in items]
    assert not known & set(again)
    asked.clear()
    palign("whole", max_steps=2)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def tokens_of_cuts(folder, tokenizer, think, cut_of):
    """What a step over all traces runs when each is cut where ``cut_of`` says."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    traces = read_traces(folder / "traces" / "train.jsonl", tokenizer_fingerprint=fingerprint)
    return sum(len(cut_example(trace, 0, cut_of(trace), think).input_ids) for trace in traces)


def test_trsd_cuts_at_the_judged_prefix_and_resumes_without_asking_again(run, sufficient_from, tokenizer, think):
    asked = sufficient_from(10)
    texts = token_texts(tokenizer, len(tokenizer))
    flags = dict(cut="judged", judge="answer", anchor_share=0.0, max_steps=2, train_batch_size=10, save_steps=1)
    flags["max_answer_tokens"] = 12
    folder = run("judged", **flags)

    def cut_of(trace):
        ends = sentence_token_ends(trace.reasoning_ids, texts)
        return next((end for end in ends if end >= 10), len(trace.reasoning_ids))

    assert first(folder)["tokens"] == tokens_of_cuts(folder, tokenizer, think, cut_of)
    before, rounds = losses(folder), len(asked)
    shutil.rmtree(folder / "checkpoint-2")
    run("judged", resume_from_checkpoint="latest", **flags)
    assert losses(folder) == before and len(asked) == rounds


def test_trsd_cuts_at_the_first_derivation(run, tokenizer, think):
    texts = token_texts(tokenizer, len(tokenizer))
    folder = run(cut="first_derivation", anchor_share=0.0, max_steps=1, train_batch_size=10)

    def cut_of(trace):
        return first_derivation_tokens(trace, texts) or len(trace.reasoning_ids)

    assert first(folder)["tokens"] == tokens_of_cuts(folder, tokenizer, think, cut_of)


def test_traces_that_judge_and_completion_have_no_room_for_are_dropped_before_any_verdict(
    palign, sufficient_from, capsys
):
    asked = sufficient_from(12)
    error = refusal(capsys, lambda: palign(max_answer_tokens=500))  # the context holds 512
    assert "10 x no room for judge and completion in a context of 512" in error and not asked


def test_top_k_of_more_tokens_than_there_are_is_refused_before_any_work(lsp, capsys, tmp_path):
    error = refusal(capsys, lambda: lsp(teacher="top_k_cache", teacher_top_k=10**6))
    assert "teacher_top_k: expected at most the" in error and not (tmp_path / "run").exists()


def test_a_cache_that_the_disk_cannot_hold_is_refused_with_what_to_do(lsp, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "use --teacher online" in refusal(capsys, lambda: lsp())


def test_answers_end_with_what_the_chat_template_writes_whatever_the_tokenizer_calls_eos(run, tiny_folder, tokenizer):
    """As in base models: the template closes turns with one token, and the tokenizer names another."""
    other = AutoTokenizer.from_pretrained(tiny_folder)
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(tiny_folder)
    rows = [{"prompt": "How many?", "reasoning": "One and one.", "answer": "2"}]
    data = tiny_folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(method="sft", data=data, max_steps=1, train_batch_size=1)
    (trace,) = read_traces(folder / "traces" / "train.jsonl", tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    ending = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trace.answer_ids[-1] == ending
    checkpoint = folder / "checkpoint-1"
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token == "<|im_end|>"
    assert ending in json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]


def test_sft_reads_the_text_of_traces_that_another_tokenizer_wrote(run, trace_file, capsys):
    rows = [json.loads(line) | {"tokenizer": "another"} for line in trace_file.read_text().splitlines()]
    trace_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert first(run(method="sft", max_steps=1))["cross_entropy"] > 0
    assert "these ids were made by tokenizer another" in refusal(capsys, lambda: run("refused", max_steps=1))


def test_prefixes_that_never_suffice_before_the_end_keep_all_of_the_reasoning(
    palign, sufficient_from, finished, capsys
):
    sufficient_from(10**6)
    folder = palign(max_steps=1)
    out = capsys.readouterr().out
    assert "prefixes: 10 of 10 sufficient, 0 kept whole; 100% of the reasoning kept" in out
    assert json.loads((folder / "traces" / "prefixes.json").read_text())["mean_kept_share"] == 1.0


def test_traces_without_an_answer_to_judge_by_are_dropped(palign, sufficient_from, trace_file, capsys):
    rows = [json.loads(line) | {"gold": None, "correct": None} for line in trace_file.read_text().splitlines()]
    rows = [row | {"answer": "I do not know."} for row in rows]
    trace_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = sufficient_from(1)
    assert "10 x no answer to judge by" in refusal(capsys, palign) and not asked


def test_evaluation_data_is_read_before_any_work_and_the_folder_stays_free(lsp, tmp_path, capsys):
    assert "no data file at nowhere.jsonl" in refusal(capsys, lambda: lsp(eval_data="nowhere.jsonl"))
    assert not (tmp_path / "run").exists()


def test_completions_that_never_end_leave_nothing_and_say_so(palign, sufficient_from, capsys, tokenizer, think):
    sufficient_from(12)
    assert len(make_traces(tokenizer, think, 10)) == 10
    error = refusal(capsys, lambda: palign(max_answer_tokens=1))
    assert "no trace is left to learn from; dropped: 10 x completion cut off by max_answer_tokens" in error
