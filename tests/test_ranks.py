"""How a step's rows are shared between ranks."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from trsd.batching import Example, pack_examples
from trsd.errors import InputError
from trsd.launch import launched_ranks
from trsd.ranks import REPLICAS, SHARDS, Ranks, open_ranks
from trsd.row_shares import share_rows
from trsd_kernels.layout import pack_sequences


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(50, 120))
def test_every_sequence_is_on_one_rank_and_all_ranks_run_as_many_rows(lengths, num_ranks, max_tokens):
    rows = pack_sequences(lengths, max_tokens)
    shares = [share_rows(rows, lengths, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
    assert sorted(index for share in shares for row in share for index in row) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert all(sum(lengths[index] for index in row) <= max_tokens for share in shares for row in share)
    if any(not row for share in shares for row in share):  # only where nothing can be split
        assert all(len(row) <= 1 for share in shares for row in share)
    if num_ranks == 1:
        assert shares == [rows]


def test_rows_that_run_at_the_same_time_are_of_like_length():
    lengths = [100, 90, 50, 40, 10, 5]
    rows = [[index] for index in range(6)]
    first, second = (share_rows(rows, lengths, num_ranks=2, rank=rank) for rank in range(2))
    assert [(lengths[a], lengths[b]) for (a,), (b,) in zip(first, second, strict=True)] == [
        (100, 90),
        (50, 40),
        (10, 5),
    ]


def test_a_rank_without_a_row_runs_one_that_weighs_nothing():
    examples = [Example(trace_index=n, input_ids=[1] * (n + 2), labels=[2, 2]) for n in range(2)]
    batches = [pack_examples(examples, 8, "cpu", num_ranks=3, rank=rank) for rank in range(3)]
    assert [len(found) for found in batches] == [1, 1, 1]
    assert [found[0].num_items for found in batches] == [2, 2, 0]
    idle = batches[2][0]
    assert not idle.weights.any() and not idle.thinking_weights.any() and idle.num_tokens == 2


@pytest.mark.parametrize("variables", [dict(RANK="2", WORLD_SIZE="2"), dict(RANK="x", WORLD_SIZE="2")])
def test_an_environment_that_is_no_rank_is_refused(monkeypatch, variables):
    for name, value in (dict(MASTER_ADDR="localhost", MASTER_PORT="1") | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="are no rank of a run: start it by torchrun"):
        launched_ranks()


def test_ranks_that_know_no_address_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="MASTER_ADDR or MASTER_PORT is missing: start it by torchrun"):
        launched_ranks()


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="4 ranks do not divide into groups of 3"):
        Ranks(size=4).mesh(3)


def wait_in_groups():
    with open_ranks(2) as ranks:
        assert ranks.timeout == timedelta(seconds=2)
        mesh = ranks.mesh(2)
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == (REPLICAS, SHARDS)
        mine = {name: dist.get_process_group_ranks(mesh.get_group(name)) for name in (REPLICAS, SHARDS)}
        row, column = divmod(ranks.rank, 2)
        assert mine == {REPLICAS: [column, column + 2], SHARDS: [2 * row, 2 * row + 1]}
        for name in (REPLICAS, SHARDS):
            if dist.get_rank(mesh.get_group(name)) == 0:
                began = time.monotonic()
                with pytest.raises(RuntimeError, match="Timed out"):
                    dist.all_reduce(torch.ones(()), group=mesh.get_group(name))
                assert 1 < time.monotonic() - began < 60  # torch's own is half an hour
            ranks.wait()


def test_groups_of_ranks_wait_no_longer_than_the_run_says(launch):
    launch.call(wait_in_groups, num_ranks=4)
