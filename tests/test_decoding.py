from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model

from trsd.decoding import Decoder, Sampling, check_decoding
from trsd.errors import InputError
from trsd.models import PACKED_ATTENTION


@pytest.fixture
def prompts(think, tokenizer):
    questions = ["How many?", "Mia has 3 shells. How many shells does Mia have now?", "So?", "Tom has 4 pears."]
    return [think.prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]


class Scripted(torch.nn.Module):
    """Stands in for a model: continues every context with fixed tokens, then EOS for ever."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, tokenizer, think_text, answer_text):
        super().__init__()
        self.tokenizer = tokenizer
        self.texts = think_text, answer_text
        self.generation_config = type("G", (), {"eos_token_id": tokenizer.eos_token_id})
        self.config = type(
            "C",
            (),
            {"get_text_config": lambda self: self, "max_position_embeddings": 512, "vocab_size": len(tokenizer)},
        )()
        self.contexts = []

    def set_attn_implementation(self, name):
        pass

    def generate(self, input_ids, attention_mask, generation_config):
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            context = [token for token, kept in zip(ids, mask, strict=True) if kept]
            self.contexts.append(self.tokenizer.decode(context))
            thought, answer = self.texts
            text = answer if "</think>" in self.contexts[-1] else thought
            new = self.tokenizer(text, add_special_tokens=False).input_ids
            new += [self.tokenizer.eos_token_id] * generation_config.max_new_tokens
            rows.append(ids + new[: generation_config.max_new_tokens])
        return torch.tensor(rows)


def test_batched_greedy_decoding_equals_one_at_a_time(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    together = Decoder(model, tokenizer, think, batch_size=4)
    alone = Decoder(model, tokenizer, think, batch_size=1)
    limits = dict(max_thinking_tokens=20, max_answer_tokens=10)
    assert together.think_and_answer(prompts, **limits) == alone.think_and_answer(prompts, **limits)
    reasonings = [[7, 8, 9], [], [10], [11] * 9]
    answers = together.answer_after(prompts, reasonings, max_answer_tokens=10)
    assert answers == alone.answer_after(prompts, reasonings, max_answer_tokens=10)
    assert model.config._attn_implementation == PACKED_ATTENTION  # put back after generating


def test_sampling_repeats_with_its_seed(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)

    def sample(seed):
        decoder = Decoder(model, tokenizer, think, sampling=Sampling(temperature=1.0, seed=seed))
        return decoder.think_and_answer(prompts, max_thinking_tokens=20, max_answer_tokens=5)

    assert sample(1) == sample(1) != sample(2)


def test_free_thinking_is_split_into_reasoning_close_and_answer(tokenizer, think, prompts):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "unused")
    (answer,) = Decoder(model, tokenizer, think).think_and_answer(
        prompts[:1], max_thinking_tokens=50, max_answer_tokens=20
    )
    assert tokenizer.decode(answer.reasoning_ids) == "3 it is.\n"
    assert tokenizer.decode(answer.answer_ids) == "The answer is 3.<|im_end|>"
    assert answer.closed and answer.finished


def test_thinking_past_its_limit_stays_open(tokenizer, think, prompts):
    model = Scripted(tokenizer, "3 it is. " * 10 + "\n</think>\n\n3", "unused")
    (answer,) = Decoder(model, tokenizer, think).think_and_answer(
        prompts[:1], max_thinking_tokens=8, max_answer_tokens=100
    )
    assert not answer.closed and not answer.finished
    assert len(answer.reasoning_ids) == 8 and answer.close_ids == answer.answer_ids == []


def test_an_answer_past_its_limit_is_cut_and_unfinished(tokenizer, think, prompts):
    model = Scripted(tokenizer, "3.\n</think>\n\n" + "3 " * 30, "unused")
    (answer,) = Decoder(model, tokenizer, think).think_and_answer(
        prompts[:1], max_thinking_tokens=50, max_answer_tokens=4
    )
    assert answer.closed and len(answer.answer_ids) == 4 and not answer.finished


def test_answers_at_budgets_force_only_what_is_longer(tokenizer, think, prompts):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nfree", "forced")
    decoder = Decoder(model, tokenizer, think)
    free = decoder.think_and_answer(prompts[:2], max_thinking_tokens=50, max_answer_tokens=20)
    length = len(free[0].reasoning_ids)
    model.contexts.clear()
    at = decoder.answers_at_budgets(prompts[:2], free, [0, 2, length], max_answer_tokens=20)
    assert at[length] == free
    for budget in (0, 2):
        for prompt, answer in zip(prompts, at[budget], strict=False):
            assert answer.reasoning_ids == free[0].reasoning_ids[:budget] and not answer.closed
            assert tokenizer.decode(answer.answer_ids) == "forced<|im_end|>"
            context = [*prompt, *free[0].reasoning_ids[:budget], *think.closer_ids]
            assert tokenizer.decode(context) in model.contexts
    assert len(model.contexts) == 4


def test_a_prompt_longer_than_the_context_is_refused(tokenizer, think):
    decoder = Decoder(make_tiny_model(tokenizer), tokenizer, think)
    with pytest.raises(ValueError, match="context holds 512"):
        decoder.think_and_answer([[7] * 512], max_thinking_tokens=5, max_answer_tokens=5)


def test_a_folders_generation_config_adds_nothing(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)
    limits = dict(max_thinking_tokens=20, max_answer_tokens=5)
    plain = Decoder(model, tokenizer, think).think_and_answer(prompts, **limits)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.suppress_tokens = plain[0].reasoning_ids[:3]
    assert Decoder(model, tokenizer, think).think_and_answer(prompts, **limits) == plain
    assert model.generation_config.repetition_penalty == 9.0


def test_complete_continues_every_context_in_the_order_given(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    decoder = Decoder(model, tokenizer, think, batch_size=3)
    written = decoder.complete(prompts, max_new_tokens=12)
    assert written == [decoder.complete([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({tuple(ids) for ids in written}) > 1 and all(0 < len(ids) <= 12 for ids in written)


def test_a_repetition_penalty_keeps_greedy_decoding_from_what_was_said(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)

    def write(penalty):
        decoder = Decoder(model, tokenizer, think, sampling=Sampling(repetition_penalty=penalty))
        return decoder.complete(prompts[:2], max_new_tokens=15)

    assert write(1.0) == Decoder(model, tokenizer, think).complete(prompts[:2], max_new_tokens=15)
    assert any(len(set(ids)) < len(ids) for ids in write(1.0))
    for prompt, ids in zip(prompts, write(1e6), strict=False):
        assert len(set(ids)) == len(ids) and not set(ids) & set(prompt)


def test_padding_holds_no_token_that_a_repetition_penalty_would_add(tokenizer, think):
    class Watched(Scripted):
        def generate(self, input_ids, attention_mask, generation_config):
            rows.extend(input_ids.tolist())
            return super().generate(input_ids, attention_mask, generation_config)

    rows, contexts = [], [[5, 6, 7, 8, 9], [10, 11]]
    Decoder(Watched(tokenizer, "3", "3"), tokenizer, think).complete(contexts, max_new_tokens=3)
    assert [set(row) for row in rows] == [set(context) for context in contexts]


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(batch_size=0), "batch_size"),
        (dict(max_thinking_tokens=-3), "max_thinking_tokens"),
        (dict(max_answer_tokens=0), "max_answer_tokens"),
        (dict(max_samples=-1), "max_samples"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1e-40), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=2.0), "top_p"),
        (dict(seed=2**64), "seed"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_field(changes, message):
    fine = dict(max_thinking_tokens=1, max_answer_tokens=1, batch_size=1, max_samples=None, temperature=0.0, top_p=1.0)
    check_decoding(SimpleNamespace(**fine, seed=0))
    with pytest.raises(InputError, match=f"^{message}: expected"):
        check_decoding(SimpleNamespace(**{**fine, "seed": 0, **changes}))
