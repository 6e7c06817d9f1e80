"""Memory that is not there: what is refused, warned of, and said when it runs out."""

import os

import pytest
import torch

from trsd import memory
from trsd.errors import InputError
from trsd.memory import OutOfMemory, out_of_memory_says, refuse_too_large, total_memory, turned_down, warn_of_training
from trsd.recipe import Recipe, with_method_defaults
from trsd.weight_files import count_weights


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine of so many bytes."""

    def machine(**sizes):
        monkeypatch.setattr(memory, "total_memory", sizes.__getitem__)

    return machine


def test_memory_is_that_of_the_machine_or_less_in_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ())
    whole = total_memory("cpu")
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [tmp_path / "max", tmp_path / "bytes", tmp_path / "absent"]
    limits[0].write_text("max\n")
    limits[1].write_text("1048576\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", limits)
    assert total_memory("cpu") == 2**20


@pytest.mark.parametrize("device,sizes", [("cpu", {"cpu": 0}), ("cuda", {"cpu": 0, "cuda": 1}), ("cuda", {"cuda": 0})])
def test_weights_are_refused_where_they_are_one_byte_too_many(tiny_folder, machine, device, sizes):
    """On a GPU they come by way of the CPU's memory, and each must hold them."""
    needed = 2 * count_weights(tiny_folder)
    machine(**{"cpu": needed} | {name: needed - 1 + spare for name, spare in sizes.items()})
    with pytest.raises(InputError, match="GiB in bfloat16"):
        refuse_too_large(tiny_folder, dtype=torch.bfloat16, device=device)
    machine(cpu=needed, cuda=needed)
    refuse_too_large(tiny_folder, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("optim,each", [("adamw_torch", 16), ("adamw_torch_8bit", 10), ("adamw_torch_4bit", 9)])
def test_training_is_warned_of_where_weights_gradients_and_moments_are_too_many(
    tiny_folder, machine, capsys, optim, each
):
    recipe, needed = with_method_defaults(Recipe(optim=optim)), each * count_weights(tiny_folder)
    machine(cpu=needed)
    warn_of_training(tiny_folder, recipe, device="cpu")
    assert not capsys.readouterr().err
    machine(cpu=needed - 1)
    warn_of_training(tiny_folder, recipe, device="cpu")
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and ("--optim adamw_torch_8bit" in said) == (optim == "adamw_torch")


def test_what_a_recipe_does_already_is_not_advised():
    recipe = Recipe(lora_rank=8, gradient_checkpointing=True, optim="adamw_torch_8bit", teacher="online", alpha=1.0)
    assert "--teacher hidden_cache" in turned_down(recipe)
    assert not any(name in turned_down(recipe) for name in ("--lora_rank", "--gradient_checkpointing", "--optim"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_runs_out_is_said_by_who_is_nearest(error):
    with pytest.raises(OutOfMemory) as said, out_of_memory_says("further out"), out_of_memory_says("lower this"):
        raise error
    assert str(said.value).endswith(": lower this") and "more" not in str(said.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^a fault$"), out_of_memory_says("lower this"):
        raise RuntimeError("a fault")
