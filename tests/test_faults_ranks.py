"""Runs of several ranks: the losses of one, resumed by any number, and what happens when one of them fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, make_tiny_model, refusal
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from trsd.checkpoint_folders import newest_whole
from trsd.metrics import read_metrics


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def assert_same_curve(one, other, rel=1e-6):
    """Losses to ``rel``; norms, which ranks put together from those of their parts in fp32, to twice that."""
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(losses(one), losses(other), strict=True):
        assert (step, loss) == (other_step, pytest.approx(other_loss, rel=rel))
        assert norm == pytest.approx(other_norm, rel=2 * rel)


@pytest.fixture
def ran(launch, words, tmp_path):
    """Train over some ranks, all of which must end well; returns the run's folder."""

    def ran(name, num_ranks, **flags):
        codes, logs, _ = launch(words(name, **({"max_steps": 4} | flags)), num_ranks)
        assert codes == [0] * num_ranks, "\n".join(logs)
        assert ["attention:" in log for log in logs] == [True] + [False] * (num_ranks - 1)  # rank 0 alone prints
        return tmp_path / name

    return ran


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [
        (2, dict(branches_per_trace=2)),
        (3, dict(teacher="online", gradient_checkpointing=True, thinking_weight=0.5)),
        (3, dict(train_batch_size=2, max_tokens_per_batch=512)),  # fewer sequences than ranks
        # Nine short cuts on one rank, one on the other: their whole traces are two rows of the teacher, and one.
        (
            2,
            dict(
                teacher="online",
                cut="budgets",
                cut_budgets="0",
                anchor_share=0.0,
                train_batch_size=10,
                timeout_seconds=30,
            ),
        ),
        (2, dict(method="lsp", teacher_model_name_or_path=None)),
        (2, dict(shard_group_size=1, train_batch_size=10)),  # several rows a rank, whose sum replicas exchange once
        (4, dict(shard_group_size=2)),
        pytest.param(2, dict(teacher="online", torch_compile=True), marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_losses_of_one(ran, tmp_path, num_ranks, flags):
    if flags.get("method") == "lsp":
        flags = flags | dict(teacher_model_name_or_path=tmp_path / "tiny")
    one, several = ran("one", 1, **(flags | dict(shard_group_size=None))), ran("several", num_ranks, **flags)
    assert_same_curve(one, several)
    left, right = weights(one, 4), weights(several, 4)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name], right[name], atol=2e-5) for name in left)
    for name in ("tokens", "supervised_tokens"):
        ours, theirs = ([row[name] for row in read_metrics(run / "metrics.jsonl")] for run in (one, several))
        assert ours == theirs


def test_an_lm_head_of_its_own_is_sharded_apart(ran, tmp_path, tokenizer):
    make_tiny_model(tokenizer, tie=False).save_pretrained(tmp_path / "tiny")
    assert_same_curve(ran("one", 1, max_steps=2), ran("two", 2, max_steps=2))


@pytest.mark.parametrize("flags", [dict(teacher="online"), dict(alpha=0.7, temperature=2.0, train_batch_size=2)])
def test_heads_spread_over_the_vocabulary_give_the_losses_of_whole_ones(ran, tmp_path, tokenizer, flags):
    make_tiny_model(tokenizer, tie=False).save_pretrained(tmp_path / "tiny")
    one, three = ran("one", 1, **flags), ran("three", 3, vocab_parallel=True, **flags)
    assert_same_curve(one, three)
    left, right = weights(one, 4), weights(three, 4)
    assert all(torch.allclose(left[name], right[name], atol=2e-5) for name in left)
    shutil.rmtree(three / "checkpoint-4")
    before = losses(three)
    ran("three", 3, vocab_parallel=True, **flags, resume_from_checkpoint="latest")
    assert losses(three) == before


@pytest.mark.parametrize(
    "flags", [dict(teacher="adapter_off"), pytest.param(dict(teacher="vector_cache"), marks=pytest.mark.slow)]
)
def test_an_adapter_trains_and_resumes_over_ranks_as_in_one(ran, flags):
    pytest.importorskip("peft")
    flags = dict(lora_rank=4, save_steps=2) | flags
    one, two = ran("one", 1, **flags), ran("two", 2, **flags)
    assert_same_curve(one, two)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        left, right = (load_file(folder / "checkpoint-4" / name) for folder in (one, two))
        assert left.keys() == right.keys() and all(torch.allclose(left[k], right[k], atol=2e-5) for k in left)
    for source, num_ranks in ((two, 2), (two, 1), (one, 2)):
        shutil.rmtree(source / "checkpoint-4")
        before = losses(source)
        ran(source.name, num_ranks, **flags, resume_from_checkpoint="latest")
        for left, right in zip(losses(source), before, strict=True):
            assert left == (right if (source, num_ranks) == (two, 2) else pytest.approx(right, rel=1e-6))


