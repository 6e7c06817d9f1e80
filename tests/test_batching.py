from hypothesis import given
from hypothesis import strategies as st

from trsd.batching import Branch, Example, TraceStream, pack_examples


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30))
def test_packed_rows_hold_every_example_and_point_at_the_predicting_positions(sizes):
    examples = [
        Example(
            trace_index=index,
            input_ids=[1000 * index + i for i in range(context + answer - 1)],
            labels=[1000 * index + i for i in range(context, context + answer)],
        )
        for index, (context, answer) in enumerate(sizes)
    ]
    batches = pack_examples(examples, 64, "cpu")
    assert sum(batch.num_tokens for batch in batches) == sum(len(e.input_ids) for e in examples)
    assert sorted(i for batch in batches for i in batch.trace_indices) == list(range(len(examples)))
    for batch in batches:
        assert batch.num_tokens <= 64 and int(batch.layout.cu_seqlens[-1]) == batch.num_tokens
        # a label is the token after the one that predicts it
        assert (batch.input_ids[batch.rows] + 1 == batch.labels).all()
        assert (batch.input_ids % 1000 == batch.layout.position_ids).all()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), max_size=6), st.integers(0, 5))
def test_branches_are_placed_by_their_cuts_with_what_belongs_to_each(branches, thinking):
    """Tokens name their branch, labels follow their tokens, and each trace's targets come as often as it is learnt."""
    tokens = [[100 * (n + 1) + i for i in range(size + 1)] for n, (_, size) in enumerate(branches)]
    example = Example(
        trace_index=7,
        input_ids=list(range(9)),
        labels=[8, 9],
        count=2,
        thinking_start=1,
        thinking_labels=list(range(2, 2 + thinking)),
        branches=tuple(
            Branch(cut=cut, input_ids=ids[:-1], labels=ids[1:], count=n + 1)
            for n, ((cut, _), ids) in enumerate(zip(branches, tokens, strict=True))
        ),
    )
    (batch,) = pack_examples([example], 200, "cpu")
    assert batch.trace_indices == (7,) * (1 + len(branches))
    assert (batch.input_ids[batch.rows] + 1 == batch.labels).all()
    weight_of = dict(zip(batch.labels.tolist(), batch.weights.tolist(), strict=True))
    assert weight_of == {8: 2, 9: 2} | {id_: n + 1 for n, ids in enumerate(tokens) for id_ in ids[1:]}
    assert batch.num_items == sum(weight_of.values())
    assert (batch.input_ids[batch.thinking_rows] + 1 == batch.thinking_labels).all()
    shared = [2 + sum(n + 1 for n, (cut, _) in enumerate(branches) if cut > token) for token in range(2, 2 + thinking)]
    assert batch.thinking_weights.tolist() == shared and batch.num_thinking == sum(shared)


def test_stream_visits_every_trace_once_an_epoch_in_a_new_order():
    stream = TraceStream(10, batch_size=4, seed=0)
    seen = [member for step in range(10) for member in stream.step(step)]
    for epoch in range(4):
        assert sorted(index for e, index in seen if e == epoch) == list(range(10))
    assert [i for e, i in seen if e == 0] != [i for e, i in seen if e == 1]


def test_stream_does_not_depend_on_where_it_is_entered():
    whole = [TraceStream(7, batch_size=5, seed=3).step(step) for step in range(6)]
    one = TraceStream(7, batch_size=5, seed=3)
    assert [one.step(step) for step in range(6)] == whole
    assert whole[0] != TraceStream(7, batch_size=5, seed=4).step(0)
