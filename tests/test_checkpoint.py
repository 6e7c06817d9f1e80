"""Saving beside training: what is on disk is the moment of the save, which checkpoints stay, and when a save fails."""

import errno
import json
import shutil
import threading

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file
from test_models import KINDS, small_model
from transformers import AutoModelForCausalLM

from trsd import checkpoint, checkpoint_folders
from trsd.checkpoint import Checkpointer, SaveError, load_state, shell_of, take_snapshot, write_snapshot
from trsd.checkpoint_folders import checkpoints, newest_whole, sweep
from trsd.errors import InputError
from trsd.manifest import verify
from trsd.optim import build_optimizer


class Trained:
    """The tiny model with AdamW's state, and steps that change both."""

    def __init__(self, tokenizer, seed=0):
        self.model = make_tiny_model(tokenizer, seed=seed)
        self.optimizer = build_optimizer(self.model, learning_rate=1e-2, weight_decay=0.1)
        self.step()

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self):
        """Copies of weights and moments by their names in the files."""
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"}
        return state, {
            f"{key}/{name}": value.clone()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }


@pytest.fixture
def trained(tokenizer):
    return Trained(tokenizer)


@pytest.fixture
def make_checkpointer(tokenizer, tmp_path):
    def make(**settings):
        return Checkpointer(tmp_path, tokenizer, card=lambda step: f"# Step {step}\n", **settings)

    return make


@pytest.fixture
def save(make_checkpointer, trained):
    """Save a step, whole on return."""

    def save(step, checkpointer=None, **trainer):
        checkpointer = checkpointer or make_checkpointer()
        checkpointer.save(step, model=trained.model, optimizer=trained.optimizer, trainer=trainer)
        return checkpointer.wait()

    return save


def on_disk(folder):
    return load_file(folder / "model.safetensors"), load_file(folder / "state" / "optimizer.safetensors")


def same(one, other):
    return all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(one, other, strict=True)
    )


def names(output_dir):
    return [path.name for path in checkpoints(output_dir)]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_the_moment_of_the_save_while_training_goes_on(trained, make_checkpointer, monkeypatch):
    go_on, true = threading.Event(), checkpoint.write_snapshot
    monkeypatch.setattr(checkpoint, "write_snapshot", lambda *a: go_on.wait(10) and true(*a))
    before, drawn = trained.everything(), torch.get_rng_state()
    checkpointer = make_checkpointer()
    checkpointer.save(1, model=trained.model, optimizer=trained.optimizer, trainer={})
    for _ in range(3):
        trained.step()
    after = trained.everything()
    go_on.set()
    folder = checkpointer.wait()
    assert same(on_disk(folder), before) and not same(after, before)
    assert torch.equal(load_file(folder / "state" / "random.safetensors")["cpu"], drawn)


def test_a_second_save_waits_for_the_first(trained, make_checkpointer, tmp_path, monkeypatch):
    inside, most, true = [0], [0], checkpoint.write_snapshot

    def counted(*arguments):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.05)
        true(*arguments)
        inside[0] -= 1

    monkeypatch.setattr(checkpoint, "write_snapshot", counted)
    checkpointer = make_checkpointer()
    for step in (1, 2, 3):
        checkpointer.save(step, model=trained.model, optimizer=trained.optimizer, trainer={})
    assert checkpointer.wait() == tmp_path / "checkpoint-3"
    assert most == [1] and names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_state_is_restored_bit_for_bit_in_memory_of_its_own(trained, save, tokenizer):
    folder, drawn = save(1, history=[1.5, 2.5]), torch.rand(3)
    other = Trained(tokenizer, seed=5)
    other.model.load_state_dict(trained.model.state_dict())
    assert load_state(folder, model=other.model, optimizer=other.optimizer) == (1, {"history": [1.5, 2.5]})
    assert torch.equal(torch.rand(3), drawn)
    assert same(other.everything(), trained.everything())
    moments = folder / "state" / "optimizer.safetensors"
    moments.write_bytes(bytes(moments.stat().st_size))  # a view of the file would change with it
    assert same(other.everything(), trained.everything())


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe", "mixtral"])
def test_the_model_is_written_as_transformers_writes_it(kind, tmp_path):
    """Also where the names in memory are not those in the files, as with experts."""
    extra = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    small_model(kind, **(extra if kind in ("qwen3_moe", "mixtral") else {})).save_pretrained(tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    model.set_attn_implementation("trsd_varlen")
    state = torch.get_rng_state()
    shell = shell_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    write_snapshot(take_snapshot(1, model=model, optimizer=optimizer, trainer={}), tmp_path / "ours", shell)
    model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "state",
        *(path.name for path in (tmp_path / "theirs").iterdir()),
    }


def test_names_that_a_model_was_loaded_by_are_the_names_it_is_written_by(tmp_path):
    model = small_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model._weight_conversions = []  # its experts were not one file entry each
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    write_snapshot(take_snapshot(1, model=model, optimizer=optimizer, trainer={}), tmp_path, shell_of(model))
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == model.state_dict().keys() and any("gate_up_proj" in name for name in written)


