"""Heads sharded over two and three processes against one process that holds them whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distillation_cases import DIVERGENCES, FP32_BOUND, REGIMES, make_case, relative_error

from trsd_kernels import fused_linear_distillation
from trsd_kernels.vocab_parallel import _packed, _unpacked, vocab_parallel_distillation

VOCAB = 61
CUTS = {2: (0, 20, VOCAB), 3: (0, 7, 40, VOCAB)}
CASES = [
    dict(divergence=divergence, regime=regime, temperature=temperature, dtype=dtype)
    for divergence in DIVERGENCES
    for regime in REGIMES
    for temperature, dtype in ((1.0, torch.float32), (2.0, torch.float64))
]


def build(case):
    return make_case(23, VOCAB, dtype=case["dtype"], regime=case["regime"], bias=True, ignored=[4])


def options_of(case):
    return dict(divergence=case["divergence"], temperature=case["temperature"], student_logit_softcap=20.0)


def shard_of(tensors, rank, world_size):
    part = slice(*CUTS[world_size][rank : rank + 2])
    return {
        name: tensor[part].detach().clone().requires_grad_(tensor.requires_grad) if "lm_head" in name else tensor
        for name, tensor in tensors.items()
    }


def run_cases(folder):
    dist.init_process_group("gloo")
    rank, world_size, results = dist.get_rank(), dist.get_world_size(), []
    for case in CASES:
        tensors = shard_of(build(case).tensors(), rank, world_size)
        out = vocab_parallel_distillation(**tensors, chunk_size=5, **options_of(case))
        out.loss.backward()
        grads = {name: tensor.grad for name, tensor in tensors.items() if tensor.requires_grad}
        results.append((out.loss.detach(), out.per_token, grads))
    tensors = shard_of(build(CASES[0]).tensors(), rank, world_size)
    losses = vocab_parallel_distillation(**tensors, reduction="none").loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses.sum(), tensors["student_hidden_states"], create_graph=True)
    torch.save((results, losses.detach()), Path(folder, f"{rank}.pt"))


def run_refusals(folder):
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = shard_of(build(CASES[0]).tensors(), rank, world_size)
    messages = []
    for changed in (
        dict(token_weights=torch.ones(3)) if rank == 1 else {},  # one rank's inputs are wrong
        dict(labels=(tensors["labels"] + rank).clamp(max=VOCAB - 1)),  # other labels on every rank
        dict(labels=torch.full((23,), VOCAB)),
        dict(token_weights=torch.linspace(1, 2 + rank, 23)),
        dict(divergence="jsd" if rank else "forward_kl"),
        dict(alpha=2.0) if rank else {},
        dict(chunk_size=-5),
    ):
        try:
            vocab_parallel_distillation(**tensors | changed)
        except ValueError as error:
            messages.append(str(error))
    torch.save(messages, Path(folder, f"{rank}.pt"))


def over_ranks(launch, work, world_size, folder):
    """What each rank saved of ``work``."""
    launch.call(work, str(folder), num_ranks=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_heads_give_the_single_process_result(world_size, tmp_path, launch):
    ranks = over_ranks(launch, run_cases, world_size, tmp_path)
    for index, case in enumerate(CASES):
        whole = build(case)
        out = fused_linear_distillation(**whole.tensors(), **options_of(case))
        out.loss.backward()
        exact = case["dtype"] == torch.float64
        # A term is a difference of logits of up to 40, whose fp32 neighbours are 4e-6 apart.
        tolerance = {} if exact else dict(rtol=1e-5, atol=2e-5)
        for results, _ in ranks:
            loss, terms, grads = results[index]
            torch.testing.assert_close(loss, out.loss.detach(), **tolerance)
            for got, wanted in zip(terms, out.per_token, strict=True):
                torch.testing.assert_close(got, wanted, **tolerance)
            wanted = whole.student_hidden_states.grad.double()
            assert relative_error(grads["student_hidden_states"], wanted) <= (1e-12 if exact else FP32_BOUND), case
        for name in ("student_lm_head_weight", "student_lm_head_bias"):
            together = torch.cat([results[index][2][name] for results, _ in ranks])
            error = relative_error(together, getattr(whole, name).grad.double())
            assert error <= (1e-12 if exact else FP32_BOUND), (case, name)
    alone = fused_linear_distillation(**build(CASES[0]).tensors(), reduction="none").loss.detach()
    for _, losses in ranks:
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)


def test_what_one_rank_refuses_every_rank_raises(tmp_path, launch):
    first, second = over_ranks(launch, run_refusals, 2, tmp_path)
    assert len(first) == len(second) == 7
    assert "rank 1 of the group refused" in first[0] and "token_weights" in second[0]
    assert "the same labels on every rank" in first[1] and "the same labels on every rank" in second[1]
    assert f"outside [0, {VOCAB})" in first[2]
    assert "the same token_weights" in first[3] and "the same token_weights" in second[3]
    assert "the same options" in first[4] and "the same options" in second[4]
    assert "rank 1 of the group refused" in first[5] and "alpha" in second[5]
    assert "chunk_size" in first[6]


def test_autocast_around_backward_changes_no_gradient(one_rank):
    found = []
    for enabled in (False, True):
        tensors = build(CASES[0]).tensors()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            vocab_parallel_distillation(**tensors).loss.backward()
        found.append([tensor.grad for tensor in tensors.values() if tensor.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_packed_maxima_keep_their_order_and_their_lowest_token():
    numbers = torch.tensor([-torch.inf, -3.5, -1e-30, 0.0, 1e-30, 2.0, 1e30, torch.inf])
    ids = torch.arange(8) * 1000
    keys = _packed(numbers, ids)
    assert (keys.diff() > 0).all()
    maxima, tops = _unpacked(keys)
    assert torch.equal(maxima, numbers) and torch.equal(tops, ids)
    assert _packed(torch.tensor(2.0), torch.tensor(3)) > _packed(torch.tensor(2.0), torch.tensor(4))
