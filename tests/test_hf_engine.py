import math

import pytest
import torch
from conftest import make_tiny_model
from scripted import engine_of
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from trsd.engines import Continuation, Sampling, hf, one
from trsd.engines.hf import draw_tokens
from trsd.engines.slots import Slots, common_length
from trsd.errors import InputError
from trsd.models import PACKED_ATTENTION, with_attention

GREEDY = Sampling()
SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.4,
)


def architectures(vocab_size, eos):
    shared = dict(vocab_size=vocab_size, eos_token_id=eos, pad_token_id=0, bos_token_id=None, **SHAPE)
    gemma = dict(head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    return {
        "llama": (LlamaForCausalLM, LlamaConfig(**shared)),
        "mistral": (MistralForCausalLM, MistralConfig(sliding_window=5, **shared)),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config(query_pre_attn_scalar=8, **gemma, **shared)),
        "phi3": (Phi3ForCausalLM, Phi3Config(**shared)),
    }


def contexts(count, seed=0, vocab_size=640, longest=40):
    torch.manual_seed(seed)
    lengths = torch.randint(1, longest, (count,)).tolist()
    return [torch.randint(5, vocab_size, (length,)).tolist() for length in lengths]


def plainly(model, context, max_new_tokens, **options):
    """What transformers itself writes after one context."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **options)
    config.eos_token_id = model.generation_config.eos_token_id
    knows_soft_caps = {"gemma2": "eager"}.get(model.config.model_type, "sdpa")
    with torch.no_grad(), with_attention(model, knows_soft_caps):
        out = model.generate(torch.tensor([context]), generation_config=config)
    return out[0, len(context) :].tolist()


def write(engine, wanted, sampling=GREEDY):
    found = dict(engine.run([one(continuation) for continuation in wanted], sampling))
    return [found[place] for place in range(len(wanted))]


def wishes(contexts, max_new_tokens=12, **options):
    return [
        Continuation(context_ids=context, max_new_tokens=max_new_tokens, seed=seed, **options)
        for seed, context in enumerate(contexts)
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "phi3"])
def test_greedy_text_is_transformers_own(tokenizer, name):
    torch.manual_seed(1)
    kind, config = architectures(len(tokenizer), tokenizer.eos_token_id)[name]
    model = kind(config).double().eval()
    given = contexts(9)
    found = write(engine_of(model, tokenizer, 4), wishes(given))
    assert [written.ids for written in found] == [plainly(model, context, 12) for context in given]
    assert len({tuple(written.ids) for written in found}) > 4


@pytest.mark.parametrize("penalty", [1.3, 1e4])
def test_a_repetition_penalty_is_transformers_own(tokenizer, penalty):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    given = contexts(7)
    found = write(engine_of(model, tokenizer, 3), wishes(given), Sampling(repetition_penalty=penalty))
    plain = [plainly(model, context, 12, repetition_penalty=penalty) for context in given]
    assert [written.ids for written in found] == plain


def test_log_probs_are_the_models_whatever_the_sampling(tokenizer):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    sampling = Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.2)
    given = contexts(4)
    for context, written in zip(given, write(engine_of(model, tokenizer), wishes(given), sampling), strict=True):
        ids = torch.tensor([*context, *written.ids])
        with torch.no_grad(), with_attention(model, "sdpa"):
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        expected = log_probs[len(context) - 1 : -1].gather(1, ids[len(context) :, None])[:, 0]
        assert torch.tensor(written.log_probs) == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_what_runs_beside_a_row_changes_nothing(tokenizer, batch_size):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    given, sampling = wishes(contexts(12), max_new_tokens=20), Sampling(temperature=1.0, top_p=0.95)
    alone = [write(engine_of(model, tokenizer), [wish], sampling)[0].ids for wish in given]
    assert [w.ids for w in write(engine_of(model, tokenizer, batch_size), given, sampling)] == alone
    assert len({len(ids) for ids in alone}) > 1 or len(set(map(tuple, alone))) == 12


def test_contexts_longer_than_a_pass_are_run_in_pieces(tokenizer, monkeypatch):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    given = wishes(contexts(6, longest=60))
    whole = [w.ids for w in write(engine_of(model, tokenizer), given)]
    monkeypatch.setattr(hf, "PREFILL_TOKENS", 7)
    assert [w.ids for w in write(engine_of(model, tokenizer), given)] == whole


def branching(prompt, cuts, seed, more=True):
    """Think, answer after every cut at once, then go on with the longest."""
    (thought,) = yield [Continuation(context_ids=prompt, max_new_tokens=16, seed=seed)]
    answers = yield [
        Continuation(context_ids=[*prompt, *thought.ids[:cut], 7, 9], max_new_tokens=9, seed=seed + cut + 1)
        for cut in cuts
    ]
    if not more:
        return thought.ids, [answer.ids for answer in answers]
    (last,) = yield [Continuation(context_ids=[*prompt, *thought.ids], max_new_tokens=4, seed=seed)]
    return thought.ids, [answer.ids for answer in answers], last.ids


@pytest.mark.parametrize("batch_size", [1, 3, 5, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_branches_are_what_separate_contexts_write(tokenizer, batch_size, temperature):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    sampling, cuts = Sampling(temperature=temperature), (0, 3, 8, 8, 15)
    prompts = contexts(6)
    scripts = [branching(prompt, cuts, 100 * i) for i, prompt in enumerate(prompts)]
    found = dict(engine_of(model, tokenizer, batch_size).run(scripts, sampling))
    alone = engine_of(model, tokenizer, 1)
    for i, prompt in enumerate(prompts):
        (thought,) = write(alone, [Continuation(context_ids=prompt, max_new_tokens=16, seed=100 * i)], sampling)
        wanted = [
            Continuation(context_ids=[*prompt, *thought.ids[:cut], 7, 9], max_new_tokens=9, seed=100 * i + cut + 1)
            for cut in cuts
        ]
        assert found[i][0] == thought.ids
        assert found[i][1] == [written.ids for wish in wanted for written in write(alone, [wish], sampling)]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_drafts_change_no_token(tokenizer, monkeypatch, temperature):
    model = make_tiny_model(tokenizer, dtype=torch.float64)

    def run(longest):
        monkeypatch.setattr(hf, "LONGEST_DRAFT", longest)
        scripts = [branching(prompt, (16, 15, 14, 8), i, more=False) for i, prompt in enumerate(contexts(3, longest=8))]
        return dict(engine_of(model, tokenizer, 3).run(scripts, Sampling(temperature=temperature, seed=4)))

    assert run(512) == run(0)


def test_drafts_save_passes_and_end_where_they_are_wrong_too_often(tokenizer, monkeypatch):
    model = make_tiny_model(tokenizer, dtype=torch.float64)
    passes, forward = [], hf._Batch._forward
    monkeypatch.setattr(hf._Batch, "_forward", lambda self, *args: (passes.append(1), forward(self, *args))[1])

    def same():
        return (yield [Continuation(context_ids=[5, 6, 7, 8], max_new_tokens=20)] * 4)

    def count(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(hf, name, value)
        passes.clear()
        ((_, written),) = engine_of(model, tokenizer, 1).run([same()], GREEDY)
        assert len({tuple(w.ids) for w in written}) == 1
        return len(passes)

    guessing = count()
    once = count(FIRST_GUESSES=0, WORTH_GUESSING=1.1)
    never = count(LONGEST_DRAFT=0)
    assert guessing < never / 2 and guessing < once < never


def test_learned_positions_are_never_overrun(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=0
    )
    config.eos_token_id = tokenizer.eos_token_id
    model = GPT2LMHeadModel(config).double().eval()
    given = [[5, 6], list(range(5, 41)), [9] * 30, [7, 7, 7]]
    found = write(engine_of(model, tokenizer, 4), wishes(given, 12))
    assert [written.ids for written in found] == [plainly(model, context, 12) for context in given]


def test_under_autocast_text_stays_what_it_is_alone(tokenizer):
    model = make_tiny_model(tokenizer)
    given = wishes(contexts(4), 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = write(engine_of(model, tokenizer, 4), given)
        assert [len(written.ids) for written in found] == [8] * 4
        plain = [plainly(model, list(wish.context_ids), 1) for wish in given]
    assert sum(written.ids[:1] == ids for written, ids in zip(found, plain, strict=True)) >= 3  # bf16 may tip one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_writes_what_the_cpu_writes(tokenizer, temperature):
    model, sampling = make_tiny_model(tokenizer, dtype=torch.float64), Sampling(temperature=temperature, top_p=0.9)
    scripts = lambda: [branching(prompt, (0, 5, 12), 10 * i) for i, prompt in enumerate(contexts(9))]  # noqa: E731
    on_cpu = dict(engine_of(model, tokenizer, 4).run(scripts(), sampling))
    assert dict(engine_of(model.cuda(), tokenizer, 4).run(scripts(), sampling)) == on_cpu


def test_under_autocast_keys_are_kept_as_attention_takes_them(tokenizer, monkeypatch):
    """Rotated, an fp32 model's keys are fp32, and every later token would cast all of them."""
    kept, begin = [], Slots.begin
    monkeypatch.setattr(Slots, "begin", lambda self, *told: (kept.append(self), begin(self, *told))[1])
    with torch.autocast("cpu", torch.bfloat16):
        write(engine_of(make_tiny_model(tokenizer), tokenizer, 4), wishes(contexts(4), 2))
    assert {each.dtype for slots in kept for each in (*slots.keys, *slots.values)} == {torch.bfloat16}


