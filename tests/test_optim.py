"""AdamW over two groups in 32, 8 and 4 bits, its state in files, and learning rates."""

import shutil
import sys

import pytest
import torch
from conftest import losses, refusal
from safetensors.torch import load_file, save_file

from trsd.optim import (
    build_optimizer,
    learning_rate_factor,
    restore_state,
    rounded_up,
    set_learning_rate,
    state_bytes,
    state_tensors,
)


@pytest.mark.parametrize("warmup_ratio", [0.1, 0.3])
@pytest.mark.parametrize("num_steps", [20, 101])
def test_onecycle_is_torchs(num_steps, warmup_ratio):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=num_steps, pct_start=warmup_ratio, cycle_momentum=False
    )
    for step in range(num_steps):
        ours = learning_rate_factor("onecycle", step, num_steps=num_steps, warmup_ratio=warmup_ratio)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        if step + 1 < num_steps:
            schedule.step()


def test_cosine_warms_up_peaks_and_falls():
    factors = [learning_rate_factor("cosine", s, num_steps=100, warmup_ratio=0.1) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_constant_stays_at_the_peak():
    assert [learning_rate_factor("constant", s, num_steps=4, warmup_ratio=0.5) for s in range(4)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize("name", ["cosine", "constant", "onecycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_have_a_positive_finite_rate(name, num_steps):
    for step in range(num_steps):
        assert 0 < learning_rate_factor(name, step, num_steps=num_steps, warmup_ratio=0.1) <= 1


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, learning_rate=1.0, weight_decay=0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.5
    assert decays[id(model[0].bias)] == decays[id(model[1].weight)] == 0.0
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_state_is_handed_out_where_it_lies():
    """The checkpoint copies it: to the CPU at once would be a second copy there, beside the one that is written."""
    here = torch.nn.Linear(2, 3, device="meta")  # stands for a GPU
    optimizer = torch.optim.AdamW(here.parameters())
    here(torch.ones(1, 2, device="meta")).sum().backward()
    optimizer.step()
    found = state_tensors(here, optimizer)
    assert found["exp_avg/weight"].device.type == "meta" and found["exp_avg/weight"].shape == (3, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_step_counter_lies_where_the_optimizer_looks_for_it(fused):

    with torch.device("meta"):  # stands for a GPU
        there = torch.nn.Linear(2, 3)
    here = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(here.parameters())
    here(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(there.parameters())
    other.param_groups[0]["fused"] = fused
    restore_state(there, other, state_tensors(here, optimizer))
    state = other.state[there.weight]
    assert state["exp_avg"].device.type == "meta" and state["step"].device.type == ("meta" if fused else "cpu")


LOW_BIT = {"adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao", "adamw_bnb_8bit": "bitsandbytes"}


@pytest.fixture(params=LOW_BIT)
def low_bit(request):
    """The name of an optimizer whose package is installed."""
    pytest.importorskip(LOW_BIT[request.param])
    return request.param


def stepped(name, num_steps):
    """(model, optimizer) after some steps of a layer large enough to be kept in few bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.LayerNorm(96))
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, name=name)
    walk(model, optimizer, range(num_steps))
    return model, optimizer


def walk(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        model(torch.randn(8, 128, generator=generator)).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(tensors, path):
    save_file(tensors, path)
    return load_file(path)


@pytest.mark.parametrize("stopped_after", [0, 1, 3])
@pytest.mark.parametrize("name", ["adamw_torch", *LOW_BIT])
def test_fault_06_an_optimizer_restored_from_a_file_goes_on_bit_for_bit(name, stopped_after, tmp_path):
    if name in LOW_BIT:
        pytest.importorskip(LOW_BIT[name])
    whole, _ = stepped(name, 6)
    part, optimizer = stepped(name, stopped_after)
    tensors = through_a_file(state_tensors(part, optimizer), tmp_path / "state.safetensors")
    again = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.LayerNorm(96))
    again.load_state_dict(part.state_dict())
    other = build_optimizer(again, learning_rate=1.0, weight_decay=0.1, name=name)
    restore_state(again, other, tensors)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), part.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in again.parameters())
    restored = state_tensors(again, other)
    assert restored.keys() == tensors.keys() and all(torch.equal(restored[key], tensors[key]) for key in tensors)
    walk(again, other, range(stopped_after, 6))
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), whole.parameters(), strict=True))


def test_low_bit_moments_take_a_quarter_or_an_eighth_and_small_ones_stay_whole(low_bit):
    model, optimizer = stepped(low_bit, 1)
    large, small = model[0].weight.numel(), sum(p.numel() for p in model.parameters() if p.ndim < 2)
    bits = 4 if "4bit" in low_bit else 8
    moments = 2 * large * bits / 8 + 2 * 4 * small
    assert moments < state_bytes(optimizer) < 1.1 * moments + 8 * 256 * 2
    assert state_bytes(stepped("adamw_torch", 1)[1]) == 8 * (large + small)


def test_low_bit_steps_follow_those_of_fp32_moments(low_bit):
    start, exact, near = (stepped(name, steps)[0][0].weight for name, steps in (
        ("adamw_torch", 0), ("adamw_torch", 6), (low_bit, 6)
    ))  # fmt: skip
    assert 0 < (near - exact).norm() < 0.2 * (exact - start).norm()


def test_low_bit_optimizers_decay_matrices_only_and_follow_the_learning_rate(low_bit):
    model, optimizer = stepped(low_bit, 0)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.1 and decays[id(model[0].bias)] == 0.0
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    set_learning_rate(optimizer, 0.5)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.5}
    optimizer.step()
    assert (model[0].weight - before[0]).abs().max() > 0.4


def test_another_optimizers_state_is_refused(low_bit):
    model, optimizer = stepped(low_bit, 1)
    plain, adamw = stepped("adamw_torch", 1)
    with pytest.raises(ValueError, match="another optimizer's"):
        restore_state(model, optimizer, state_tensors(plain, adamw))
    tensors = state_tensors(model, optimizer)
    short = {key: value[:1] if value.ndim else value for key, value in tensors.items()}
    with pytest.raises(ValueError, match="fits no parameter of this model: expected"):
        restore_state(*stepped(low_bit, 0), short)
    with pytest.raises(ValueError, match="fits no parameter"):
        restore_state(*stepped(low_bit, 0), {f"{key}x": value for key, value in tensors.items()})


@pytest.mark.parametrize("name", LOW_BIT)
def test_fault_33_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    for package in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"optim {name} needs {LOW_BIT[name]}: pip install 'trsd\[lowbit\]'"):
        build_optimizer(torch.nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, name=name)


def test_fault_33_a_run_without_the_optimizers_package_ends_with_exit_code_2_and_nothing_made(
    run, capsys, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    assert "pip install 'trsd[lowbit]'" in refusal(capsys, lambda: run(optim="adamw_torch_8bit"))
    assert not (tmp_path / "run").exists()


def test_fault_06_training_in_low_bits_resumes_bit_for_bit(low_bit, run, tmp_path):
    whole = run("whole", optim=low_bit, max_steps=4, save_steps=2)
    state = load_file(whole / "checkpoint-4" / "state" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-4")
    run("part", optim=low_bit, max_steps=4, save_steps=2, resume_from_checkpoint="latest")
    assert losses(part) == losses(whole)
    for file in ("model.safetensors", "state/optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / file) for folder in (whole, part))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file


def test_a_plan_counts_the_moments_in_the_bits_they_are_kept_in(monkeypatch):
    pytest.importorskip("torchao")
    from trsd import planner
    from trsd.plan import parse

    monkeypatch.setattr(planner, "alternatives", lambda *_, **__: [])

    def states(optim):
        plan = planner.run(*parse(["--model", "bundled:reasoner", "--gpu", "H100", "--optim", optim])[:2])
        return plan.cost.held["optimizer state"]

    assert states("adamw_torch_4bit") < 0.6 * states("adamw_torch_8bit") < 0.2 * states("adamw_torch")


@pytest.mark.parametrize(
    ("steps", "whole"), [(0.55 * 100 / 5, 11), (0.07 * 100, 7), (11.01, 12), (3.0, 3), (1e-9, 1), (0.0, 0)]
)
def test_steps_are_rounded_up_but_not_for_the_rounding_of_a_product(steps, whole):
    assert rounded_up(steps) == whole
