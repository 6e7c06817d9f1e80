import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsd.cuts import build_policy, cut_generator, snap, uniform
from trsd.thinking import token_texts
from trsd.traces import Trace


def reasoning_of(length):
    ids = [[5], list(range(length)), [7], [8]]
    names = ("prompt_ids", "reasoning_ids", "close_ids", "answer_ids")
    texts = dict.fromkeys(("question", "reasoning", "answer", "tokenizer"), "")
    return Trace(id="t", gold=None, closed=True, correct=None, **texts, **dict(zip(names, ids, strict=True)))


def test_a_cut_at_the_first_derivation_holds_it_and_no_later_sentence(traces, tokenizer):
    texts = token_texts(tokenizer, len(tokenizer))
    policy = build_policy("first_derivation", texts=texts)
    for trace in traces:
        cut = policy(trace, random.Random(0))
        computed = re.search(rf"={trace.gold}(?!\d)", trace.reasoning)
        shown = tokenizer.decode(trace.reasoning_ids[:cut])
        assert shown == (trace.reasoning[: computed.end()] if computed else trace.reasoning)


def test_a_judged_cut_is_the_judges(traces):
    policy = build_policy("judged", judged_cuts={trace.id: index for index, trace in enumerate(traces)})
    assert [policy(trace, random.Random(0)) for trace in traces] == list(range(len(traces)))


@given(st.sampled_from(["uniform", "log_uniform", "fractions", "budgets"]), st.integers(0, 5000), st.integers())
def test_every_policy_cuts_inside_the_reasoning(name, length, seed):
    policy = build_policy(name, cut_fractions=(0.0, 0.5, 1.0), cut_budgets=(0, 64, 9999), anchor=0.3)
    assert 0 <= policy(reasoning_of(length), random.Random(seed)) <= length


def test_uniform_is_uniform():
    rng = random.Random(0)
    cuts = [uniform(reasoning_of(100), rng) for _ in range(20000)]
    counts = [sum(lo <= cut < lo + 10 for cut in cuts) for lo in range(0, 100, 10)]
    assert min(counts) > 1850 and max(counts) < 2150


def test_fractions_and_budgets_draw_only_their_choices():
    rng = random.Random(0)
    by_share = build_policy("fractions", cut_fractions=(0.25, 1.0), cut_budgets=(), anchor=0.0)
    assert {by_share(reasoning_of(80), rng) for _ in range(50)} == {20, 80}
    by_tokens = build_policy("budgets", cut_fractions=(), cut_budgets=(16, 300), anchor=0.0)
    assert {by_tokens(reasoning_of(80), rng) for _ in range(50)} == {16, 80}


def test_anchor_share_keeps_that_many_whole():
    policy = build_policy("uniform", cut_fractions=(), cut_budgets=(), anchor=0.25)
    rng, trace = random.Random(0), reasoning_of(1000)
    whole = sum(policy(trace, rng) == 1000 for _ in range(8000)) / 8000
    assert 0.23 < whole < 0.27


def test_snap_takes_the_last_end_at_or_before_the_cut():
    assert [snap(cut, [4, 9]) for cut in (3, 4, 8, 9, 20)] == [0, 4, 4, 9, 9]


def test_draws_depend_on_seed_epoch_and_trace_alone():
    draw = cut_generator(1, 2, "a").random()
    assert draw == cut_generator(1, 2, "a").random()
    assert len({draw, *(cut_generator(*key).random() for key in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")))}) == 4


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(ValueError, match="uniform, log_uniform"):
        build_policy("middle", cut_fractions=(), cut_budgets=(), anchor=0.0)
