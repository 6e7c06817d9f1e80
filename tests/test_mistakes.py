"""What users get wrong, typed at the commands: one line that says what to do, an exit code, nothing left behind.

The table is mistakes.py. docs/troubleshooting.md explains the same messages: neither may have one that the other lacks.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, make_traces, write_rows
from mistake import Scene
from mistakes import MISTAKES
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, T5Config

from trsd import train
from trsd.traces import write_traces
from trsd_kernels import fused_distillation, fused_linear_distillation, pack_sequences, varlen_attention

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer, think):
    """A folder as somebody works in it: models whole and broken, data right and wrong, and a finished run."""
    folder = tmp_path_factory.mktemp("work")
    tiny = folder / "tiny"
    make_tiny_model(tokenizer).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    _make_models(folder, tiny)
    _make_data(folder)
    write_traces(folder / "traces.jsonl", make_traces(tokenizer, think, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "--model_name_or_path tiny --data traces.jsonl --output_dir done --max_length 512 --max_steps 1"
        train.main([*words.split(), "--max_tokens_per_batch", "512"])
    return folder


def _make_models(folder, tiny):
    def copied(name):
        return Path(shutil.copytree(tiny, folder / name))

    (folder / "folder").mkdir()
    copied("pickled").joinpath("model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    torn = copied("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copied("sharded") / "model.safetensors.index.json").write_text(json.dumps(shards))
    copied("pointer").joinpath("model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    for name, config in (("t5", T5Config()), ("bert", BertConfig(architectures=["BertForMaskedLM"]))):
        config.save_pretrained(copied(name))
    changed = json.loads((tiny / "config.json").read_text()) | {"model_type": "qwen9"}
    (copied("unknown") / "config.json").write_text(json.dumps(changed))
    for path in [*copied("mute").glob("*token*"), *(folder / "mute").glob("*.jinja")]:
        path.unlink()
    for name, template in (("base", None), ("thoughtless", "{% for m in messages %}{{ m.content }}{% endfor %}")):
        (copied(name) / "chat_template.jinja").unlink()
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(copied("other"))


def _make_data(folder):
    def rows(name, *found):
        write_rows(folder / name, *found)

    asked = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
    thought = [{"prompt": f"What is {i} + 1?", "reasoning": "I count.", "answer": str(i + 1)} for i in range(3)]
    rows("questions.jsonl", *asked)
    rows("text.jsonl", *thought)
    rows("mixed.jsonl", *asked, *thought)
    rows("unanswered.jsonl", *({"question": row["question"]} for row in asked))
    talk = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    rows("chat.jsonl", {"messages": talk})
    rows("columns.jsonl", {"instruction": "What is 1 + 1?"})
    rows("formula.jsonl", {"question": "What is half of x + 1?", "answer": r"\frac{x+1}{2}"})
    for name, one in (("one.json", "a"), ("two.json", "b")):
        rows(name, {"question_ids": [one], "correct": [[True]]})
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": \n')
    (folder / "document.json").write_text(json.dumps(asked, indent=1))
    (folder / "empty.jsonl").touch()
    (folder / "table.csv").write_text("question,answer\n")
    (folder / "unknown-key.yaml").write_text("learning_rte: 1e-4\n")
    (folder / "sixty.yaml").write_text("timeout_seconds: 1:30\n")


def pattern_of(message):
    return ".*".join(re.escape(part) for part in message.split("…"))


def in_one_line(text):
    """Without the boxes that the parser of the flags draws."""
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())


def typed(line):
    """(exit code, whether Python would have printed a traceback) of a command."""
    command, *words = shlex.split(line)
    try:
        importlib.import_module(f"trsd.{command}").main(words)
    except SystemExit as exit_:
        if isinstance(exit_.code, str):  # which Python prints as it ends
            print(exit_.code, file=sys.stderr)
            return 1
        return exit_.code
    return 0


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_a_mistake_is_said_with_what_to_do_and_leaves_nothing_behind(workspace, monkeypatch, capsys, mistake):
    monkeypatch.chdir(workspace)
    if not mistake.loads_weights:  # what is known without them is said before they are read, which takes minutes
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    before = set(workspace.rglob("*"))
    with ExitStack() as stack, monkeypatch.context() as patch:
        if mistake.prepare:
            mistake.prepare(Scene(patch, stack))
        code = typed(mistake.typed)
    left = {path.relative_to(workspace) for path in set(workspace.rglob("*")) - before}
    for top in {workspace / path.parts[0] for path in left} - before:
        shutil.rmtree(top) if top.is_dir() else top.unlink()
    said = in_one_line(capsys.readouterr().err)
    assert code == mistake.code
    if mistake.says.startswith("error:"):
        assert re.fullmatch(pattern_of(mistake.says), said[said.index("error:") :]), said
    else:
        assert re.search(pattern_of(mistake.says), said), said
    assert bool(left) == bool(mistake.leaves) and (not left or Path("run", mistake.leaves) in left), left


def labels():
    return torch.zeros(2, dtype=torch.int64)


def heads():
    return torch.randn(2, 4), torch.randn(8, 4)


KERNEL_MISTAKES = {
    "ValueError: …: expected two dimensions, got shape (…) (flatten batch and sequence first: x.flatten(0, -2))": (
        lambda: fused_linear_distillation(torch.randn(1, 2, 4), heads()[1], *heads(), labels())
    ),
    "TypeError: …: expected a tensor, got Linear (pass its .weight)": (
        lambda: fused_linear_distillation(heads()[0], torch.nn.Linear(4, 8), *heads(), labels())
    ),
    "TypeError: …: expected a tensor, got list (torch.as_tensor makes one)": (
        lambda: fused_linear_distillation(*heads(), *heads(), [0, 0])
    ),
    "ValueError: …_hidden_states have hidden size … but …_lm_head_weight expects …: is the weight [vocab_size, "
    "hidden_size], and of the same model?": (
        lambda: fused_linear_distillation(heads()[0], heads()[1].T, *heads(), labels())
    ),
    "ValueError: labels: expected int64, got torch.int32 (labels.long() if they are token ids)": (
        lambda: fused_linear_distillation(*heads(), *heads(), labels().int())
    ),
    "ValueError: labels[…] = … is outside [0, …) and not ignore_index=-100: tokenizer and lm_head_weight of the same "
    "model?": (lambda: fused_linear_distillation(*heads(), *heads(), labels() + 8)),
    "ValueError: teacher vocabulary … differs from the student's …: check that the tokenizers agree, then pass the "
    "shared rows of both weights (weight[:shared])": (
        lambda: fused_linear_distillation(*heads(), heads()[0], torch.randn(9, 4), labels())
    ),
    "ValueError: alpha=0.5 gives the divergence a share: teacher tensors are needed (or alpha=0)": (
        lambda: fused_linear_distillation(*heads(), None, None, labels())
    ),
    "ValueError: divergence: expected one of …, got 'kl'": (
        lambda: fused_linear_distillation(*heads(), *heads(), labels(), divergence="kl")
    ),
    "ValueError: expected two [num_tokens, vocab_size] tensors of one shape, got (…) and (…): same vocabulary?": (
        lambda: fused_distillation(torch.randn(2, 8), torch.randn(2, 9), labels())
    ),
    "ValueError: query: expected [total_tokens, num_heads, head_dim], got (…): the sequences of a batch stand one "
    "after the other, without a batch dimension": (
        lambda: varlen_attention(*torch.randn(3, 1, 9, 2, 8), torch.tensor([0, 9], dtype=torch.int32))
    ),
    "ValueError: cu_seqlens: expected int32, got torch.int64": (
        lambda: varlen_attention(*torch.randn(3, 9, 2, 8), torch.tensor([0, 9]))
    ),
    "ValueError: sequence … has … tokens: expected 1 to max_tokens=…; raise max_tokens_per_batch or drop the "
    "sequence": (lambda: pack_sequences([5, 20], 10)),
}


@pytest.mark.parametrize("says", KERNEL_MISTAKES)
def test_a_mistake_in_a_call_of_the_kernels_is_said_with_what_to_do(says):
    with pytest.raises((TypeError, ValueError)) as error:
        KERNEL_MISTAKES[says]()
    assert re.fullmatch(pattern_of(says), f"{error.type.__name__}: {error.value}"), error.value


# What no main() could meet: (the interpreter's words, its folder, its exit code), with the packages of this tree.
STARTS = {
    "error: started from …, whose files would hide modules of Python's own: run a command as python -m trsd.train, "
    "from another folder": [
        (["trsd/report.py", "run"], ROOT, 2),
        (["-m", "trsd.report", "run"], ROOT / "trsd", 2),
    ],
    "error: trsd needs Python 3.11 or newer, this is … (…)": [
        (["-c", "import sys; sys.version_info = (3, 10, 4); import trsd"], ROOT, 2)
    ],
    "No module named trsd.trian": [(["-m", "trsd.trian"], ROOT, 1)],
    "Error while finding module specification for 'trsd.train' (ModuleNotFoundError: No module named 'trsd')": [
        (["-S", "-E", "-m", "trsd.train"], ROOT / "docs", 1)
    ],
}


@pytest.mark.parametrize("says,words,folder,code", [(says, *way) for says, ways in STARTS.items() for way in ways])
def test_a_wrong_start_is_said_in_a_line(says, words, folder, code):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert re.search(f"{pattern_of(says)}$", in_one_line(done.stderr)), done.stderr


def messages_of_the_page():
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_the_page_has_each_message_of_a_mistake_once_and_no_other():
    said = [*dict.fromkeys(mistake.says for mistake in MISTAKES), *KERNEL_MISTAKES, *STARTS]
    on_page = messages_of_the_page()
    assert len(set(on_page)) == len(on_page)
    assert set(said) - set(on_page) == set(), "not on the page"
    assert set(on_page) - set(said) == set(), "no mistake gives these"
