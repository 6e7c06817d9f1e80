"""Whole runs at tiny size: through every stage, resumed at every step, and refused when they should be."""

import json
import shutil

import pytest
import torch
from conftest import losses, make_tiny_model, refusal
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trsd import cache, student_loss, train
from trsd.methods.trsd import cut_example, with_thinking
from trsd.metrics import read_metrics
from trsd.objective import Objective


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "state" / "optimizer.safetensors")


def assert_equal_checkpoints(one, other):
    for left, right in zip(weights(one), weights(other), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_same_command_gives_the_same_losses_bit_for_bit(run):
    one, other = run("one"), run("other")
    assert losses(one) == losses(other)
    assert_equal_checkpoints(one / "checkpoint-6", other / "checkpoint-6")


def test_resume_is_bit_exact_at_every_step(run, tmp_path):
    whole = run("whole", save_steps=1)
    for step in range(1, 6):
        part = tmp_path / f"part{step}"
        shutil.copytree(whole, part)
        for later in range(step + 1, 7):
            shutil.rmtree(part / f"checkpoint-{later}")
        run(part.name, save_steps=1, resume_from_checkpoint="latest")
        assert losses(part) == losses(whole)
        assert_equal_checkpoints(part / "checkpoint-6", whole / "checkpoint-6")


def test_resume_before_the_first_checkpoint_starts_over_from_the_stored_traces(run, tmp_path, capsys):
    whole = run("whole")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-6")
    run("part", resume_from_checkpoint="latest")
    assert losses(part) == losses(whole)
    assert "has no checkpoint to resume: it begins at step 1" in capsys.readouterr().err


def test_a_run_from_before_a_setting_was_there_goes_on_where_it_is_at_its_default(run, capsys):
    whole = run("whole")
    recipe = whole / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("snap_to_sentence: false\n", ""))
    before = losses(whole)
    run("whole", resume_from_checkpoint="latest")
    assert losses(whole) == before and "snap_to_sentence" not in recipe.read_text()
    said = refusal(capsys, lambda: run("whole", resume_from_checkpoint="latest", snap_to_sentence=True))
    assert "(snap_to_sentence: False -> True)" in said


def test_a_run_that_ran_out_of_memory_goes_on_with_settings_that_take_less(run, tmp_path):
    whole = run("whole", save_steps=3)
    shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    less = dict(gradient_checkpointing=True, gradient_checkpointing_policy="selective", loss_chunk_bytes=2**16)
    part = run("part", save_steps=3, resume_from_checkpoint="latest", **less)
    for one, other in zip(losses(whole), losses(part), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_resume_sweeps_half_written_folders_and_leaves_a_users_dot_files(run):
    whole = run("whole", max_steps=1)
    for name in (".checkpoint-1.77", ".git", ".checkpoint-notes"):
        (whole / name).mkdir()
    (whole / ".env").write_text("mine")
    run("whole", max_steps=1, resume_from_checkpoint="latest")
    assert {path.name for path in whole.glob(".*")} == {".git", ".checkpoint-notes", ".env"}


def test_resume_of_a_finished_run_changes_nothing(run):
    whole = run("whole")
    before = losses(whole)
    run("whole", resume_from_checkpoint="latest")
    assert losses(whole) == before


def test_row_size_changes_the_loss_by_rounding_only(run):
    small = run("small", train_batch_size=8, max_tokens_per_batch=512)
    large = run("large", train_batch_size=8, max_tokens_per_batch=8192)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (small, large)]
    assert rows[0][0]["packed_rows"] > rows[1][0]["packed_rows"] == 1
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-5)


def test_online_teacher_gives_the_loss_of_the_hidden_cache(run):
    cached, online = run("cached"), run("online", teacher="online")
    assert not (online / "teacher").exists()
    for one, other in zip(losses(cached), losses(online), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-5)


