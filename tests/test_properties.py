"""What must hold for whatever comes: recipes, rows of data, packed rows, cuts and truncations, answers to grade."""

import contextlib
import io
import json
import math
import random
import types
from collections import Counter
from dataclasses import fields, replace
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from conftest import make_traces
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trsd.batching import Branch, Example, pack_examples
from trsd.cuts import build_policy, cut_generator
from trsd.data import load_data
from trsd.errors import InputError
from trsd.grading import answer_form, as_fraction, extract_answer, grade
from trsd.methods.lsp import CHOICES, kept_example
from trsd.methods.trsd import TRSD
from trsd.recipe import Recipe
from trsd.recipe_file import load_recipe, parse_recipe, recipe_as_yaml
from trsd.sentences import sentence_token_ends
from trsd.thinking import token_texts
from trsd.traces import ID_FIELDS, Trace
from trsd.truncation import SIDES, build_truncation

SAME_FILES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def examples(number):
    return settings(max_examples=number, suppress_health_check=SAME_FILES)


# Recipes

NUMBERS = {int: st.integers(-(2**63), 2**64), float: st.floats(allow_nan=False), bool: st.booleans()}


def values_of(kind):
    """Values of a recipe field's type, sensible or not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is tuple:
        items = st.from_regex(r"[0-9]{1,4}%?", fullmatch=True) if arguments[0] is str else values_of(arguments[0])
        return st.lists(items, max_size=4).map(tuple)
    if kind is type(None):
        return st.none()
    if kind in NUMBERS:
        return NUMBERS[kind]
    return st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)


@st.composite
def recipes(draw, most=6):
    """The defaults with a few fields of any value of their type."""
    hints = get_type_hints(Recipe)
    names = draw(st.lists(st.sampled_from([field.name for field in fields(Recipe)]), max_size=most, unique=True))
    return replace(Recipe(), **{name: draw(values_of(hints[name])) for name in names})


def parsed(call):
    """What ``call`` returns, or None where it ended with exit code 2 and said something."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return call()
    except SystemExit as exit_:
        assert exit_.code == 2 and said.getvalue().strip()
        return None


@examples(60)
@given(recipes())
@example(replace(Recipe(), closer="--closer", output_dir="--help"))
@example(replace(Recipe(), output_dir="None", teacher_model_name_or_path="null"))
@example(replace(Recipe(), output_dir="", data="  "))
@example(replace(Recipe(), eval_budgets=(), cut_fractions=()))
def test_a_recipe_written_as_yaml_is_read_back_as_it_was(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_as_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@examples(200)
@given(recipes(most=20), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_what_is_wrong_with_a_recipe_is_text_that_begins_with_its_fields(recipe, odd, everywhere):
    if everywhere:
        hints = get_type_hints(Recipe)
        recipe = replace(recipe, **{name: odd for name, kind in hints.items() if kind in (float, float | None)})
    known = {field.name for field in fields(Recipe)}
    for problem in recipe.problems():
        names, colon, _ = problem.partition(": ")
        assert colon and set(names.split(", ")) <= known


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@examples(50)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(Recipe)]) | st.text(max_size=6), JSON, max_size=3))
def test_a_recipe_of_any_values_is_read_or_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    parsed(lambda: parse_recipe(["--config", str(path)]))


