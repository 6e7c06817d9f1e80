import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from scripted import Scripted, engine_of

from trsd.decoding import Decoder, Limits
from trsd.decoding_arguments import DecodingArguments, as_trained, check_decoding
from trsd.engines import Sampling
from trsd.errors import InputError
from trsd.flags import parse_flags
from trsd.model_card import front_matter
from trsd.models import PACKED_ATTENTION
from trsd.recipe import Recipe
from trsd.recipe_file import RECIPES, load_recipe
from trsd.thinking import ThinkFormat


@pytest.fixture
def prompts(think, tokenizer):
    questions = ["How many?", "Mia has 3 shells. How many shells does Mia have now?", "So?", "Tom has 4 pears."]
    return [think.prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]


def test_batched_greedy_decoding_equals_one_at_a_time(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    together = Decoder(engine_of(model, tokenizer, 4), tokenizer, think)
    alone = Decoder(engine_of(model, tokenizer, 1), tokenizer, think)
    limits = dict(max_thinking_tokens=20, max_answer_tokens=10)
    assert together.think_and_answer(prompts, **limits) == alone.think_and_answer(prompts, **limits)
    reasonings = [[7, 8, 9], [], [10], [11] * 9]
    answers = together.answer_after(prompts, reasonings, max_answer_tokens=10)
    assert answers == alone.answer_after(prompts, reasonings, max_answer_tokens=10)
    assert model.config._attn_implementation == PACKED_ATTENTION  # put back after generating


def test_sampling_repeats_with_its_seed(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)

    def sample(seed):
        decoder = Decoder(engine_of(model, tokenizer), tokenizer, think, sampling=Sampling(temperature=1.0, seed=seed))
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
    decoder = Decoder(engine_of(make_tiny_model(tokenizer), tokenizer), tokenizer, think)
    with pytest.raises(ValueError, match="context holds 512"):
        decoder.think_and_answer([[7] * 512], max_thinking_tokens=5, max_answer_tokens=5)


def test_a_folders_generation_config_adds_nothing(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)
    limits = dict(max_thinking_tokens=20, max_answer_tokens=5)
    plain = Decoder(engine_of(model, tokenizer), tokenizer, think).think_and_answer(prompts, **limits)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.suppress_tokens = plain[0].reasoning_ids[:3]
    assert Decoder(engine_of(model, tokenizer), tokenizer, think).think_and_answer(prompts, **limits) == plain
    assert model.generation_config.repetition_penalty == 9.0


def test_complete_continues_every_context_in_the_order_given(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    decoder = Decoder(engine_of(model, tokenizer, 3), tokenizer, think)
    written = decoder.complete(prompts, max_new_tokens=12)
    assert written == [decoder.complete([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({tuple(ids) for ids in written}) > 1 and all(0 < len(ids) <= 12 for ids in written)


def test_a_repetition_penalty_keeps_greedy_decoding_from_what_was_said(tokenizer, think, prompts):
    model = make_tiny_model(tokenizer)

    def write(penalty):
        decoder = Decoder(engine_of(model, tokenizer), tokenizer, think, sampling=Sampling(repetition_penalty=penalty))
        return decoder.complete(prompts[:2], max_new_tokens=15)

    assert write(1.0) == Decoder(engine_of(model, tokenizer), tokenizer, think).complete(prompts[:2], max_new_tokens=15)
    assert any(len(set(ids)) < len(ids) for ids in write(1.0))
    for prompt, ids in zip(prompts, write(1e6), strict=False):
        assert len(set(ids)) == len(ids) and not set(ids) & set(prompt)


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
        (dict(num_samples=2), "num_samples"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_field(changes, message):
    check_decoding(DecodingArguments())
    with pytest.raises(InputError, match=f"^{message}: expected"):
        check_decoding(DecodingArguments(**changes))


def two_engines(tokenizer, think):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    model.generation_config.eos_token_id = list(range(2, 640, 9))
    return [Decoder(engine_of(model, tokenizer, size), tokenizer, think) for size in (1, 6)]


def test_thinking_and_answering_at_budgets_at_once_is_the_same_as_one_after_the_other(tokenizer, think, prompts):
    limits = Limits(max_thinking_tokens=24, max_answer_tokens=6)
    for decoder in two_engines(tokenizer, think):
        free, at = decoder.think_at_budgets(prompts, [0, 3, 3, 9, 24], limits)
        assert free == decoder.think_and_answer(prompts, **vars(limits))
        later = decoder.answers_at_budgets(prompts, free, [0, 3, 9, 24], max_answer_tokens=6)
        assert [[a.answer_ids for a in at[b]] for b in at] == [[a.answer_ids for a in later[b]] for b in later]
        assert all(a.reasoning_ids == f.reasoning_ids[:9] for a, f in zip(at[9], free, strict=True))


def test_confidence_is_the_geometric_mean_of_the_answers_probabilities(tokenizer, think, prompts):
    model = Scripted(tokenizer, "3 it is.\n</think>\n\nThe answer is 3.", "forced")
    decoder = Decoder(model, tokenizer, think)
    free, at = decoder.think_at_budgets(prompts[:1], [2], Limits(max_thinking_tokens=50, max_answer_tokens=20))
    assert free[0].confidence == pytest.approx(math.exp(-0.1)) == at[2][0].confidence
    (open_,) = decoder.think_and_answer(prompts[:1], max_thinking_tokens=2, max_answer_tokens=5)
    assert math.isnan(open_.confidence)


class Unsure(Scripted):
    """Answers ``answer``, and is the surer the more it has thought."""

    def write(self, wish):
        written = super().write(wish)
        thought = self.tokenizer.decode(list(wish.context_ids)).rpartition("<think>\n")[2].partition("\n</think>")[0]
        return written._replace(log_probs=[-1.0 / (1 + len(thought))] * len(written.ids))


@pytest.mark.parametrize("confidence,checkpoints_tried", [(0.0, 1), (0.8, 2), (1.0, 4)])
def test_early_exit_ends_thinking_at_the_first_confident_answer(
    tokenizer, think, prompts, confidence, checkpoints_tried
):
    text = "3 and 4 and 5 make 12 it is."
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    decoder = Decoder(Unsure(tokenizer, f"{text}\n</think>\n\nfree", "early"), tokenizer, think)
    limits = Limits(max_thinking_tokens=50, max_answer_tokens=8)
    (answer,) = decoder.answer_early(prompts[:1], [0, 6, 9, 12, 49], confidence, limits)
    trials = [c for c in decoder.engine.contexts if c.endswith("</think>\n\n")]
    early = len(tokenizer("early", add_special_tokens=False).input_ids) + 1
    assert len(trials) == checkpoints_tried
    if confidence == 1.0:
        assert answer.closed and tokenizer.decode(answer.answer_ids) == "free<|im_end|>"
        assert len(answer.reasoning_ids) == length + 1 or len(answer.reasoning_ids) == length
        assert answer.tried_tokens == 4 * (early + len(think.closer_ids))
    else:
        assert not answer.closed and tokenizer.decode(answer.answer_ids) == "early<|im_end|>"
        assert len(answer.reasoning_ids) == [0, 6][checkpoints_tried - 1]
        assert answer.tried_tokens == (checkpoints_tried - 1) * (early + len(think.closer_ids))


def test_early_exit_that_never_comes_is_free_thinking(tokenizer, think, prompts):
    limits = Limits(max_thinking_tokens=24, max_answer_tokens=6)
    for decoder in two_engines(tokenizer, think):
        early = decoder.answer_early(prompts, [0, 5, 6, 11], 1.1, limits)
        free = decoder.think_and_answer(prompts, **vars(limits))
        assert [replace(answer, tried_tokens=0, confidence=0) for answer in early] == [
            replace(answer, confidence=0) for answer in free
        ]
        assert all(answer.tried_tokens > 0 for answer in early)


def test_tags_of_several_tokens_close_thinking_too(tokenizer, prompts):
    draft = ThinkFormat.of(tokenizer, open_tag="<Begin_of_Draft>", close_tag="<End_of_Draft>")
    model = Scripted(tokenizer, "unused", "3 it is.<End_of_Draft>\nThe answer is 3.")
    decoder = Decoder(model, tokenizer, draft)
    direct = [*prompts[0], *think_close(tokenizer)]
    (answer,) = decoder.think_and_answer([direct], max_thinking_tokens=12, max_answer_tokens=20)
    assert answer.closed and answer.finished and tokenizer.decode(answer.answer_ids) == "The answer is 3.<|im_end|>"
    (short,) = decoder.think_and_answer([direct], max_thinking_tokens=2, max_answer_tokens=20)
    assert not short.closed and len(short.reasoning_ids) == 2


def think_close(tokenizer):
    return tokenizer("\n</think>\n\n", add_special_tokens=False).input_ids


def test_early_exit_takes_no_answer_that_does_not_end(tokenizer, think, prompts):
    decoder = Decoder(Scripted(tokenizer, "3 and 4.\n</think>\n\nfree", "on and " * 20), tokenizer, think)
    (answer,) = decoder.answer_early(prompts[:1], [0, 3], 0.0, Limits(max_thinking_tokens=50, max_answer_tokens=8))
    assert answer.closed and tokenizer.decode(answer.answer_ids) == "free<|im_end|>"
    assert answer.tried_tokens == 2 * (len(think.closer_ids) + 8)


def with_card(folder, **facts):
    card = {
        "method": "trsd",
        "closer": "\n\nTime is up.\n</t>\n",
        "open_tag": "<t>",
        "close_tag": "</t>",
        "budgets": [8],
        "max_thinking_tokens": 77,
        "max_answer_tokens": 11,
    }
    (folder / "README.md").write_text(front_matter({"trsd": card | facts}) + "\n")
    return folder


def test_what_is_left_out_is_as_the_model_was_trained_and_said(tmp_path, tiny_folder, capsys):
    folder = with_card(Path(shutil.copytree(tiny_folder, tmp_path / "model")))
    args = as_trained(DecodingArguments(model=str(folder), max_answer_tokens=9))
    assert (args.max_thinking_tokens, args.max_answer_tokens) == (77, 9)
    assert (args.closer, args.open_tag, args.close_tag) == ("\n\nTime is up.\n</t>\n", "<t>", "</t>")
    said = capsys.readouterr().out
    assert said.startswith("from the model's card: max_thinking_tokens 77, closer ") and "max_answer_tokens" not in said


def test_without_a_card_it_is_as_training_has_it(tiny_folder, capsys):
    args = as_trained(DecodingArguments(model=str(tiny_folder)))
    assert (args.max_thinking_tokens, args.max_answer_tokens) == (Recipe().max_thinking_tokens, 512)
    assert (args.closer, args.open_tag, args.close_tag) == (Recipe().closer, "<think>", "</think>")
    assert "by default, for no card of the model says: max_thinking_tokens 4096" in capsys.readouterr().out
    assert as_trained(DecodingArguments()).max_thinking_tokens == load_recipe(RECIPES / "demo.yaml").max_thinking_tokens
    assert as_trained(DecodingArguments()).max_answer_tokens == load_recipe(RECIPES / "demo.yaml").max_answer_tokens


def test_where_all_is_given_no_card_is_read_and_nothing_said(tmp_path, tiny_folder, capsys):
    folder = with_card(Path(shutil.copytree(tiny_folder, tmp_path / "model")), max_thinking_tokens="many")
    given = DecodingArguments(
        model=str(folder), max_thinking_tokens=5, max_answer_tokens=9, closer="</t>", open_tag="<t>", close_tag="</t>"
    )
    assert as_trained(given) is given and capsys.readouterr().out == ""
    with pytest.raises(InputError, match="expected method, closer"):
        as_trained(replace(given, closer=None))


def test_the_models_flag_may_be_called_as_in_training():
    for name in ("--model", "--model_name_or_path"):
        assert parse_flags(DecodingArguments, [name, "m"], prog="p").model == "m"
