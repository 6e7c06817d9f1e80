import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsd.demo.problems import draw_problems
from trsd.sentences import sentence_token_ends, split_sentences
from trsd.thinking import token_texts

PIECES = st.sampled_from(
    [".", "!", "?", "…", "。", "！", "？", " ", "\n", "\r\n", "\t", "a", "1", "e.g.", ")", '"', "”", "é"]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES).map("".join))


@given(TEXTS)
def test_sentences_of_any_text_join_to_it_and_none_is_empty(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text and all(sentences)
    assert all(sentence.strip() for sentence in sentences) or not text.strip()


@pytest.mark.parametrize(
    "text,sentences",
    [
        ("One. Two! Three? Four… Five", ["One. ", "Two! ", "Three? ", "Four… ", "Five"]),
        ("One.  \n\nTwo\nThree.", ["One.  \n\n", "Two\n", "Three."]),
        ("\n One. Two.\n", ["\n One. ", "Two.\n"]),
        ("It is 3.14 or so. Then a.b", ["It is 3.14 or so. ", "Then a.b"]),
        ("He has 3. Then 4.", ["He has 3. ", "Then 4."]),
        ("1. Add 2. \n2. Halve it. b. Stop.", ["1. Add 2. \n", "2. Halve it. ", "b. Stop."]),
        ("Take e.g. 3 (i.e. 2+1). Dr. Who agrees.", ["Take e.g. 3 (i.e. 2+1). ", "Dr. Who agrees."]),
        ('"Yes." (No.) **So?** $$x=3.$$ End', ['"Yes." ', "(No.) ", "**So?** ", "$$x=3.$$ ", "End"]),
        ("Wait... what?! Hm", ["Wait... ", "what?! ", "Hm"]),
        ("这是三。对吗？“对。”好", ["这是三。", "对吗？", "“对。”", "好"]),
        (" \n ", [" \n "]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert split_sentences(text) == sentences


@given(st.lists(TEXTS.filter(lambda text: len(text) < 9), min_size=1), st.data())
def test_token_ends_of_any_tokens_ascend_to_the_last(texts, data):
    ids = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30))
    ends = sentence_token_ends(ids, texts)
    assert ends == sorted(set(ends)) and all(end > 0 for end in ends)
    assert ends[-1:] == ([len(ids)] if ids else [])
    assert len(ends) <= max(1, len(split_sentences("".join(texts[i] for i in ids))))


def test_token_ends_hold_the_words_of_whole_sentences(tokenizer):
    texts = token_texts(tokenizer, len(tokenizer))
    for problem, _ in zip(draw_problems("train", seed=3), range(20), strict=False):
        ids = tokenizer(problem.reasoning, add_special_tokens=False).input_ids
        ends = sentence_token_ends(ids, texts)
        sentences = split_sentences(problem.reasoning)
        assert len(ends) == len(sentences) > 3
        for count, end in enumerate(ends, start=1):
            assert tokenizer.decode(ids[:end]) == "".join(sentences[:count]).rstrip()


def test_token_ends_leave_whitespace_and_the_next_word_to_the_next_sentence():
    texts = ["It", " fits", ".", " So", " 3", ".\n\n", "\n", "Ok", ". No"]
    assert sentence_token_ends([0, 1, 2, 3, 4, 5, 6, 7, 2], texts) == [3, 6, 9]
    assert sentence_token_ends([0, 1, 8, 2, 3], texts) == [3, 4, 5]  # a token across an end belongs to both


def test_token_ends_count_tokens_without_text():
    texts = ["Yes.", "", " No."]
    assert sentence_token_ends([1, 0, 1, 2, 1], texts) == [2, 5]
    assert sentence_token_ends([1, 1], texts) == [2]
