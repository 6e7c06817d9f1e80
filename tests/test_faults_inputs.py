"""What a user brings and gets wrong, met at the command line: labels, vocabularies, offsets, masks, data, recipes, a
generation server, and models that bring code."""

import json
import time

import pytest
import torch
from conftest import losses, make_tiny_model, make_traces, refusal, row_of, write_rows
from fake_server import FakeServer, free_port
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trsd import analyze, cache, evaluate, generate, plan, sweep, train
from trsd.batching import pack_examples
from trsd.data import NO_ANSWER
from trsd.errors import InputError
from trsd.methods.trsd import cut_example, with_thinking
from trsd.models import load_model, packed_hidden_states
from trsd_kernels import fused_linear_distillation, layout_of, packed_layout, shift_labels, varlen_attention

# 14: labels


@pytest.mark.parametrize(
    "ids,message",
    [
        ([10**6], "token 1000000 is none of the tokenizer's"),
        ([-1], "answer_ids must be a list of token ids"),
        ([2.0], "answer_ids must be a list of token ids"),
        ([True], "answer_ids must be a list of token ids"),
        (["2"], "answer_ids must be a list of token ids"),
    ],
)
def test_fault_14_a_token_id_that_is_none_is_refused_with_its_row(run, trace_file, capsys, ids, message):
    row = row_of(trace_file)
    bad = row | {"answer_ids": [*ids, row["answer_ids"][-1]]}
    write_rows(trace_file, row, bad)
    error = refusal(capsys, lambda: run("run"))
    assert f"{trace_file}:2: {message}" in error


@pytest.mark.parametrize("size", [2, 500])
def test_fault_14_a_token_that_the_model_has_no_row_for_is_refused(run, tiny_folder, tokenizer, capsys, size):
    """Of the chat template (``size`` 2) or of the traces alone."""
    model = make_tiny_model(tokenizer)
    model.resize_token_embeddings(size)
    model.save_pretrained(tiny_folder)
    error = refusal(capsys, lambda: run("run"))
    assert f"is none of the {size} that student and teacher have" in error and "resize" in error


