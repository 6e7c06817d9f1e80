import pytest

from trsd.thinking import CLOSERS, ThinkFormat, encode_exactly, find_subsequence, sentence_end_tokens, space_tokens


@pytest.mark.parametrize("preset", CLOSERS)
def test_every_preset_closes_the_thinking_and_round_trips(tokenizer, preset):
    think = ThinkFormat.of(tokenizer, closer=preset)
    assert "</think>" in think.closer
    assert tokenizer.decode(think.closer_ids) == think.closer
    assert find_subsequence(think.closer_ids, think.close_ids) >= 0


def test_prompt_ends_with_the_opener_exactly_once(tokenizer, think):
    messages = [{"role": "user", "content": "How many?"}]
    ids = think.prompt_ids(tokenizer, messages)
    assert tuple(ids[-len(think.opener_ids) :]) == think.opener_ids
    assert ids.count(think.opener_ids[0]) == 1


def test_opener_is_added_when_the_template_leaves_it_out(tokenizer, think):
    class Plain:
        chat_template = "x"
        __call__ = staticmethod(lambda text, **kwargs: tokenizer(text, **kwargs))

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"] + "\n"

    ids = think.prompt_ids(Plain(), [{"role": "user", "content": "How many?"}])
    assert tokenizer.decode(ids) == "How many?\n<think>\n"


def test_split_gives_back_every_token(tokenizer, think):
    text = "Mia has 3.\n</think>\n\nMia has \\boxed{3} shells.<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    reasoning, close, answer = think.split(ids, space_tokens(tokenizer))
    assert reasoning + close + answer == ids
    assert tokenizer.decode(close) == "</think>\n\n"
    assert tokenizer.decode(answer) == "Mia has \\boxed{3} shells.<|im_end|>"


def test_split_without_close_tag_is_none(tokenizer, think):
    assert think.split(tokenizer("Mia has 3.").input_ids, space_tokens(tokenizer)) is None


def test_tags_of_several_tokens_are_found(tokenizer):
    think = ThinkFormat.of(tokenizer, open_tag="<reason>", close_tag="</reason>")
    assert len(think.close_ids) > 1
    ids = tokenizer("so 3\n</reason>\n\n3", add_special_tokens=False).input_ids
    reasoning, close, answer = think.split(ids, space_tokens(tokenizer))
    assert (tokenizer.decode(reasoning), tokenizer.decode(answer)) == ("so 3\n", "3")
    assert reasoning + close + answer == ids


def test_closer_without_the_close_tag_is_refused(tokenizer):
    with pytest.raises(ValueError, match="does not hold '</think>'"):
        ThinkFormat.of(tokenizer, closer="\nTime is up.\n")


def test_text_that_does_not_survive_the_tokenizer_is_refused():
    class Lossy:
        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": [1, 2]})

        def decode(self, ids, **_):
            return "something else"

    with pytest.raises(ValueError, match="cannot be tokenized alone"):
        encode_exactly(Lossy(), "\n</think>\n\n", what="closer")


def test_sentence_end_tokens_know_dots_and_line_breaks(tokenizer):
    ends = sentence_end_tokens(tokenizer)
    ids = tokenizer("It fits. So 3\n", add_special_tokens=False).input_ids
    assert [tokenizer.decode([i]) for i in ids if ends[i]] == [".", "\n"]