def test_branches_train_as_the_separate_sequences_do(run, monkeypatch):
    """Three cuts of each trace in every step, sharing the trace or not: the same losses, in fewer tokens."""
    flags = dict(branches_per_trace=3, alpha=0.7, anchor_share=0.3)
    together = read_metrics(run("together", **flags) / "metrics.jsonl")

    def one_by_one(trace, index, cuts, think, **_):
        return [with_thinking(cut_example(trace, index, cut, think), trace, cut) for cut in cuts]

    monkeypatch.setattr("trsd.methods.trsd.branched_examples", one_by_one)
    separate = read_metrics(run("separate", **flags) / "metrics.jsonl")
    for one, other in zip(together, separate, strict=True):
        assert one["supervised_tokens"] == other["supervised_tokens"]
        assert one["tokens"] < 0.8 * other["tokens"]
        for name in ("loss", "cross_entropy", "divergence", "thinking_cross_entropy", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_the_recipes_attention_is_what_runs(run, monkeypatch):
    asked = set()
    true = student_loss.packed_hidden_states

    def seen(*arguments, backend):
        asked.add(backend)
        return true(*arguments, backend=backend)

    monkeypatch.setattr(student_loss, "packed_hidden_states", seen)
    monkeypatch.setattr("trsd.teachers.packed_hidden_states", seen)
    run("run", max_steps=1, branches_per_trace=2)
    assert asked == {"sdpa"}


def test_resume_with_branches_is_bit_exact(run, tmp_path):
    whole = run("whole", save_steps=1, max_steps=3, branches_per_trace=4)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for later in (2, 3):
        shutil.rmtree(part / f"checkpoint-{later}")
    run("part", save_steps=1, max_steps=3, branches_per_trace=4, resume_from_checkpoint="latest")
    assert losses(part) == losses(whole)


def test_an_attention_that_cannot_run_here_is_refused_with_the_reason(run, capsys):
    error = refusal(capsys, lambda: run("run", attn_implementation="triton"))
    assert "attn_implementation: attention back end triton cannot serve plain rows: it needs CUDA tensors" in error


@pytest.mark.parametrize("kind", ["gemma2", "phi3"])
def test_other_architectures_train(run, kind, tokenizer, tiny_folder):
    """Soft caps in the attention and on the logits, windows shorter than the traces, fused projections."""
    extra = dict(gemma2=dict(final_logit_softcapping=5.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=16))
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=30,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra.get(kind, {}),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tiny_folder)
    rows = read_metrics(run("run", max_steps=2, branches_per_trace=2) / "metrics.jsonl")
    assert len(rows) == 2 and all(0 < row["loss"] < float("inf") for row in rows)


@pytest.mark.parametrize(
    "flags",
    [
        dict(divergence="reverse_kl"),
        dict(divergence="jsd", beta=0.3, temperature=2.0),
        dict(alpha=0.5),
        dict(cut="fractions", cut_fractions="0.25,0.5"),
        dict(cut="budgets", cut_budgets="4,16", snap_to_sentence=True),
        dict(closer="anytime", lr_scheduler_type="onecycle"),
        dict(gradient_checkpointing=True, weight_decay=0.1, lr_scheduler_type="constant"),
        dict(bf16=True),
        dict(branches_per_trace=3, bf16=True, attn_implementation="sdpa", loss_chunk_bytes=5000),
        dict(branches_per_trace=3, gradient_checkpointing=True, teacher="online"),
        dict(max_steps=None, num_train_epochs=0.8),
    ],
)
def test_every_option_trains(run, flags):
    folder = run("run", **({"max_steps": 2} | flags))
    rows = read_metrics(folder / "metrics.jsonl")
    assert len(rows) == 2 and all(row["loss"] > 0 for row in rows)


def first_loss(run, name, **flags):
    return read_metrics(run(name, max_steps=1, **flags) / "metrics.jsonl")[0]["loss"]


def test_every_loss_option_reaches_the_loss(run):
    options = dict(
        plain={},
        reverse=dict(divergence="reverse_kl"),
        jsd=dict(divergence="jsd"),
        jsd_beta=dict(divergence="jsd", beta=0.9),
        temperature=dict(temperature=3.0),
        mixed=dict(alpha=0.5),
        labels_only=dict(alpha=0.0),
        answers_only=dict(thinking_weight=0.0),
        heavy_thinking=dict(thinking_weight=2.0),
        cut=dict(cut="budgets", cut_budgets="3"),
        other_budget=dict(cut="budgets", cut_budgets="30"),
        anchors=dict(anchor_share=1.0),
        closer=dict(closer="anytime"),
        branches=dict(branches_per_trace=2),
        seed=dict(seed=1),
    )
    losses_of = {name: first_loss(run, name, **flags) for name, flags in options.items()}
    assert len({round(loss, 6) for loss in losses_of.values()}) == len(options), losses_of


def test_labels_alone_need_no_teacher(run):
    assert not (run("run", max_steps=1, alpha=0.0) / "teacher").exists()