@pytest.mark.parametrize(
    ("num_ranks", "flags", "said"),
    [
        (1, dict(vocab_parallel=True), "this run has one rank"),
        (1, dict(shard_group_size=2), "this run has one rank"),
        (2, dict(vocab_parallel=True), "lm_head is its embeddings"),
        (2, dict(cpu_offload=True), "there is no GPU"),
        (2, dict(shard_group_size=3), "2 ranks do not divide into groups of 3"),
        (2, dict(teacher="top_k_cache", vocab_parallel=True), "lm_head is its embeddings"),
    ],
)
def test_what_the_ranks_cannot_run_is_refused_before_any_work(launch, words, tmp_path, num_ranks, flags, said):
    codes, logs, _ = launch(words("run", **flags), num_ranks)
    assert codes[0] == 2 and said in logs[0] and all(codes)
    assert not (tmp_path / "run" / "traces").exists()


def test_fault_06_two_ranks_resume_bit_for_bit_and_other_numbers_to_rounding(ran, tmp_path):
    whole = ran("whole", 2, save_steps=1)
    for step, num_ranks in ((1, 2), (3, 2), (2, 3), (2, 1)):
        part = tmp_path / f"part{step}{num_ranks}"
        shutil.copytree(whole, part)
        for later in range(step + 1, 5):
            shutil.rmtree(part / f"checkpoint-{later}")
        ran(part.name, num_ranks, save_steps=1, resume_from_checkpoint="latest")
        if num_ranks == 2:
            assert losses(part) == losses(whole)
            left, right = weights(part, 4), weights(whole, 4)
            assert all(torch.equal(left[name], right[name]) for name in right)
        else:
            assert_same_curve(part, whole)


def test_what_one_rank_saved_several_go_on_with(ran):
    whole = ran("whole", 1, save_steps=2)
    shutil.rmtree(whole / "checkpoint-4")
    before = losses(whole)
    ran("whole", 2, save_steps=2, resume_from_checkpoint="latest")
    assert losses(whole)[:2] == before[:2]
    for left, right in zip(losses(whole), before, strict=True):
        assert left == pytest.approx(right, rel=1e-6)


def test_generation_and_evaluation_are_shared_and_give_what_one_rank_gives(ran, tmp_path):
    flags = dict(
        data="bundled:questions/train.jsonl",
        max_train_samples=5,
        eval_data="bundled:questions/evaluation.jsonl",
        max_eval_samples=5,
        eval_budgets="0,8",
        model_name_or_path="bundled:reasoner",
        max_thinking_tokens=240,
        max_answer_tokens=24,
        max_steps=2,
        close_unfinished=True,
    )
    one, two = ran("one", 1, **flags), ran("two", 2, **flags)
    for file in ("traces/train.jsonl", "eval/before.json"):
        assert (one / file).read_text() == (two / file).read_text()
    assert (two / "eval" / "after.json").exists() and (two / "report.html").exists()


@pytest.mark.parametrize("accident", ["nan", "nan loss"])
def test_fault_10_what_is_not_finite_on_one_rank_stops_all_before_the_step(launch, words, tmp_path, accident):
    codes, logs, _ = launch(words("run", save_steps=1), 2, accident=accident)
    assert codes == [1, 1]
    assert all("step 3: loss" in log and "no parameter was changed" in log for log in logs)
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]


