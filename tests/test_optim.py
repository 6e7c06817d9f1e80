import pytest
import torch

from trsd.optim import build_optimizer, learning_rate_factor, set_learning_rate


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


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_step_counter_lies_where_the_optimizer_looks_for_it(fused):
    from trsd.checkpoint import optimizer_tensors, restore_optimizer

    with torch.device("meta"):  # stands for a GPU
        there = torch.nn.Linear(2, 3)
    here = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(here.parameters())
    here(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(there.parameters())
    other.param_groups[0]["fused"] = fused
    restore_optimizer(there, other, optimizer_tensors(here, optimizer))
    state = other.state[there.weight]
    assert state["exp_avg"].device.type == "meta" and state["step"].device.type == ("meta" if fused else "cpu")
