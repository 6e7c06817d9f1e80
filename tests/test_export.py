"""GGUF files: weights bit for bit, tokens as llama.cpp will cut them, and whatever would be another model refused."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import REASONER, make_tiny_model, make_traces, refusal
from fake_server import free_port
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trsd.decoding import Decoder, Limits
from trsd.engines.hf import HFEngine
from trsd.errors import InputError
from trsd.export import main
from trsd.gguf_export import export, refuse_unsupported
from trsd.gguf_tokenizer import HARD_TEXTS, PRE_TOKENIZERS, cuts, first_difference, vocabulary_of
from trsd.model_card import CARD, ModelCard
from trsd.models import load_model
from trsd.recipe import Recipe
from trsd.traces import write_traces

QWEN3 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen3"
LLAMA_CPP = os.environ.get("TRSD_LLAMA_CPP")  # a folder with llama-server
SMALL = dict(
    vocab_size=640,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=2,
    bos_token_id=None,
)
CUT_ALIKE = dict(pre_tokenizer="qwen2")


@pytest.fixture
def texts(tokenizer, think, tmp_path):
    path = tmp_path / "texts.jsonl"
    write_traces(path, make_traces(tokenizer, think, 20))
    return path


def model_folder(tmp_path, tokenizer, kind, *, tie, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, tie_word_embeddings=tie, **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():  # norms and biases too, which begin as ones and zeros
        parameter.data.normal_()
    folder = tmp_path / f"{kind}-{tie}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def read(path):
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_transformers_reads_the_weights_back_bit_for_bit(kind, tie, tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    folder, model = model_folder(tmp_path, tokenizer, kind, tie=tie)
    export(folder, tmp_path / "x.gguf", dtype="f32", texts=texts, **CUT_ALIKE)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).state_dict()
    ours = model.state_dict()
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_in_bf16_matrices_are_rounded_and_vectors_stay_exact(tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    folder, model = model_folder(tmp_path, tokenizer, "qwen3", tie=True)
    export(folder, tmp_path / "x.gguf", texts=texts, **CUT_ALIKE)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.dim() > 1 else tensor
        assert torch.equal(back[name], expected), name


def test_a_shard_of_several_and_half_precision_files_are_exported_too(tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    folder, model = model_folder(tmp_path, tokenizer, "qwen3", tie=False, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    for name in (folder, tmp_path / "sharded"):
        export(name, tmp_path / f"{name.name}.gguf", texts=texts, **CUT_ALIKE)
    one, other = (read(tmp_path / f"{name}.gguf")[1] for name in (folder.name, "sharded"))
    assert one.keys() == other.keys() and all((one[name].data == other[name].data).all() for name in one)


def test_the_file_says_how_the_model_computes_and_is_served(tokenizer, think, texts, tmp_path):
    pytest.importorskip("gguf")
    folder, _ = model_folder(tmp_path, tokenizer, "qwen3", tie=True)
    (folder / CARD).write_text(ModelCard(Recipe(), think, tokenizer).text(5))
    export(folder, tmp_path / "x.gguf", texts=texts, **CUT_ALIKE)
    said, tensors = read(tmp_path / "x.gguf")
    assert said["trsd.closer"] == "\n</think>\n\n" and said["trsd.close_tag"] == "</think>"
    assert said["trsd.max_thinking_tokens"] == 4096 and "trsd.budgets" not in said  # none: it was not evaluated
    assert said["qwen3.attention.head_count_kv"] == 2 and said["qwen3.rope.freq_base"] == 10000.0
    assert said["qwen3.attention.key_length"] == AutoConfig.from_pretrained(folder).head_dim
    assert said["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert said["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(640))
    assert said["tokenizer.ggml.eos_token_id"] == 2 and said["tokenizer.ggml.pre"] == "qwen2"
    assert said["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 4, 4, 1]  # control, the think tags shown, normal
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert not said["tokenizer.ggml.add_bos_token"] and "output.weight" not in tensors


def test_rows_beyond_the_tokenizer_are_unused_tokens(tokenizer, texts):
    pytest.importorskip("gguf")
    found = vocabulary_of(tokenizer, 643, pre_tokenizer="qwen2", texts=["a"])
    assert found.tokens[640:] == ["[PAD640]", "[PAD641]", "[PAD642]"] and found.types[640:] == [5, 5, 5]
    assert len(found.tokens) == 643


def bpe(steps, *, ignore_merges=False):
    """A tokenizer of some merges behind the pre-tokenizer ``steps``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*HARD_TEXTS * 20, "I'm 33 333 3333  the the\n\n  code;\n" * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