def test_thinking_term_is_the_cross_entropy_it_reports(run, monkeypatch):
    asked, true = [], Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda self, *a, **b: (asked.append(b), true(self, *a, **b))[1])
    without = run("0.0", max_steps=1, thinking_weight=0.0)
    num_rows = len(asked)  # nothing was learnt beside the labels: to ask costs a gradient of lm_head's size
    with_ = run("2.0", max_steps=1, thinking_weight=2.0)
    assert len(asked) == 3 * num_rows > 0
    one, other = (read_metrics(folder / "metrics.jsonl")[0] for folder in (with_, without))
    assert other["thinking_cross_entropy"] == 0 < one["thinking_cross_entropy"]
    assert one["loss"] == pytest.approx(other["loss"] + 2.0 * one["thinking_cross_entropy"], rel=1e-5)


def test_a_teacher_of_its_own_with_another_padding_of_the_vocabulary_trains(run, tokenizer, tmp_path):
    teacher = make_tiny_model(tokenizer, seed=3)
    teacher.resize_token_embeddings(len(tokenizer) + 64)
    teacher.save_pretrained(tmp_path / "teacher_model")
    tokenizer.save_pretrained(tmp_path / "teacher_model")
    folder = run("run", max_steps=1, teacher_model_name_or_path=tmp_path / "teacher_model")
    assert 0 < losses(folder)[0][1] < float("inf")


def test_a_teacher_with_another_tokenizer_is_refused(run, tmp_path, capsys):
    shutil.copytree(tmp_path / "tiny", tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "other")
    error = refusal(capsys, lambda: run("run", teacher_model_name_or_path=tmp_path / "other"))
    assert f"first at token {len(other) - 1}: the student has none, the teacher says '<extra>'" in error


def test_random_state_is_restored(tiny_model, tmp_path):
    from trsd.checkpoint import random_state, restore_random_state

    state, drawn = random_state(), torch.rand(3)
    torch.rand(10)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_gradient_checkpointing_changes_nothing(run):
    plain, recomputed = run("plain", max_steps=2), run("again", max_steps=2, gradient_checkpointing=True)
    for one, other in zip(losses(plain), losses(recomputed), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_checkpoint_is_a_plain_model_folder_with_a_card(run):
    folder = run("run", max_steps=2) / "checkpoint-2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("How many?", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    card = (folder / "README.md").read_text()
    assert r"'\n</think>\n\n'" in card and "learning_rate: 0.001" in card


def test_an_output_dir_that_holds_a_run_is_refused_and_untouched(run, capsys):
    folder = run("run", max_steps=1)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "already holds a run" in refusal(capsys, lambda: run("run", max_steps=1))
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_resume_with_another_recipe_is_refused_by_field(run, capsys):
    run("run", max_steps=2)
    error = refusal(capsys, lambda: run("run", max_steps=2, learning_rate=0.5, resume_from_checkpoint="latest"))
    assert "learning_rate: 0.001 -> 0.5" in error


@pytest.mark.parametrize("what,message", [("checkpoint-9", "no run to resume"), ("checkpoint-x", "no run to resume")])
def test_resume_of_nothing_is_refused(run, capsys, what, message):
    assert message in refusal(capsys, lambda: run("nothing", resume_from_checkpoint=what))


def test_resume_from_a_checkpoint_that_is_not_there_lists_what_is(run, capsys):
    run("run", max_steps=2)
    error = refusal(capsys, lambda: run("run", max_steps=2, resume_from_checkpoint="checkpoint-9"))
    assert "['checkpoint-2']" in error


def test_stale_teacher_cache_is_refused(run, capsys):
    folder = run("run", max_steps=2)
    manifest = folder / "teacher" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"]["teacher_weights"] = "0"
    manifest.write_text(json.dumps(content))
    error = refusal(capsys, lambda: run("run", max_steps=2, resume_from_checkpoint="latest"))
    assert "made with other teacher_weights" in error


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(data="missing.jsonl"), "no data file at missing.jsonl"),
        (dict(model_name_or_path="/no/model"), "no model folder at /no/model"),
        (dict(closer="time is up"), "does not hold '</think>'"),
        (dict(max_length=40, max_tokens_per_batch=64), "no trace is left"),
        (dict(teacher_model_name_or_path="/no/teacher"), "no model folder at /no/teacher"),
    ],
)
def test_unusable_input_exits_2_with_what_to_do(run, capsys, flags, message):
    assert message in refusal(capsys, lambda: run("run", **flags))