def test_a_save_that_fails_is_a_warning_and_the_next_one_tries_again(
    trained, make_checkpointer, save, tmp_path, monkeypatch, capsys
):
    checkpointer = make_checkpointer()
    save(1, checkpointer)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        checkpointer.save(2, model=trained.model, optimizer=trained.optimizer, trainer={})
        checkpointer._join()
    checkpointer.save(3, model=trained.model, optimizer=trained.optimizer, trainer={})
    assert checkpointer.wait() == tmp_path / "checkpoint-3"
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "checkpoint-2 was not saved (OSError: [Errno 28] No space left" in error
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"] and not list(tmp_path.glob(".*"))


def test_the_last_save_of_a_run_raises_when_it_fails(save, make_checkpointer, tmp_path, monkeypatch):
    checkpointer = make_checkpointer()
    save(1, checkpointer)
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(SaveError, match="checkpoint-2 .* was not saved .* the newest is checkpoint-1"):
        save(2, checkpointer)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"


def test_copies_that_do_not_fit_in_memory_are_a_failed_save(save, monkeypatch, capsys):
    def no_memory(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(checkpoint, "_copies", no_memory)
    with pytest.raises(SaveError, match="allocate memory"):
        save(1)
    assert "checkpoint-1 was not saved" in capsys.readouterr().err


def test_a_disk_with_too_little_room_is_said_before_anything_is_written(save, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "write_snapshot", lambda *_: written.append(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(SaveError, match=r"it takes [1-9]\d* MiB and .* has 0 MiB free"):
        save(1)
    assert not written


def test_the_oldest_beyond_the_limit_are_removed(save, make_checkpointer, tmp_path):
    checkpointer = make_checkpointer(save_total_limit=2)
    for step in (1, 2, 10):
        save(step, checkpointer)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-10"]
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "best.json").exists()


def test_the_best_is_kept_and_named_also_by_the_run_that_resumes(save, make_checkpointer, tmp_path):
    first = make_checkpointer(save_total_limit=2)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.25)):
        save(step, first, validation_loss=loss)
    again = make_checkpointer(save_total_limit=2)
    for step, loss in ((4, float("nan")), (5, 0.75)):
        save(step, again, validation_loss=loss)
    best = {"checkpoint": "checkpoint-2", "step": 2, "validation_loss": 0.25}
    assert json.loads((tmp_path / "best.json").read_text()) == best
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    save(6, again, validation_loss=0.125)
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "checkpoint-6"
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_with_a_limit_of_one_the_newest_and_the_best_stay(save, make_checkpointer, tmp_path):
    checkpointer = make_checkpointer(save_total_limit=1)
    for step, loss in ((1, 0.5), (2, 0.75), (3, 1.0)):
        save(step, checkpointer, validation_loss=loss)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_what_was_just_saved_stays_where_an_older_checkpoint_was_resumed(save, make_checkpointer, tmp_path):
    for step in (2, 6, 8):
        save(step)
    save(4, make_checkpointer(save_total_limit=1))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_set_aside_comes_back_where_its_successor_never_came(save, tmp_path):
    folder = save(1)
    folder.rename(tmp_path / ".checkpoint-1.replaced")
    assert newest_whole(tmp_path) is None
    sweep(tmp_path)
    assert newest_whole(tmp_path) == folder and not list(tmp_path.glob(".*"))


def test_a_checkpoint_set_aside_is_removed_where_its_successor_came(trained, save, tmp_path):
    folder = save(1)
    shutil.copytree(folder, tmp_path / ".checkpoint-1.replaced")
    trained.step()
    save(1)
    now = trained.everything()
    sweep(tmp_path)
    assert same(on_disk(folder), now) and not list(tmp_path.glob(".*"))


def test_a_replacement_that_cannot_be_named_leaves_the_old_one(trained, save, tmp_path, monkeypatch):
    folder, before, rename = save(1), trained.everything(), checkpoint_folders.os.rename
    trained.step()

    def fails(source, target):
        if source.name.startswith(".checkpoint-1.") and not source.name.endswith(".replaced"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(checkpoint_folders.os, "rename", fails)
    with pytest.raises(SaveError, match="Input/output error"):
        save(1)
    verify(folder)
    assert same(on_disk(folder), before) and not list(tmp_path.glob(".*"))


def test_a_limit_below_one_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("run", save_total_limit=0)
    assert "save_total_limit: expected at least 1" in capsys.readouterr().err


def test_a_limit_given_on_resume_is_followed(run):
    folder = run("run", save_steps=1, max_steps=4)
    shutil.rmtree(folder / "checkpoint-4")
    run("run", save_steps=1, max_steps=4, save_total_limit=2, resume_from_checkpoint="latest")
    assert names(folder) == ["checkpoint-3", "checkpoint-4"]


def test_a_trainer_that_is_no_json_raises_at_once(save):
    with pytest.raises(TypeError, match="JSON"):
        save(1, value=torch.ones(1))


@pytest.mark.parametrize("content", ["{}", '{"step": "1"}', '{"step": true}', '{"step": 2}', "[1]", "{", "\udcff"])
def test_a_malformed_trainer_is_refused_by_name(trained, save, content):
    folder = save(1)
    (folder / "state" / "trainer.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="trainer.json"):
        load_state(folder, model=trained.model, optimizer=trained.optimizer)
