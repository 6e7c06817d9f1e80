import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trsd_kernels import cu_seqlens_of, pack_sequences, position_ids_of


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_pack_sequences_places_every_sequence_once_within_the_limit(lengths, max_tokens):
    rows = pack_sequences(lengths, max_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= max_tokens for row in rows)
    assert rows == pack_sequences(lengths, max_tokens)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_pack_sequences_opens_a_row_only_when_no_other_has_room(lengths):
    rows = pack_sequences(lengths, 64)
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 64  # any-fit: no two rows could be one


def test_pack_sequences_prefers_the_tightest_row():
    assert pack_sequences([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_pack_sequences_refuses_what_cannot_fit_by_index(lengths):
    with pytest.raises(ValueError, match="sequence 1 has"):
        pack_sequences(lengths, 10)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20))
def test_offsets_and_positions_restart_with_every_sequence(lengths):
    cu_seqlens = cu_seqlens_of(lengths)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist() == lengths and cu_seqlens[0] == 0
    assert position_ids_of(lengths).tolist() == [i for length in lengths for i in range(length)]