def test_traces_too_long_are_dropped_and_counted(run, capsys):
    folder = run("run", max_steps=1, max_length=110)
    dropped = json.loads((folder / "traces" / "dropped.json").read_text())
    assert sum(dropped.values()) > 0
    assert f"{sum(dropped.values())} x longer than max_length=" in capsys.readouterr().out


def test_loss_that_is_not_finite_stops_before_the_step(run, tiny_folder, capsys):
    weights_file = tiny_folder / "model.safetensors"
    tensors = load_file(weights_file)
    tensors["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, weights_file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="step 1: loss nan"):
        run("run")
    assert not list((tiny_folder.parent / "run").glob("checkpoint-*"))


def test_dry_run_prints_the_recipe_and_does_nothing(capsys, tmp_path):
    train.main(["--dry_run", "--output_dir", str(tmp_path / "run"), "--learning_rate", "0.25"])
    assert "learning_rate: 0.25" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_output_dir_of_a_refused_run_is_gone_and_can_be_used_again(run, tiny_folder, capsys):
    refusal(capsys, lambda: run("run", data="missing.jsonl"))
    assert not (tiny_folder.parent / "run").exists()
    assert (run("run", max_steps=1) / "checkpoint-1").exists()


def test_what_a_run_writes_can_be_read_by_whoever_may_read_its_folder(run):
    folder = run(max_steps=1)
    for file in [*(folder / "checkpoint-1").rglob("*"), *(folder / "teacher").rglob("*")]:
        if file.is_file():
            assert file.stat().st_mode & 0o444 == file.parent.stat().st_mode & 0o444, file


def test_training_in_bf16_follows_training_in_fp32(run):
    exact, rounded = losses(run("exact")), losses(run("rounded", bf16=True))
    assert abs(exact[-1][1] - exact[0][1]) > 0.1  # it learns, and what it learnt is computed with
    for (_, wanted, _), (_, got, _) in zip(exact, rounded, strict=True):
        assert got == pytest.approx(wanted, rel=0.02)


def test_recomputing_in_bf16_changes_nothing(run):
    plain, again = (losses(run(name, bf16=True, gradient_checkpointing=name == "again")) for name in ("plain", "again"))
    assert plain == again


def test_bf16_is_what_the_layers_compute_in(run):
    exact, rounded = (losses(run(f"{flag}", method="sft", bf16=flag)) for flag in (False, True))
    assert exact != rounded and exact[0][1] == pytest.approx(rounded[0][1], rel=0.02)


def test_what_was_measured_before_training_is_measured_again_of_the_untrained_model(run, tmp_path):
    flags = dict(eval_data="bundled:questions/evaluation.jsonl", max_eval_samples=4, max_steps=4, save_steps=2)
    flags |= dict(max_thinking_tokens=24, max_answer_tokens=8, eval_budgets="8", learning_rate=0.02)
    folder = run("run", **flags)
    stored = {name: json.loads((folder / "eval" / f"{name}.json").read_text()) for name in ("before", "after")}
    assert stored["before"]["examples"] != stored["after"]["examples"]
    shutil.rmtree(folder / "eval")
    run("run", **flags, resume_from_checkpoint="latest")
    for name, result in stored.items():
        assert json.loads((folder / "eval" / f"{name}.json").read_text())["examples"] == result["examples"], name


def test_attention_that_drops_weights_is_refused_before_any_work(run, tiny_folder, tmp_path, capsys):
    config = json.loads((tiny_folder / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    assert "config.json says attention_dropout 0.1: set it to 0 there" in refusal(capsys, lambda: run("run"))
    assert not (tmp_path / "run").exists()


def test_latest_begins_in_a_folder_that_was_prepared_as_no_flag_does(words, run, tmp_path, capsys):
    cache.main(words("run", max_steps=2))
    folder = run("run", max_steps=2, learning_rate=5e-4, resume_from_checkpoint="latest")
    assert (folder / "checkpoint-2").exists() and "holds no run to resume: one begins there" in capsys.readouterr().err


def test_the_current_folder_may_be_the_runs(run, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("run", output_dir=".", max_steps=1)
    assert (tmp_path / "here" / "checkpoint-1").exists()
    assert "expected a folder of its own" in refusal(capsys, lambda: run("run", output_dir="/"))


def test_a_timeout_of_ages_is_refused(run, capsys):
    assert "timeout_seconds: expected at most a year" in refusal(capsys, lambda: run(timeout_seconds=10**11))
