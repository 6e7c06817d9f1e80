import pytest
import torch
from attention_cases import ROWS, row, rows
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from trsd_kernels import (
    fill_rate,
    layout_of,
    pack_sequences,
    packed_layout,
    predicting_rows,
    shift_labels,
)
from trsd_kernels.attention_tiles import key_tiles, prefix_ends, query_tiles
from trsd_kernels.reference import visible_keys


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
    assert fill_rate(lengths, len(rows), 64) == sum(fills) / (64 * len(rows))


def test_pack_sequences_prefers_the_tightest_row():
    assert pack_sequences([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_pack_sequences_refuses_what_cannot_fit_by_index(lengths):
    with pytest.raises(ValueError, match="sequence 1 has"):
        pack_sequences(lengths, 10)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20))
def test_offsets_and_positions_restart_with_every_sequence(lengths):
    given = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for layout in (packed_layout(lengths), layout_of(given)):
        assert layout.cu_seqlens.dtype == torch.int32 and torch.equal(layout.cu_seqlens, given)
        assert layout.position_ids.tolist() == [i for length in lengths for i in range(length)]
        assert not layout.has_branches and layout.segments() == packed_layout(lengths).segments()
        assert layout.num_tokens == sum(lengths) and layout.max_seqlen == max(lengths)


def laid_out(lengths, branches):
    """Distinct token ids of the trunks and branches, laid out by hand: (row, sequence of each segment in row order)."""
    fresh = iter(range(10**6))
    tokens, sequences = [], []
    for length, parts in zip(lengths, branches, strict=True):
        trunk = [next(fresh) for _ in range(length)]
        tokens += trunk
        sequences.append(trunk)
        for cut, size in sorted(parts, key=lambda part: part[0]):
            branch = [next(fresh) for _ in range(size)]
            tokens += branch
            sequences.append(trunk[:cut] + branch)
    return tokens, sequences


@given(rows())
def test_every_original_sequence_is_rebuilt_from_the_layout(case):
    tokens, sequences = laid_out(*case)
    layout = packed_layout(*case)
    assert layout.num_tokens == len(tokens) and layout.num_segments == len(sequences)
    ids = torch.tensor(tokens, dtype=torch.int64)
    for segment, sequence in enumerate(sequences):
        places = layout.sequence(segment)
        assert ids[places].tolist() == sequence
        assert layout.position_ids[places].tolist() == list(range(len(sequence)))
        start, length, _, _ = layout.segments()[segment]
        own = range(len(sequence) - length, len(sequence))
        before = [int(places[i - 1]) if i else -1 for i in own]
        assert layout.predictors[start : start + length].tolist() == before
    for parts, order in zip(case[1], layout.branch_order, strict=True):
        assert [parts[i][0] for i in order] == sorted(cut for cut, _ in parts)
    assert layout.has_branches == any(case[1])
    if layout.num_tokens:
        assert layout.max_position == layout.position_ids.max() and layout.max_seqlen == layout.lengths.max()


@given(rows(), st.randoms(use_true_random=False))
def test_multiplicity_counts_the_sequences_each_token_stands_in(case, rng):
    layout = packed_layout(*case)
    for weights in (None, torch.tensor([rng.randint(0, 3) for _ in range(layout.num_segments)])):
        counted = torch.zeros(layout.num_tokens, dtype=torch.float64)
        for segment in range(layout.num_segments):
            counted[layout.sequence(segment)] += 1 if weights is None else weights[segment]
        assert torch.equal(layout.multiplicity(weights), counted)


@given(rows(), st.randoms(use_true_random=False))
def test_predicting_rows_give_each_sequence_its_own_next_tokens(case, rng):
    tokens, sequences = laid_out(*case)
    layout = packed_layout(*case)
    ids = torch.tensor(tokens, dtype=torch.int64)
    labels = torch.tensor([token if rng.random() < 0.7 else -100 for token in tokens], dtype=torch.int64)
    found = sorted(zip(*(x.tolist() for x in predicting_rows(labels, layout)), strict=True))
    wanted = set()
    for sequence in sequences:
        place = {token: int((ids == token).nonzero()[0, 0]) for token in sequence}
        wanted |= {(place[a], b) for a, b in zip(sequence, sequence[1:], strict=False) if labels[place[b]] != -100}
    assert found == sorted(wanted)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_shifted_labels_never_cross_a_sequence_end(lengths):
    layout = packed_layout(lengths)
    labels = torch.arange(layout.num_tokens) + 7
    parts = shift_labels(labels, layout, ignore_index=-1).split(lengths)
    for part, own in zip(parts, labels.split(lengths), strict=True):
        assert part.tolist() == [*own[1:].tolist(), *([-1] if len(own) else [])]


def test_shift_labels_refuses_branches_and_wrong_shapes():
    with pytest.raises(ValueError, match="predicting_rows"):
        shift_labels(torch.zeros(26, dtype=torch.int64), row("one branch"))
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(ValueError, match="one per token"):
            shift_labels(labels, packed_layout([4]))