def test_fault_10_what_is_not_finite_on_one_rank_is_left_out_by_all(launch, words, tmp_path):
    codes, logs, _ = launch(words("run", save_steps=1, max_steps=4, max_skipped_steps=1), 2, accident="nan")
    assert codes == [0, 0], "\n".join(logs)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, False, True, False]
    before, after = (weights(tmp_path / "run", step) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "1 steps left out" in logs[0]


def test_fault_24_a_signal_to_one_rank_ends_all_with_a_checkpoint_of_the_step(launch, words, tmp_path):
    codes, logs, _ = launch(words("run", save_steps=100), 2, accident="term")
    assert codes == [143, 143], "\n".join(logs)
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").exists()
    assert "checkpoint-3 is complete" in logs[0] and "latest goes on" in logs[0]


def test_fault_25_a_rank_that_dies_ends_the_others_with_a_message(launch, words, tmp_path):
    codes, logs, seconds = launch(words("run", save_steps=1, timeout_seconds=20), 2, accident="death")
    assert codes == [1, -9] and seconds < 60
    assert "error: rank 0 waits no longer for another rank that ended or hangs" in logs[0]
    assert newest_whole(tmp_path / "run")  # of step 1, or of 2 where it was written in time


def test_fault_25_a_rank_that_hangs_ends_the_run_in_time_with_all_stacks(launch, words):
    codes, logs, seconds = launch(words("run", timeout_seconds=8), 2, accident="hang", seconds=60)
    assert codes == [1, 1] and seconds < 50
    assert "in backward" in logs[1] and "Timeout" in logs[1]


@pytest.mark.parametrize(
    ("accident", "lost", "kept"),
    [("no room", (2, 3), (1, 4, 5, 6)), ("full disk", (2,), (1, 3, 4, 5, 6)), ("no folder", (2,), (1, 3, 4, 5, 6))],
)
def test_fault_04_a_save_that_fails_on_one_rank_is_a_warning_and_the_next_ones_succeed(
    launch, words, tmp_path, accident, lost, kept
):
    codes, logs, _ = launch(words("run", save_steps=1, timeout_seconds=30), 2, accident=accident)
    assert codes == [0, 0], "\n".join(logs)
    for step in lost:
        assert f"checkpoint-{step} was not saved (OSError" in logs[0]
    found = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert found == [f"checkpoint-{step}" for step in kept]


def test_fault_04_a_last_save_that_fails_on_one_rank_ends_all_with_an_error(launch, words):
    codes, logs, _ = launch(words("run", max_steps=2, timeout_seconds=30), 2, accident="full disk")
    assert codes == [2, 2] and "checkpoint-2 of" in logs[0] and "was not saved" in logs[0]


def test_fault_09_ranks_that_see_other_files_are_refused(launch, words):
    codes, logs, _ = launch(words("run"), 2, accident="other traces")
    assert codes[0] == 2 and "rank 1 has other traces or model files than rank 0" in logs[0]


@pytest.mark.parametrize("command", ["cache", "sweep", "evaluate", "generate"])
def test_commands_of_one_process_are_refused_under_torchrun(monkeypatch, capsys, command, words, tmp_path):
    from trsd import cache, evaluate, generate, sweep

    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    one = ["--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "traces.jsonl")]
    run = words("run")
    calls = {
        "cache": lambda: cache.main(run),
        "sweep": lambda: sweep.main([*run[: run.index("--anchor_share")], "--method", "sft", "--eval_data", one[-1]]),
        "evaluate": lambda: evaluate.main([*one, "--budgets", "4"]),
        "generate": lambda: generate.main([*one, "--output", str(tmp_path / "out.jsonl")]),
    }
    assert "start it without torchrun" in refusal(capsys, calls[command])


def test_torchrun_starts_the_ranks_and_gets_their_exit_code(words, tmp_path):
    root = Path(__file__).parent.parent
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"}

    def torchrun(**flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "trsd.train"]
        flags = dict(max_steps=1) | flags
        return subprocess.run(
            [*command, *words("run", **flags)], capture_output=True, text=True, env=variables, timeout=120
        )

    done = torchrun()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attention: sdpa") == 1 and (tmp_path / "run" / "checkpoint-1").exists()
    refused = torchrun()
    assert refused.returncode == 1 and refused.stderr.count("already holds a run") == 1
    assert "exitcode  : 2" in refused.stderr and "Traceback (most" not in refused.stderr.split("torchrun")[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fault_06_a_model_that_drops_activations_resumes_bit_for_bit(ran, tmp_path, tokenizer, num_ranks):
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=512,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    flags = dict(save_steps=2, train_batch_size=9)
    folder = ran("run", num_ranks, **flags)
    whole = losses(folder)
    shutil.rmtree(folder / "checkpoint-4")
    ran("run", num_ranks, **flags, resume_from_checkpoint="latest")
    assert losses(folder) == whole
