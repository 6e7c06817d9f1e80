from hypothesis import given
from hypothesis import strategies as st

from trsd.batching import Example, TraceStream, pack_examples


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
