"""Faults of checkpoints, by number: kills, damage, full disks, lost state, other runs' state, and malice."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, make_tiny_model, make_traces, refusal
from safetensors.torch import load_file, save_file

from trsd import checkpoint
from trsd.checkpoint import Checkpointer, load_state
from trsd.checkpoint_folders import checkpoints, newest_whole
from trsd.errors import InputError
from trsd.manifest import MAX_MANIFEST_BYTES, verify, write_manifest
from trsd.optim import build_optimizer
from trsd.traces import write_traces

ROOT = Path(__file__).parent.parent


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Write the checkpoint of a step of the tiny model; the model and its optimizer are attributes."""
    model = make_tiny_model(tokenizer)
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpointer = Checkpointer(tmp_path, tokenizer, card=lambda step: "# A checkpoint\n")

    def saved(step=1):
        checkpointer.save(step, model=model, optimizer=optimizer, trainer={})
        return checkpointer.wait()

    saved.model, saved.optimizer = model, optimizer
    return saved


@pytest.fixture
def two(run):
    """A run with checkpoints after step 1 and 2, the last."""
    return run("run", max_steps=2, save_steps=1)


def resume(run, **flags):
    return run("run", **(dict(max_steps=2, save_steps=1, resume_from_checkpoint="latest") | flags))