@examples(50)
@given(st.binary(max_size=40) | st.text("abc: -[]{}#&*!|>'\"%@`,?\n\t019.~", max_size=40).map(str.encode))
@example(b"seed: 2001-99-99")
@example(b"seed: !!int x")
@example(b"seed: !!float x")
@example(b"seed: !!timestamp x")
@example(b"seed: !!binary x")
@example(b"seed: " + b"9" * 5000)
@example(b"? [a]\n: b")
@example(b"? {a: b}\n: c")
@example(b"{a: &x {b: *x}}")
@example(b"seed: &x [*x]")
@example(b"<<: 3")
@example(b"[" * 5000)
@example(b"a: " * 3)
@example(b"!!python/object/apply:os.getcwd []")
@example(b"base: [a]")
@example(b"base: \x00")
@example("base: a\udc80".encode("utf-8", "surrogatepass"))
@example(b'base: "a\\0b"')
@example(b"method: sft\nbase: demo")
@example(b"method: [sft]\nbase: demo")
@example(b"method: {a: b}\nbase: demo")
def test_text_that_is_no_recipe_exits_2_without_a_traceback(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    parsed(lambda: parse_recipe(["--config", str(path)]))


# Rows of data

COLUMNS = ("prompt", "question", "problem", "reasoning", "answer", "gold", "messages", "conversations", "input")
COLUMNS += ("output", "llm_response", "role", "content", "reasoning_content", *(f.name for f in fields(Trace)))
COLUMNS += ("response", "completion", "generations", "solution", "ground_truth", "final_answer", "thinking")
ROWS = st.dictionaries(st.sampled_from(COLUMNS), JSON | st.text(max_size=30), max_size=6)
TURNS = st.fixed_dictionaries(
    dict(role=st.sampled_from(["user", "assistant", "system", "tool"]) | JSON, content=st.text(max_size=20) | JSON)
)
TALKS = st.fixed_dictionaries(dict(messages=st.lists(TURNS, max_size=3)), optional=dict(answer=JSON, gold=JSON))
TEXTS = st.sampled_from(
    ["a", "1", "</think>", "<think>", "<|im_end|>", "<|im_start|>user\n", " ", "\n", "é\u2028", "\0"]
)
TEXT = st.lists(TEXTS, max_size=5).map("".join)
GIVEN = st.fixed_dictionaries(dict(prompt=TEXT, reasoning=TEXT, answer=TEXT), optional=dict(gold=TEXT | st.integers()))


@examples(150)
@given(st.lists(ROWS | TALKS | GIVEN | JSON, min_size=1, max_size=3), st.booleans())
def test_rows_of_any_json_are_traces_questions_counted_drops_or_refused_by_number(
    tmp_path, tokenizer, think, rows, as_text
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        loaded = load_data(str(path), tokenizer=tokenizer, think=think, as_text=as_text)
    except InputError as error:
        assert str(path) in str(error)
        return
    given = [row for row in rows if row is not None]
    assert len(loaded.traces) + len(loaded.questions) + loaded.dropped.total() == len(given)
    for trace in loaded.traces:
        assert trace.prompt_ids and trace.close_ids and len(trace.answer_ids) > 1
        assert trace.answer_ids[-1] == tokenizer.eos_token_id not in trace.answer_ids[:-1]
        assert all(0 <= token < len(tokenizer) for name in ID_FIELDS for token in getattr(trace, name))
        assert think.close_tag not in trace.reasoning + trace.answer


@examples(100)
@given(st.sampled_from([field.name for field in fields(Trace)]), JSON)
def test_a_stored_trace_with_a_field_of_any_json_is_a_valid_trace_or_refused(tmp_path, tokenizer, think, name, value):
    (trace,) = make_traces(tokenizer, think, 1)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(vars(trace) | {name: value}) + "\n")
    try:
        loaded = load_data(str(path), tokenizer=tokenizer, think=think)
    except InputError as error:
        assert str(path) in str(error)
        return
    for found in loaded.traces:
        assert all(type(i) is int and 0 <= i < len(tokenizer) for part in ID_FIELDS for i in getattr(found, part))
        assert think.close_tag in tokenizer.decode(found.close_ids)


# Packed rows


@st.composite
def packable(draw):
    """(examples with distinct tokens, most tokens of a row)."""
    fresh, found = iter(range(10**6)), []
    most = draw(st.integers(20, 80))
    for index in range(draw(st.integers(1, 8))):
        length = draw(st.integers(2, 12))
        trunk = [next(fresh) for _ in range(length)]
        branches = []
        for _ in range(draw(st.integers(0, 2))):
            own = [next(fresh) for _ in range(draw(st.integers(1, 4)))]
            cut = draw(st.integers(0, length))
            branches.append(Branch(cut=cut, input_ids=own, labels=own[-draw(st.integers(1, len(own))) :]))
        thinking = trunk[1 : 1 + draw(st.integers(0, length - 1))]
        labels = trunk[-draw(st.integers(1, length)) :]
        found.append(
            Example(
                trace_index=index,
                input_ids=trunk,
                labels=labels,
                thinking_labels=thinking,
                branches=tuple(branches),
                count=draw(st.integers(1, 3)),
            )
        )
    return found, most


@given(packable())
def test_every_token_of_every_example_lies_in_one_row_at_its_own_place(case):
    packed, most = case
    rows = pack_examples(packed, most, "cpu")
    tokens = Counter(token for row in rows for token in row.input_ids.tolist())
    wanted = [*(e.input_ids for e in packed), *(b.input_ids for e in packed for b in e.branches)]
    assert tokens == Counter(token for ids in wanted for token in ids)
    sequences = sorted(
        [*(e.input_ids for e in packed), *([*e.input_ids[: b.cut], *b.input_ids] for e in packed for b in e.branches)]
    )
    found = []
    for row in rows:
        assert row.num_tokens <= most
        for segment in range(row.layout.num_segments):
            places = row.layout.sequence(segment)
            assert row.layout.position_ids[places].tolist() == list(range(len(places)))
            found.append(row.input_ids[places].tolist())
    assert sorted(found) == sequences


@given(packable())
def test_every_label_is_learnt_once_from_the_position_before_it(case):
    """Here the labels are the tokens at the very positions, so that both must be the same token."""
    packed, most = case
    learnt, thought, weights = Counter(), Counter(), 0.0
    for row in pack_examples(packed, most, "cpu"):
        assert row.input_ids[row.rows].tolist() == row.labels.tolist()
        learnt.update(row.labels.tolist())
        assert (row.input_ids[row.thinking_rows + 1]).tolist() == row.thinking_labels.tolist()
        thought.update(row.thinking_labels.tolist())
        weights += float(row.weights.sum())
        assert row.num_items == row.weights.sum() and row.num_thinking == row.thinking_weights.sum()
    segments = [(part.labels, part.count) for e in packed for part in (e, *e.branches)]
    assert learnt == Counter(token for labels, _ in segments for token in labels)
    assert thought == Counter(token for e in packed for token in e.thinking_labels)
    assert weights == sum(len(labels) * count for labels, count in segments)


# Cuts and truncations


@pytest.fixture(scope="module")
def texts(tokenizer):
    return token_texts(tokenizer, len(tokenizer))


@st.composite
def any_traces(draw, tokenizer, think):
    """A demo trace with its parts cut down to any length, its thinking closed by itself or not."""
    (trace,) = make_traces(tokenizer, think, 1, seed=draw(st.integers(0, 40)))
    return replace(
        trace,
        prompt_ids=trace.prompt_ids[: draw(st.integers(1, len(trace.prompt_ids)))],
        reasoning_ids=trace.reasoning_ids[: draw(st.integers(0, len(trace.reasoning_ids)))],
        answer_ids=trace.answer_ids[draw(st.integers(0, len(trace.answer_ids) - 1)) :],
        closed=draw(st.booleans()),
    )


@examples(60)
@given(
    st.data(),
    st.sampled_from(["uniform", "log_uniform", "fractions", "budgets", "first_derivation"]),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_cut_leaves_the_answer_whole_and_teaches_no_token_twice(tokenizer, think, texts, data, policy, anchor, snap):
    trace = data.draw(any_traces(tokenizer, think))
    shares = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=3))
    counts = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3))
    branches = data.draw(st.integers(1, 5))
    cut = build_policy(policy, cut_fractions=shares, cut_budgets=counts, texts=texts, anchor=anchor)
    method = TRSD(
        [trace],
        think,
        cut,
        seed=3,
        branches_per_trace=branches,
        max_tokens=trace.num_tokens + 20,
        snap_texts=texts if snap else None,
        keep_thinking=True,
    )
    found = method.examples([(2, 0)])
    assert found == method.examples([(2, 0)])  # drawn from seed, epoch and trace alone
    assert all(0 <= place <= len(trace.reasoning_ids) for place in method.cuts(2, 0))
    assert sum(part.count for e in found for part in (e, *e.branches)) == branches
    batches = pack_examples(found, trace.num_tokens + 20, "cpu")
    for batch in batches:
        ends = (batch.layout.starts + batch.layout.lengths).tolist()
        for number, (labels, end) in enumerate(zip(batch.labels.split(len(trace.answer_ids)), ends, strict=True)):
            assert labels.tolist() == trace.answer_ids  # the end token among them
            rows = batch.rows[number * len(labels) : (number + 1) * len(labels)].tolist()
            assert rows == list(range(end - len(labels), end))
        both = [*batch.rows.tolist(), *batch.thinking_rows.tolist()]
        assert len(set(both)) == len(both)
    (largest, *_) = found
    shown = [*trace.reasoning_ids, *trace.close_ids]
    assert largest.thinking_labels == shown[: len(largest.thinking_labels)]
    if snap:
        allowed = {0, len(trace.reasoning_ids), *sentence_token_ends(trace.reasoning_ids, texts)}
        assert set(method.cuts(2, 0)) <= allowed
        drawn = TRSD([trace], think, cut, seed=3, branches_per_trace=branches).cuts(2, 0)
        assert all(place <= unsnapped for place, unsnapped in zip(method.cuts(2, 0), drawn, strict=True))