def test_stop_ids_end_a_continuation_and_are_written(tokenizer):
    model = make_tiny_model(tokenizer)
    (free,) = write(engine_of(model, tokenizer), wishes([[5, 6, 7]], 12))
    stop = free.ids[4]
    (stopped,) = write(engine_of(model, tokenizer), wishes([[5, 6, 7]], 12, stop_ids=(stop,)))
    assert stopped.ids == free.ids[: free.ids.index(stop) + 1]


def test_a_wish_beyond_the_context_is_refused_with_its_numbers(tokenizer):
    engine = engine_of(make_tiny_model(tokenizer), tokenizer)
    with pytest.raises(InputError, match="500 tokens and 13 may follow, but the model's context holds 512"):
        write(engine, wishes([[5] * 500], 13))


def test_between_results_the_model_is_as_it_was(tokenizer):
    model = make_tiny_model(tokenizer).train()
    stream = engine_of(model, tokenizer, 2).run([one(wish) for wish in wishes(contexts(8))], GREEDY)
    next(stream)
    assert model.training and model.config._attn_implementation == PACKED_ATTENTION
    assert not torch.is_inference_mode_enabled()
    next(stream)
    stream.close()
    assert model.training and model.config._attn_implementation == PACKED_ATTENTION


def test_rotary_embeddings_that_change_with_length_bound_the_context(tokenizer, capsys):
    model = make_tiny_model(tokenizer)
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert engine_of(model, tokenizer).context_limit == 64
    assert "longrope rotary embeddings change beyond 64 tokens" in capsys.readouterr().err


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 9) * 2
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for top_p in (1.0, 0.9, 0.5, 1e-9):
        tokens = draw_tokens(logits.expand(len(draws), -1), top_p, draws)
        probs = logits[0].double().softmax(-1)
        order = probs.argsort(descending=True)
        kept = order[: 1 + int((probs[order].cumsum(0) < top_p).sum())][:9]
        expected = torch.zeros(9, dtype=torch.float64)
        expected[kept] = probs[kept] / probs[kept].sum()
        assert torch.bincount(tokens, minlength=9) / len(draws) == pytest.approx(expected.numpy(), abs=2e-4)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_token_of_no_probability_is_never_drawn(draw, top_p):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, -1.0, -math.inf]])
    assert int(draw_tokens(logits, top_p, torch.tensor([draw], dtype=torch.float64))) in (1, 3)


@pytest.mark.parametrize("one_,other,length", [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2)])
def test_common_length(one_, other, length):
    assert common_length(one_, other) == common_length(other, one_) == length