def test_fault_14_a_model_without_rows_for_tokens_that_nobody_uses_trains(run, tiny_folder, tokenizer):
    """As Gemma 3, whose tokenizer knows one token more than its text models."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<never_written>"])
    tokenizer.save_pretrained(tiny_folder)
    rows = [{"prompt": f"How many are {i}?", "reasoning": "2+2=4.", "answer": "It is 4."} for i in range(4)]
    assert losses(run("run", max_steps=1, data=write_rows(tiny_folder.parent / "text.jsonl", *rows)))


# 15: vocabularies


def test_fault_15_a_padded_teacher_is_compared_on_the_shared_tokens_alone(run, tiny_folder, tokenizer, tmp_path):
    """The student with a padded vocabulary is its own teacher: on whole traces nothing is left to learn."""
    teacher = make_tiny_model(tokenizer)
    teacher.resize_token_embeddings(len(tokenizer) + 40)
    with torch.no_grad():  # likely tokens, so that counting or zero-filling them would show
        teacher.get_output_embeddings().weight[len(tokenizer) :] *= 5
    teacher.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    folder = run(
        "run", max_steps=1, anchor_share=1.0, thinking_weight=0, teacher_model_name_or_path=tmp_path / "padded"
    )
    assert losses(folder)[0][1] == pytest.approx(0.0, abs=1e-5)


def test_fault_15_two_tokens_exchanged_are_refused_by_name(run, tiny_folder, tmp_path, capsys):
    text = (tiny_folder / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    (one, first), (two, second) = list(vocabulary.items())[300:302]
    vocabulary[one], vocabulary[two] = second, first
    teacher = tmp_path / "exchanged"
    make_tiny_model(AutoTokenizer.from_pretrained(tiny_folder)).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(teacher)
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    error = refusal(capsys, lambda: run("run", teacher_model_name_or_path=teacher))
    assert f"first at token {min(first, second)}" in error and repr(one) in error


# 19: offsets


def test_fault_19_an_empty_sequence_between_others_changes_nothing():
    query, key, value = torch.randn(3, 9, 2, 8)
    plain, with_empty = ([0, 4, 9], [0, 0, 4, 4, 9, 9])
    outputs = [
        varlen_attention(query, key, value, torch.tensor(offsets, dtype=torch.int32)) for offsets in (plain, with_empty)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "offsets,message",
    [
        (torch.tensor([0, 4], dtype=torch.int32), "from 0 to 9 tokens, got 0 to 4"),
        (torch.tensor([0, 6, 4, 9], dtype=torch.int32), "non-decreasing"),
        (torch.tensor([0, -1, 9], dtype=torch.int32), "non-decreasing"),
        (torch.tensor([0, 4, 9]), "expected int32, got torch.int64"),
        (torch.tensor([[0, 9]], dtype=torch.int32), "shape"),
        (torch.tensor([0.0, 9.0]), "expected int32"),
    ],
)
def test_fault_19_wrong_offsets_make_no_layout(offsets, message):
    with pytest.raises(ValueError, match=message):
        layout_of(offsets, total_tokens=9)


def test_fault_19_a_layout_of_another_row_never_reaches_a_models_layers(tiny_model):
    ids = torch.arange(1, 10)
    for layout in (packed_layout([4, 4]), packed_layout([4, 6]), packed_layout([9], device="meta")):
        with pytest.raises((ValueError, RuntimeError)) as error:
            packed_hidden_states(tiny_model, ids, layout)
        assert "9" in str(error.value) or "meta" in str(error.value)


# 20: labels and sequence ends


def test_fault_20_packed_labels_give_the_loss_of_each_sequence_alone(tiny_model, traces):
    """Against transformers' own shift and loss, sequence by sequence; every token of the row is given as a label."""
    sequences = [[*t.prompt_ids, *t.reasoning_ids, *t.close_ids, *t.answer_ids] for t in traces[:3]]
    layout = packed_layout([len(ids) for ids in sequences])
    row = torch.tensor([token for ids in sequences for token in ids])
    labels = shift_labels(row, layout)
    ends = layout.cu_seqlens[1:].long() - 1
    assert (labels[ends] == -100).all() and (labels != -100).sum() == len(row) - len(sequences)
    hidden = packed_hidden_states(tiny_model, row, layout)
    head = tiny_model.get_output_embeddings().weight
    packed = fused_linear_distillation(hidden, head, None, None, labels, alpha=0.0, reduction="sum").loss
    tiny_model.set_attn_implementation("sdpa")
    alone = 0.0
    for ids in sequences:
        tokens = torch.tensor([ids])
        alone += tiny_model(input_ids=tokens, labels=tokens).loss.item() * (len(ids) - 1)
    assert packed.item() == pytest.approx(alone, rel=1e-5)


def test_fault_20_the_first_token_of_a_sequence_is_nobodys_label(traces, think):
    """Every label of a packed row is the next token of its own sequence, or the end of the sequence's answer."""
    examples = [with_thinking(cut_example(t, i, 3, think), t, 3) for i, t in enumerate(traces)]
    (batch,) = pack_examples(examples, 4096, "cpu")
    bounds = batch.layout.cu_seqlens.tolist()
    for rows, labels in ((batch.rows, batch.labels), (batch.thinking_rows, batch.thinking_labels)):
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            if row + 1 in bounds:
                assert label == traces[bounds.index(row + 1) - 1].answer_ids[-1]
            else:
                assert label == batch.input_ids[row + 1]


# 21: the mask


def test_fault_21_a_stored_answer_without_a_stop_token_is_refused_with_its_row(run, trace_file, capsys):
    row = row_of(trace_file)
    write_rows(trace_file, row, row | {"id": "other", "answer_ids": row["answer_ids"][:-1]})
    error = refusal(capsys, lambda: run("run"))
    assert f"{trace_file}:2: " in error and "stop token" in error


def test_fault_21_a_stored_answer_of_a_stop_token_alone_is_dropped_and_counted(run, trace_file, capsys):
    row = row_of(trace_file)
    write_rows(trace_file, row, row | {"id": "other", "answer_ids": row["answer_ids"][-1:]})
    run("run", max_steps=1)
    assert f"1 x {NO_ANSWER}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{}, dict(branches_per_trace=3), dict(method="sft")])
def test_fault_21_the_stop_token_is_learnt_from_every_sequence(run, flags, monkeypatch, tokenizer):
    ends = []

    def packed(examples, *arguments, **options):
        ends.extend(part.labels[-1] for example in examples for part in (example, *example.branches))
        return pack_examples(examples, *arguments, **options)

    monkeypatch.setattr("trsd.loop.pack_examples", packed)
    run("run", max_steps=1, **flags)
    assert len(ends) >= 4 and set(ends) == {tokenizer.eos_token_id}