@given(st.integers(0, 2**63), st.integers(0, 10**9), st.text(max_size=10))
def test_cuts_are_drawn_from_seed_epoch_and_trace_alone(seed, epoch, name):
    assert cut_generator(seed, epoch, name).random() == cut_generator(seed, epoch, name).random()
    assert cut_generator(seed, epoch, name).random() != cut_generator(seed, epoch + 1, name).random()


@examples(100)
@given(
    st.data(),
    st.sampled_from(["fraction", "endpoints", "first_derivation"]),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(SIDES),
    st.sampled_from(CHOICES),
)
def test_a_truncation_keeps_its_share_and_learns_kept_tokens_of_its_sections_once(
    tokenizer, think, texts, data, name, share, side, sections
):
    trace = data.draw(any_traces(tokenizer, think))
    whole = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
    spans = build_truncation(name, share=share, side=side, texts=texts)(trace)
    places = [place for start, end in spans for place in range(start, end)]
    assert places and places == sorted(set(places)) and places[0] >= 0 and places[-1] < len(whole)
    if name != "first_derivation":
        assert len(places) == max(1, int(len(whole) * share))
    example = kept_example(trace, 0, spans, sections.split("+"))
    # Each label is the token behind a kept one, kept with it, and of a chosen section.
    names = ["p"] * len(trace.prompt_ids) + ["cot"] * (len(trace.reasoning_ids) + len(trace.close_ids))
    names += ["a"] * len(trace.answer_ids)
    close = range(len(trace.prompt_ids) + len(trace.reasoning_ids), len(whole) - len(trace.answer_ids))
    learnt = [
        place
        for place in places
        if place - 1 in places and names[place] in sections.split("+") and (trace.closed or place not in close)
    ]
    if example is None:
        assert not learnt
        return
    assert example.labels == [whole[place] for place in learnt]
    assert [places[row] for row in example.rows] == [place - 1 for place in learnt]
    assert example.input_ids == [whole[place] for place in places][: len(example.input_ids)]
    if "a" in sections.split("+") and {len(whole) - 2, len(whole) - 1} <= set(places):
        assert example.labels[-1] == whole[-1] == tokenizer.eos_token_id