@pytest.mark.parametrize(
    "lengths,branches,message",
    [
        ([], None, "at least one trunk"),
        ([4, -1], None, "trunk 1: expected a length"),
        ([4], [[(2, 3), (5, 1)]], "trunk 0, branch 1: its cut at 5 is outside the trunk's 4 tokens"),
        ([4], [[(-1, 3)]], "cut at -1 is outside"),
        ([4], [[(1, -3)]], "branch 0: expected a length"),
        ([4, 4], [[]], "one list per trunk, got 1 for 2"),
        ([2**31], None, "at most 2,147,483,647 tokens"),
        ([10.9], None, "trunk 0: expected whole numbers of tokens, got 10.9"),
        ([10], [[(7.5, 3)]], "trunk 0: expected whole numbers of tokens, got 7.5"),
    ],
)
def test_impossible_layouts_are_refused(lengths, branches, message):
    with pytest.raises((ValueError, TypeError), match=message):
        packed_layout(lengths, branches)


def seen_by_query_tiles(layout, block):
    """Rebuild the mask from what each tile of queries says it sees."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    covered = torch.zeros(layout.num_tokens, dtype=torch.int64)
    for start, end, prefix_start, prefix_length, own_start in query_tiles(layout, block).tolist():
        assert 0 < end - start <= block
        covered[start:end] += 1
        for query in range(start, end):
            mask[query, prefix_start : prefix_start + prefix_length] = True
            mask[query, own_start : query + 1] = True
    assert (covered == 1).all()
    return mask


def seen_by_key_tiles(layout, block, window):
    ends = prefix_ends(layout).tolist()
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    covered = torch.zeros(layout.num_tokens, dtype=torch.int64)
    for start, end, own_end, branches_start, branches_end in key_tiles(layout, block, window).tolist():
        assert 0 < end - start <= block
        covered[start:end] += 1
        for key in range(start, end):
            mask[key:own_end, key] = True
            for query in range(branches_start, branches_end):
                mask[query, key] |= key < ends[query]
    assert (covered == 1).all()
    distance = layout.position_ids[:, None] - layout.position_ids[None]
    return mask & (distance < window) if window else mask


@given(rows(longest=20), st.integers(1, 12), st.integers(0, 9))
def test_tile_lists_cover_the_mask_exactly(case, block, window):
    layout = packed_layout(*case)
    assert torch.equal(seen_by_query_tiles(layout, block), visible_keys(layout))
    assert torch.equal(seen_by_key_tiles(layout, block, window), visible_keys(layout, window=window))


def test_key_tiles_leave_out_queries_beyond_the_window():
    layout = packed_layout([100], [[(10, 5), (50, 5), (90, 5)]])
    tiles = {tile[0]: tile for tile in key_tiles(layout, 10, 20).tolist()}
    assert tiles[0][2:] == [29, 100, 105]  # only the branch at 10 is near
    assert tiles[40][2:] == [69, 105, 110]


@pytest.mark.parametrize("name", ROWS)
def test_heaviest_tiles_come_first(name):
    layout = row(name)
    work = [prefix + end - own for _, end, _, prefix, own in query_tiles(layout, 8).tolist()]
    assert work == sorted(work, reverse=True)


def test_lengths_and_cuts_may_be_tensors():
    given = packed_layout(torch.tensor([10, 4]), [torch.tensor([[7, 3]]), []])
    assert given.segments() == packed_layout([10, 4], [[(7, 3)], []]).segments()


def test_a_layout_of_an_evaluation_serves_training():
    layout = row("one branch")
    with torch.inference_mode():
        tiles = query_tiles(layout, 16)
    assert not tiles.is_inference()


def test_a_compiled_piece_hands_on_any_layout():
    """Torch 2.11 guards every field of a frozen dataclass, and would compile for each layout; 2.13 does not."""
    assert not packed_layout([1]).__dataclass_params__.frozen
    torch.compiler.reset()
    counters.clear()
    outside = torch.compiler.disable(lambda tensor, layout: tensor * layout.num_tokens)
    through = torch.compile(lambda tensor, layout: outside(tensor + 1, layout) + 1, backend="eager", dynamic=True)
    for name in ("one branch", "sequences", "branches not sorted, cuts shared"):
        layout = row(name)
        assert torch.equal(through(torch.ones(3), layout), torch.full((3,), 2.0 * layout.num_tokens + 1))
    assert counters["frames"]["ok"] == 2, counters["frames"]  # before and behind
    torch.compiler.reset()


def test_what_is_derived_from_a_layout_is_made_once_and_moves_with_the_device():
    layout = row("branches not sorted, cuts shared")
    assert query_tiles(layout, 16) is query_tiles(layout, 16)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.branch_order == layout.branch_order
    assert query_tiles(moved, 16).device.type == "meta"
