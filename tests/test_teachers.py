import json

import pytest
import torch
from conftest import make_tiny_model, make_traces

from trsd import teachers
from trsd.errors import InputError
from trsd.methods.trsd import full_example
from trsd.teachers import (
    HiddenCache,
    OnlineTeacher,
    TopKCache,
    build_hidden_cache,
    build_top_k_cache,
    cache_fingerprint,
)
from trsd_kernels import top_k_targets


def examples_of(traces):
    return [full_example(trace, index) for index, trace in enumerate(traces)]


def fingerprint_of(traces, **changes):
    values = dict(kind="k", teacher_weights="w", tokenizer="t", dtype=torch.float32, examples=examples_of(traces))
    return cache_fingerprint(**(values | changes))


@pytest.fixture
def online(tokenizer, traces):
    return OnlineTeacher(make_tiny_model(tokenizer), examples_of(traces), max_tokens_per_batch=512)


@pytest.mark.parametrize("traces_per_shard", [1, 3, 512])
def test_cache_gives_the_online_teachers_targets_in_any_order(tmp_path, monkeypatch, online, traces, traces_per_shard):
    monkeypatch.setattr(teachers, "TRACES_PER_SHARD", traces_per_shard)
    build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.float32)
    cache = HiddenCache(tmp_path / "cache", fingerprint=fingerprint_of(traces), device="cpu")
    for order in ([0], [3, 1], [6, 5, 4, 3, 2, 1, 0], [2, 2]):
        torch.testing.assert_close(
            cache.targets(order).hidden_states, online.hidden_states(order), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(cache.targets([0]).lm_head_weight, online.lm_head_weight)


def test_online_targets_are_the_plain_models_hidden_states(tokenizer, online, traces):
    plain = make_tiny_model(tokenizer)
    plain.set_attn_implementation("sdpa")
    trace = traces[2]
    ids = trace.prompt_ids + trace.reasoning_ids + trace.close_ids + trace.answer_ids
    hidden = plain.model(torch.tensor([ids])).last_hidden_state[0, -len(trace.answer_ids) - 1 : -1]
    torch.testing.assert_close(online.hidden_states([2]), hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"teacher_weights": "x"}, {"tokenizer": "x"}, {"kind": "x"}, {"dtype": torch.bfloat16}, {"traces": "other"}],
)
def test_stale_cache_is_refused_and_says_what_changed(tmp_path, tokenizer, think, online, traces, change):
    build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.float32)
    name = next(iter(change))
    if name == "traces":
        change = {"examples": examples_of(make_traces(tokenizer, think, 7, seed=1))}
    with pytest.raises(InputError, match=f"made with other {name}"):
        HiddenCache(tmp_path / "cache", fingerprint=fingerprint_of(traces, **change), device="cpu")


def test_incomplete_cache_is_refused(tmp_path, online, traces):
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="no complete teacher cache"):
        HiddenCache(tmp_path / "cache", fingerprint=fingerprint_of(traces), device="cpu")


def test_cache_with_missing_rows_is_refused(tmp_path, online, traces):
    build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.float32)
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"rows_per_trace": manifest["rows_per_trace"][:-1]}))
    with pytest.raises(InputError, match="its traces need"):
        HiddenCache(tmp_path / "cache", fingerprint=manifest["fingerprint"], device="cpu")


def test_a_failed_build_leaves_nothing_behind(tmp_path, online, traces, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(teachers, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_cache_is_hidden_size_numbers_a_token(tmp_path, online, traces):
    build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.bfloat16)
    rows = sum(len(trace.answer_ids) for trace in traces)
    size = (tmp_path / "cache" / "rows-00000.safetensors").stat().st_size
    assert rows * 64 * 2 <= size < rows * 64 * 2 + 200


def build_top_k(folder, online, traces, *, k=5, vocab_size=600):
    fingerprint = fingerprint_of(traces, k=k)
    build_top_k_cache(folder, online, k=k, vocab_size=vocab_size, temperature=2.0, fingerprint=fingerprint)
    return fingerprint


@pytest.mark.parametrize("traces_per_shard", [2, 512])
def test_top_k_cache_gives_the_targets_of_the_hidden_states(tmp_path, monkeypatch, online, traces, traces_per_shard):
    monkeypatch.setattr(teachers, "TRACES_PER_SHARD", traces_per_shard)
    fingerprint = build_top_k(tmp_path / "cache", online, traces)
    cache = TopKCache(tmp_path / "cache", temperature=2.0, fingerprint=fingerprint, device="cpu")
    for order in ([0], [4, 1, 1]):
        found = cache.targets(order)
        wanted = top_k_targets(online.hidden_states(order), online.lm_head_weight[:600], 5, temperature=2.0)
        assert found.token_ids.dtype == torch.int64 and torch.equal(found.token_ids, wanted.token_ids)
        torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tail_log_mass, wanted.tail_log_mass, rtol=1e-5, atol=1e-5)
        assert found.temperature == 2.0


def test_top_k_cache_of_another_k_is_refused(tmp_path, online, traces):
    build_top_k(tmp_path / "cache", online, traces)
    with pytest.raises(InputError, match="made with other k"):
        TopKCache(
            tmp_path / "cache",
            temperature=2.0,
            fingerprint=fingerprint_of(traces, k=6),
            device="cpu",
        )


def test_a_hidden_cache_is_no_top_k_cache(tmp_path, online, traces):
    build_hidden_cache(tmp_path / "cache", online, fingerprint=fingerprint_of(traces), dtype=torch.float32)
    other = fingerprint_of(traces, kind="top_k_cache", k=5)
    with pytest.raises(InputError, match="made with other k, kind"):
        TopKCache(tmp_path / "cache", temperature=1.0, fingerprint=other, device="cpu")