# Grading

PIECES = ["\\boxed{", "}", "{", "####", "answer is", "Answer:", "$", "\\frac", "\\(", "\\)", "\\[", "**", "`", "/", ","]
PIECES += [
    "-",
    ".",
    "1",
    "0",
    "12",
    "1,200",
    "%",
    "^",
    "_",
    "\\text",
    "(A)",
    "B.",
    "option C",
    "\n",
    " ",
    "\\",
    "=",
    "é",
]
ANSWERS = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@examples(150)
@given(ANSWERS, ANSWERS)
def test_grading_any_texts_gives_a_verdict(text, gold):
    assert grade(text, gold) in (True, False)
    found = extract_answer(text)
    assert found is None or (answer_form(text) is not None and isinstance(found, str))
    as_fraction(text)


@given(st.fractions(), st.randoms(use_true_random=False))
def test_a_number_equals_itself_however_it_is_stated(number, rng: random.Random):
    whole = number.denominator == 1
    text = f"{number.numerator:,}" if whole and rng.random() < 0.5 else str(number)
    if len(text) > 50:
        return
    for said in (f"so \\boxed{{{text}}}.", f"It is 5.\n#### {text}", f"The answer is {text}."):
        assert grade(said, text), said
    assert not grade(f"\\boxed{{{number + 1}}}", text)