def test_fault_21_a_cut_that_leaves_no_label_is_refused_and_says_how_many(run, capsys):
    flags = dict(method="sft", keep_fraction=0.05, loss_sections="a")
    error = refusal(capsys, lambda: run("run", **flags))
    assert "10 x no token to learn is left by the cut" in error


def test_fault_21_a_long_answer_is_dropped_whole_and_never_cut(run, tokenizer, think, trace_file, capsys):
    traces = make_traces(tokenizer, think, 10)
    longest = max(trace.num_tokens for trace in traces)
    run("run", max_steps=1, max_length=longest - 1, max_tokens_per_batch=512)
    assert "longer than max_length" in capsys.readouterr().out


# 23: recipes


@pytest.mark.parametrize(
    "text,words,parts",
    [
        ("learning_rte: 1e-3\n", [], ["unknown key 'learning_rte'", "did you mean learning_rate?"]),
        ("", ["--train_batch_sizes", "4"], ["--train_batch_size"]),
        ("max_steps: soon\n", [], ["max_steps", "soon"]),
        ("", ["--bf16", "maybe"], ["bf16"]),
        ("", ["--divergence", "forward-kl"], ["divergence", "forward_kl"]),
        ("method: lsp\n", [], ["teacher_model_name_or_path", "use method sft"]),
        ("", ["--method", "sft", "--alpha", "0.5"], ["alpha", "expected 0"]),
        ("", ["--teacher", "vector_cache"], ["teacher: vector_cache needs lora_rank", "use hidden_cache"]),
        ("max_length: 600\n", ["--max_tokens_per_batch", "512"], ["max_tokens_per_batch", "raise the former"]),
        ("", ["--resume_from_checkpoint", "latest"], ["resume_from_checkpoint", "output_dir"]),
        ("", ["--eval_budgets", "9999999"], ["eval_budgets", "max_thinking_tokens"]),
        ("alpha: 2\nbeta: -1\n", [], ["alpha: expected 0 to 1", "beta: expected 0 to 1"]),
    ],
)
def test_fault_23_a_wrong_recipe_exits_2_with_the_key_and_what_to_do(tmp_path, capsys, text, words, parts):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n" + text)
    error = refusal(capsys, lambda: train.main(["--config", str(recipe), *words]))
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    "command,words,wanted",
    [
        (evaluate, "--budget", "--budgets"),
        (generate, "--output=x --max_thinking_token", "--max_thinking_tokens"),
        (analyze, "--data=x --output_dir=x --tokeniser", "--tokenizer"),
        (sweep, "--side", "--sides"),
        (plan, "--max_lenght", "--max_length"),
        (cache, "--train_batch_sze", "--train_batch_size"),
    ],
)
def test_fault_23_every_command_suggests_the_flag_that_was_meant(capsys, command, words, wanted):
    assert wanted in refusal(capsys, lambda: command.main([*words.split(), "1"]))


# 26: generation servers


@pytest.fixture
def serve(tmp_path):
    """Generate from servers; returns seconds it took."""
    questions = write_rows(tmp_path / "q.jsonl", *({"question": f"What is {i} + 1?", "answer": "1"} for i in range(6)))

    def serve(*urls, **flags):
        words = dict(engine="server", server=",".join(urls), data=questions, output=tmp_path / "traces.jsonl")
        words |= dict(request_timeout=0.3, max_retries=0, max_thinking_tokens=6, max_answer_tokens=4) | flags
        start = time.perf_counter()
        try:
            generate.main([word for name, value in words.items() for word in (f"--{name}", str(value))])
        finally:
            assert time.perf_counter() - start < 20

    return serve