def split(pattern):
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


LIKE_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {  # as the models' own tokenizer.json say
    "qwen2": lambda: bpe(split(LIKE_QWEN)),
    "llama-bpe": lambda: bpe(split(LIKE_QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), ignore_merges=True),
    "smollm": lambda: bpe(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: bpe([pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_published_pre_tokenizer_is_found_by_what_it_writes(name):
    pytest.importorskip("gguf")
    tokenizer = PUBLISHED[name]()
    assert vocabulary_of(tokenizer, len(tokenizer), pre_tokenizer=None, texts=[]).pre_tokenizer == name
    assert first_difference(tokenizer, name, HARD_TEXTS) is None
    other = {"qwen2": "gpt-2", "llama-bpe": "qwen2", "smollm": "qwen2", "gpt-2": "smollm"}[name]
    assert first_difference(tokenizer, other, HARD_TEXTS) is not None


def test_llama_cpp_normalizes_nothing_which_texts_that_need_it_show():
    tokenizer = PUBLISHED["qwen2"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert first_difference(tokenizer, "qwen2", [composed, apart]) == apart


@pytest.mark.skipif(not QWEN3.exists(), reason="needs shared/data/tokenizers/qwen3")
def test_the_qwen3_tokenizer_is_known():
    pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(QWEN3)
    found = vocabulary_of(tokenizer, 151936, tags=("<think>",), pre_tokenizer=None, texts=[])
    assert found.pre_tokenizer == "qwen2" and not found.adds_bos and len(found.merges) == 151387
    assert found.tokens[151668] == "</think>" and found.types[151643:151647] == [3, 3, 3, 3]
    assert set(found.types[151669:]) == {5}


def test_the_bundled_tokenizer_is_no_known_one_but_the_same_on_its_own_texts(tokenizer, texts, tmp_path, capsys):
    pytest.importorskip("gguf")
    words = ["--model", str(REASONER), "--output", str(tmp_path / "x.gguf")]
    assert "none of llama.cpp's pre-tokenizers" in refusal(capsys, lambda: main(words))
    assert "expected a file of texts" in refusal(capsys, lambda: main([*words, "--pre_tokenizer", "qwen2"]))
    main([*words, "--pre_tokenizer", "qwen2", "--texts", str(texts)])
    assert f"model   {tmp_path / 'x.gguf'}" in capsys.readouterr().out
    assert "exists already" in refusal(capsys, lambda: main(words))


def test_a_name_under_which_a_text_comes_out_otherwise_is_refused_with_the_text(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": "two  spaces"}) + "\n")
    with pytest.raises(InputError, match="qwen2 writes 'two  spaces' in other tokens"):
        export(REASONER, tmp_path / "x.gguf", texts=rows, **CUT_ALIKE)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


UNLIKE = {
    "gemma2": ("gemma2", {}, "gemma2 is none of qwen2, qwen3, llama"),
    "rope": (
        "qwen3",
        dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        r"scaled \(yarn\)",
    ),
    "window": ("qwen2", dict(use_sliding_window=True, sliding_window=8), "sliding window"),
    "activation": ("qwen3", dict(hidden_act="gelu"), "activation is gelu"),
    "bias": ("llama", dict(attention_bias=True), "it has attention_bias"),
}


@pytest.mark.parametrize("change", list(UNLIKE))
def test_what_would_be_another_model_is_refused_by_name(change):
    kind, settings, said = UNLIKE[change]
    config = AutoConfig.for_model(kind, **SMALL | settings)
    with pytest.raises(InputError, match=said):
        refuse_unsupported(config)
    refuse_unsupported(AutoConfig.for_model("qwen3", **SMALL))


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")
    with pytest.raises(InputError, match="no byte-level BPE"):
        cuts(words, "qwen2")


def test_weights_that_half_precision_cannot_hold_are_refused_and_leave_no_file(tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    folder, model = model_folder(tmp_path, tokenizer, "qwen3", tie=True)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="down_proj.weight is not finite in f16"):
        export(folder, tmp_path / "x.gguf", dtype="f16", texts=texts, **CUT_ALIKE)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_a_tensor_without_a_place_is_refused(tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    from safetensors.torch import load_file, save_file

    folder, _ = model_folder(tmp_path, tokenizer, "qwen3", tie=True)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.extra.weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match="extra.weight has no place in a qwen3 of llama.cpp"):
        export(folder, tmp_path / "x.gguf", texts=texts, **CUT_ALIKE)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'trsd\[gguf\]'"):
        export(REASONER, tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory):
    """(URL, folder) of llama.cpp serving the bundled reasoner in f32."""
    if LLAMA_CPP is None:
        pytest.skip("TRSD_LLAMA_CPP names no folder with llama-server")
    httpx, _ = pytest.importorskip("httpx"), pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copytree(REASONER, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    from trsd.thinking import ThinkFormat

    write_traces(folder / "texts.jsonl", make_traces(tokenizer, ThinkFormat.of(tokenizer), 100))
    export(folder / "model", folder / "x.gguf", dtype="f32", texts=folder / "texts.jsonl", **CUT_ALIKE)
    port = free_port()
    command = [f"{LLAMA_CPP}/llama-server", "-m", str(folder / "x.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, f"llama-server ended with {process.returncode}"
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
        yield url, folder
    finally:
        process.terminate()
        process.wait(20)


def test_llama_cpp_cuts_texts_as_we_say_it_does(llama_server, tokenizer, think):
    import httpx

    url, folder = llama_server
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    known = [row["question"] for row in rows] + [tokenizer.decode(row["reasoning_ids"]) for row in rows]
    theirs = cuts(tokenizer, "qwen2")
    for text in [*HARD_TEXTS, *known, think.closer]:
        found = httpx.post(f"{url}/tokenize", json={"content": text, "parse_special": True}).json()["tokens"]
        assert found == theirs.encode(text, add_special_tokens=False).ids
        assert text in HARD_TEXTS or found == tokenizer(text, add_special_tokens=False).input_ids


def test_llama_cpp_answers_at_budgets_as_our_engine_does(llama_server, tokenizer, think, traces):
    import httpx

    url, _ = llama_server
    model = load_model(REASONER, dtype=torch.float32, device="cpu")
    decoder = Decoder(HFEngine(model, tokenizer, batch_size=8), tokenizer, think)
    prompts, budgets = [trace.prompt_ids for trace in traces], [0, 60, 250]
    _, at = decoder.think_at_budgets(prompts, budgets, Limits(max_thinking_tokens=250, max_answer_tokens=24))

    def write(ids, length):
        wanted = {"prompt": list(ids), "n_predict": length, "temperature": 0, "return_tokens": True}
        return httpx.post(f"{url}/completion", json=wanted, timeout=60).json()["tokens"]

    for budget in budgets:
        for prompt, answer in zip(prompts, at[budget], strict=True):
            context = [*prompt, *answer.reasoning_ids, *answer.close_ids]
            if answer.reasoning_ids:
                assert write(prompt, len(answer.reasoning_ids)) == answer.reasoning_ids
            assert write(context, len(answer.answer_ids)) == answer.answer_ids


def test_the_tiny_model_of_the_other_tests_is_exported_as_any(tokenizer, texts, tmp_path):
    pytest.importorskip("gguf")
    make_tiny_model(tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    export(tmp_path / "tiny", tmp_path / "x.gguf", texts=texts, **CUT_ALIKE)
    assert "trsd.closer" not in read(tmp_path / "x.gguf")[0]  # no card, nothing said