def cut_to(path, num_bytes):
    with path.open("rb+") as stream:
        stream.truncate(num_bytes)


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def soak(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_fault_01_killed_within_a_save_the_newest_checkpoint_verifies():
    said = soak("saves", "--rounds", "15")
    assert said.startswith("15 kills") and int(said.split(", ")[1].split()[0]) > 4, said


def test_fault_01_and_06_runs_killed_at_random_come_to_the_same_losses_and_weights():
    said = soak("training", "--rounds", "4")
    assert said.startswith("4 kills") and int(said.split(", ")[1].split()[0]) > 0, said


@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer.safetensors", "state/trainer.json"])
@pytest.mark.parametrize("left", ["100 bytes", "half", "nothing"])
def test_fault_02_a_truncated_file_is_named_and_the_previous_checkpoint_taken(saved, tmp_path, capsys, name, left):
    first, path = saved(1), saved(2) / name
    size = path.stat().st_size
    cut_to(path, {"100 bytes": min(100, size - 1), "half": size // 2, "nothing": 0}[left])
    assert newest_whole(tmp_path) == first
    error = capsys.readouterr().err
    assert "warning: checkpoint-2 is passed over" in error and str(path) in error and f"{size} were written" in error


@pytest.mark.parametrize("name", ["model.safetensors", "state/random.safetensors", "config.json", "tokenizer.json"])
def test_fault_02_a_missing_file_is_named(saved, name):
    folder = saved()
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        verify(folder)


def test_fault_02_a_damaged_checkpoint_costs_its_steps_and_no_more(run, two, capsys):
    whole = losses(two)
    cut_to(two / "checkpoint-2" / "model.safetensors", 100)
    resume(run)
    said = capsys.readouterr()
    assert "resuming checkpoint-1" in said.out and "model.safetensors has 100 bytes" in said.err
    assert losses(two) == whole
    verify(two / "checkpoint-2")


def test_fault_02_a_damaged_checkpoint_that_is_asked_for_is_an_error(run, two, capsys):
    cut_to(two / "checkpoint-2" / "model.safetensors", 100)
    error = refusal(capsys, lambda: resume(run, resume_from_checkpoint="checkpoint-2"))
    assert "checkpoint-2 cannot be resumed" in error and "model.safetensors has 100 bytes" in error


def test_fault_02_with_no_checkpoint_whole_nothing_starts_over_silently(run, two, capsys):
    for folder in checkpoints(two):
        (folder / "manifest.json").unlink()
    before = losses(two)
    error = refusal(capsys, lambda: resume(run))
    assert "none of the 2 checkpoints" in error and "choose another output_dir" in error
    assert error.count("has no manifest.json") == 2 and losses(two) == before


@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer.safetensors", "config.json", "README.md"])
def test_fault_03_one_flipped_bit_is_refused(saved, name):
    folder = saved()
    verify(folder)
    flip_a_bit(folder / name, -5)
    with pytest.raises(InputError, match=f"{name} is damaged: its sha256"):
        verify(folder)


def test_fault_03_one_flipped_bit_of_the_newest_falls_back_to_the_previous(saved, tmp_path, capsys):
    first, second = saved(1), saved(2)
    flip_a_bit(second / "state" / "optimizer.safetensors", -100)
    load_file(second / "state" / "optimizer.safetensors")  # which alone would take it
    assert newest_whole(tmp_path) == first and "optimizer.safetensors is damaged" in capsys.readouterr().err


def test_fault_04_a_disk_that_fills_within_the_last_save_ends_the_run_with_a_message(
    run, words, tmp_path, monkeypatch, capsys
):
    true, calls = checkpoint.save_file, []

    def fills(tensors, path, **options):
        calls.append(path)
        if len(calls) > 2:  # amid the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        true(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", fills)
    error = refusal(capsys, lambda: run("run", max_steps=2, save_steps=1))
    assert "checkpoint-2" in error and "No space left" in error and "the newest is checkpoint-1" in error
    folder = tmp_path / "run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1"] and not list(folder.glob(".checkpoint*"))
    verify(folder / "checkpoint-1")


def test_fault_04_a_limit_on_file_sizes_leaves_the_old_checkpoints_and_no_temporary_folder(saved, tmp_path, capsys):
    first = saved(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-2 .* was not saved"):
            saved(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint-2 was not saved" in capsys.readouterr().err
    assert newest_whole(tmp_path) == first and not list(tmp_path.glob(".checkpoint*"))
    assert saved(2) == tmp_path / "checkpoint-2"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_fault_04_a_read_only_folder_leaves_the_old_checkpoints(saved, tmp_path, capsys):
    first = saved(1)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            saved(2)
    finally:
        tmp_path.chmod(0o755)
    assert newest_whole(tmp_path) == first and not list(tmp_path.glob(".checkpoint*"))


def test_fault_04_an_output_dir_that_is_gone_is_said(saved, tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="checkpoint-1 .* was not saved .*No such file"):
        saved(1)


def test_fault_05_the_same_step_saved_twice_is_the_second_and_loses_nothing(saved, tmp_path):
    saved(1)
    with torch.no_grad():
        saved.model.model.norm.weight.fill_(2.5)
    folder = saved(1)
    verify(folder)
    assert bool((load_file(folder / "model.safetensors")["model.norm.weight"] == 2.5).all())
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]


def test_fault_07_lost_random_state_is_refused_by_name(saved):
    folder = saved()
    (folder / "state" / "random.safetensors").unlink()
    write_manifest(folder)
    verify(folder)
    with pytest.raises(InputError, match="random.safetensors is missing"):
        load_state(folder, model=saved.model, optimizer=saved.optimizer)


@pytest.mark.parametrize(
    "state",
    [{}, {"cpu": torch.zeros(5056)}, {"cpu": torch.zeros(16, dtype=torch.uint8)}, {"cuda0": torch.zeros(16)}],
    ids=["empty", "dtype", "shape", "only a GPU's"],
)
def test_fault_07_malformed_random_state_is_refused_and_nothing_restored(saved, state):
    folder, before = saved(), torch.get_rng_state()
    save_file(state, folder / "state" / "random.safetensors")
    saved.optimizer.state.clear()
    with pytest.raises(InputError, match="random.safetensors"):
        load_state(folder, model=saved.model, optimizer=saved.optimizer)
    assert torch.equal(torch.get_rng_state(), before) and not saved.optimizer.state


def test_fault_07_a_file_that_is_no_safetensors_is_refused_by_name(saved):
    folder = saved()
    (folder / "state" / "random.safetensors").write_bytes(b"\x02" + bytes(7) + b"no")
    with pytest.raises(InputError, match="random.safetensors is no safetensors file"):
        load_state(folder, model=saved.model, optimizer=saved.optimizer)


def test_fault_09_other_traces_are_refused_on_resuming(run, two, capsys, tokenizer, think):
    write_traces(two / "traces" / "train.jsonl", make_traces(tokenizer, think, 10, seed=3))
    shutil.rmtree(two / "checkpoint-2")
    shutil.rmtree(two / "teacher")
    before = losses(two)
    assert "checkpoint-1 was trained on other traces" in refusal(capsys, lambda: resume(run))
    assert losses(two) == before


def test_fault_09_another_recipe_is_refused_but_how_much_is_kept_may_change(run, two, capsys):
    assert "weight_decay: 0.0 -> 0.5" in refusal(capsys, lambda: resume(run, weight_decay=0.5))
    resume(run, save_total_limit=3, save_steps=2)


def test_fault_09_another_vocabulary_is_refused(saved, tokenizer):
    folder, other = saved(), make_tiny_model(tokenizer)
    other.resize_token_embeddings(len(tokenizer) + 64)
    optimizer = build_optimizer(other, learning_rate=1e-3, weight_decay=0.0)
    with pytest.raises(InputError, match=r"fits no parameter of this model.* another model or vocabulary"):
        load_state(folder, model=other, optimizer=optimizer)


def test_fault_09_no_optimizer_state_after_some_steps_is_refused(saved):
    folder = saved()
    save_file({}, folder / "state" / "optimizer.safetensors")
    with pytest.raises(InputError, match="holds no state after 1 steps"):
        load_state(folder, model=saved.model, optimizer=saved.optimizer)


@pytest.mark.parametrize("num_skipped", [3, 2])
def test_fault_09_a_checkpoint_before_the_first_step_that_was_taken_needs_no_state(saved, num_skipped):
    folder = saved(3)
    save_file({}, folder / "state" / "optimizer.safetensors")
    trainer = {"step": 3, "guard": {"num_skipped": num_skipped}}
    (folder / "state" / "trainer.json").write_text(json.dumps(trainer))
    saved.optimizer.state.clear()
    if num_skipped == 2:
        with pytest.raises(InputError, match="holds no state after 1 steps"):
            load_state(folder, model=saved.model, optimizer=saved.optimizer)
    else:
        step, stored = load_state(folder, model=saved.model, optimizer=saved.optimizer)
        assert step == 3 and stored["guard"] == trainer["guard"] and not saved.optimizer.state


@pytest.mark.parametrize(
    ("flags", "model"),
    [(dict(lora_rank=4), "base model"), (dict(teacher="online"), "teacher model")],
)
def test_fault_09_models_that_are_read_again_on_resuming_are_held_to_what_they_were(
    run, capsys, tiny_folder, tokenizer, flags, model
):
    pytest.importorskip("peft")
    flags = dict(max_steps=2, save_steps=1) | flags
    folder = run("run", **flags)
    shutil.rmtree(folder / "checkpoint-2")
    make_tiny_model(tokenizer, seed=7).save_pretrained(tiny_folder)
    before, again = losses(folder), dict(flags, resume_from_checkpoint="latest")
    if model == "base model":
        shutil.rmtree(folder / "teacher", ignore_errors=True)
    assert f"checkpoint-1 was trained on other {model} than this run has now" in refusal(
        capsys, lambda: run("run", **again)
    )
    assert losses(folder) == before
    trainer = json.loads((folder / "checkpoint-1" / "state" / "trainer.json").read_text())
    del trainer[model]  # as earlier versions wrote it
    (folder / "checkpoint-1" / "state" / "trainer.json").write_text(json.dumps(trainer))
    write_manifest(folder / "checkpoint-1")
    run("run", **again)


def test_fault_09_a_checkpoint_with_later_ones_beside_it_is_gone_back_to_when_they_are_away(run, two, tmp_path, capsys):
    before = losses(two)
    error = refusal(capsys, lambda: resume(run, resume_from_checkpoint="checkpoint-1"))
    assert "checkpoint-2 of" in error and "comes after checkpoint-1" in error and losses(two) == before
    (two / "checkpoint-2").rename(tmp_path / "away")
    resume(run, resume_from_checkpoint="checkpoint-1")
    assert losses(two) == before


def test_fault_09_a_complete_run_that_is_resumed_says_so(run, two, capsys):
    before = losses(two)
    resume(run)
    assert "checkpoint-2 is the last of 2 steps: the run is complete" in capsys.readouterr().out
    assert losses(two) == before


def test_fault_09_a_checkpoint_beyond_the_runs_steps_is_refused(run, two, capsys):
    beyond = two / "checkpoint-7"
    shutil.copytree(two / "checkpoint-2", beyond)
    trainer = json.loads((beyond / "state" / "trainer.json").read_text()) | {"step": 7}
    (beyond / "state" / "trainer.json").write_text(json.dumps(trainer))
    write_manifest(beyond)
    assert "checkpoint-7 is beyond the 2 steps" in refusal(capsys, lambda: resume(run))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def with_pickle(folder):
    (folder / "state" / "optimizer.bin").write_bytes(pickle.dumps(Evil()))


def with_pickle_listed(folder):
    with_pickle(folder)
    write_manifest(folder)


def with_endless_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def with_endless_header_listed(folder):
    with_endless_header(folder)
    write_manifest(folder)


def with_long_header_listed(folder):
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(100_000_100)
    write_manifest(folder)


def with_index(shard):
    def change(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        write_manifest(folder)

    return change


def with_manifest(**entries):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] |= entries
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def with_link(name):
    def change(folder):
        path = folder / name
        target = shutil.move(path, folder.parent / "elsewhere")
        path.symlink_to(target)

    return change


def with_file(name, content="{}"):
    return lambda folder: (folder / name).write_text(content)


def with_pipe(folder):
    os.mkfifo(folder / "notes")


ENTRY = {"num_bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change,message",
    [
        (with_pickle, r"optimizer\.bin: only safetensors and JSON"),
        (with_pickle_listed, r"optimizer\.bin: only safetensors and JSON"),
        (with_endless_header_listed, "model.safetensors: its header claims 4611686018427387904 bytes"),
        (with_endless_header, "model.safetensors: its header claims 4611686018427387904 bytes"),
        (with_long_header_listed, "its header claims 100000001 bytes, expected at most"),
        (with_index("../x.safetensors"), "'../x.safetensors' is no plain name"),
        (with_index("/etc/passwd"), "'/etc/passwd' is no plain name"),
        (with_index(["x"]), "is no plain name"),
        (with_index("other.safetensors"), "names other.safetensors, which the manifest does not list"),
        (with_manifest(**{"../x": ENTRY}), "'../x' is no plain name"),
        (with_manifest(**{"/etc/passwd": ENTRY}), "'/etc/passwd' is no plain name"),
        (with_manifest(**{"state/../../x": ENTRY}), "is no plain name"),
        (with_manifest(**{"config.json": {"num_bytes": "1"}}), "expected num_bytes and a sha256"),
        (with_manifest(**{"config.json": [1]}), "expected num_bytes and a sha256"),
        (with_file("manifest.json", "{"), "manifest.json is not JSON"),
        (with_file("manifest.json", "[" * 100_000), "manifest.json is not JSON"),
        (with_file("manifest.json", "[]"), "expected a JSON object"),
        (with_file("manifest.json", '{"format": 2}'), "expected format 1, got 2"),
        (with_file("manifest.json", '{"format": 1, "files": {}}'), "expected the files of the checkpoint"),
        (with_file("manifest.json", " " * (MAX_MANIFEST_BYTES + 1)), "expected at most 16777216"),
        (with_link("model.safetensors"), "model.safetensors is a link"),
        (with_link("state"), "state is a link"),
        (with_pipe, "notes is a link or a device"),
        (with_file("state/more.safetensors"), "more.safetensors is not in the manifest"),
        (with_file("model-00002-of-00002.safetensors"), "is not in the manifest"),
        (with_file("adapter_config.json"), "adapter_config.json is not in the manifest"),
    ],
)
def test_fault_27_a_malicious_checkpoint_is_refused_by_name_and_nothing_executed(
    saved, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    folder = saved()
    change(folder)
    around = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    with pytest.raises(InputError, match=message):
        verify(folder)
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        newest_whole(tmp_path)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == around
    assert not Path("executed").exists()


def test_fault_27_a_link_in_place_of_a_checkpoint_is_refused(saved, tmp_path):
    saved(1)
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match="expected a folder, not a link"):
        verify(tmp_path / "checkpoint-2")


def test_notes_beside_a_checkpoints_files_do_no_harm(saved):
    folder = saved()
    (folder / "notes.md").write_text("mine")
    verify(folder)