def test_fault_26_a_dead_server_is_named_and_nothing_is_left_behind(serve, capsys, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    error = refusal(capsys, lambda: serve(url))
    assert url in error and not list(tmp_path.glob("traces.jsonl"))


@pytest.mark.parametrize(
    "fault,message",
    [
        ("silence", "no whole reply within 0.3 s"),
        ("trickle", "no whole reply within 0.3 s"),
        ("500", "HTTP 500: a fault number 500"),
        ("garbage", "a reply that is no JSON"),
        ("bad ids", "ids below 640"),
    ],
)
def test_fault_26_a_faulty_server_ends_the_command_with_its_words(serve, capsys, fault, message):
    with FakeServer(fault=lambda number: fault) as server:
        error = refusal(capsys, lambda: serve(server.url))
    assert server.url in error and message in error


def test_fault_26_servers_with_other_weights_are_refused_before_any_work(serve, capsys):
    with FakeServer() as one, FakeServer(weights="of another model") as other:
        error = refusal(capsys, lambda: serve(one.url, other.url))
        assert one.url in error and other.url in error
        assert max(len(one.bodies), len(other.bodies)) <= 1


def test_fault_26_a_server_of_another_model_is_refused_by_name(serve, capsys):
    with FakeServer(models=("another",)) as server:
        error = refusal(capsys, lambda: serve(server.url, served_model="tiny"))
        assert "tiny" in error and "another" in error and not server.bodies


# 28: models that bring code

CODE = """
open({marker!r}, "a").write("ran")
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = {kind!r}
class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(Qwen2Tokenizer):
    pass
"""


@pytest.fixture
def own_code(tiny_folder, tmp_path, monkeypatch):
    """Makes the tiny model one that brings code, which writes a file when it runs; returns that file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"

    def own_code(kind, *, tokenizer=False):
        (tiny_folder / "own.py").write_text(CODE.format(marker=str(marker), kind=kind))
        config = json.loads((tiny_folder / "config.json").read_text())
        names = dict(AutoConfig="own.OwnConfig", AutoModelForCausalLM="own.OwnForCausalLM")
        changed = config | dict(model_type=kind, architectures=["OwnForCausalLM"], auto_map=names)
        (tiny_folder / "config.json").write_text(json.dumps(changed))
        if tokenizer:
            path = tiny_folder / "tokenizer_config.json"
            own = dict(tokenizer_class="OwnTokenizer", auto_map=dict(AutoTokenizer=["own.OwnTokenizer", None]))
            path.write_text(json.dumps(json.loads(path.read_text()) | own))
        return marker

    return own_code


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_fault_28_a_model_with_code_of_its_own_is_refused_unless_it_is_trusted(run, own_code, capsys, with_tokenizer):
    marker = own_code("own_kind", tokenizer=with_tokenizer)
    error = refusal(capsys, lambda: run("run"))
    assert "trust_remote_code" in error and not marker.exists()
    folder = run("trusted", max_steps=1, trust_remote_code=True)
    assert marker.exists() and losses(folder)


def test_fault_28_code_beside_a_known_architecture_never_runs(run, own_code, tiny_folder):
    """transformers' own class reads the weights; the folder's code is left alone."""
    marker = own_code("qwen3")
    run("run", max_steps=1)
    assert not marker.exists()


@pytest.mark.parametrize("command", ["teacher", "evaluate", "generate", "plan"])
def test_fault_28_no_command_runs_a_models_code(
    words, own_code, tiny_folder, trace_file, tmp_path, capsys, command, monkeypatch
):
    """Not even where transformers would ask and be told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = own_code("own_kind", tokenizer=True)
    questions = str(write_rows(tmp_path / "q.jsonl", {"question": "What is 1 + 1?", "answer": "2"}))
    calls = dict(
        teacher=lambda: train.main(words(model_name_or_path="bundled:student", teacher_model_name_or_path=tiny_folder)),
        evaluate=lambda: evaluate.main(["--model", str(tiny_folder), "--data", questions]),
        generate=lambda: generate.main(
            ["--model", str(tiny_folder), "--data", questions, "--output", str(tmp_path / "t.jsonl")]
        ),
        plan=lambda: plan.main(["--model", str(tiny_folder)]),
    )
    refusal(capsys, calls[command])
    assert not marker.exists()


def test_fault_28_pickled_weights_are_never_read(run, tiny_folder, tmp_path, capsys):
    """A .bin file runs what it likes when it is read."""
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    tensors = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    torch.save(tensors | {"bomb": Bomb()}, tiny_folder / "pytorch_model.bin")
    assert "safetensors" in refusal(capsys, lambda: run("run"))
    assert not marker.exists()
    torch.save(tensors, tiny_folder / "pytorch_model.bin")  # nor where nothing is wrong with them
    with pytest.raises(InputError, match="safetensors"):
        load_model(tiny_folder, dtype=torch.float32, device="cpu")
    save_file(tensors, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    run("run", max_steps=1)
    assert not marker.exists()
