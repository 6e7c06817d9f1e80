"""The losses of a fixed ten-step run of each method, against those that tests/golden/ holds for this platform.

To 1e-4 relative, for another processor sums in another order; with ``--assert-equal`` bit for bit, which holds on the
machine that wrote them, before and after a change that should change nothing. ``--write-golden`` writes them anew.
"""

import json
import platform
from pathlib import Path

import pytest
import torch
from conftest import losses, make_tiny_model

from trsd.decoding import Decoder
from trsd.judging import AnswerJudge

PLATFORM = f"{platform.machine()}-torch{'.'.join(torch.__version__.split('.')[:2])}"
FILE = Path(__file__).parent / "golden" / f"{PLATFORM}.json"
METHODS = {
    "trsd": {},
    "trsd with branches": dict(branches_per_trace=3, alpha=0.7, divergence="jsd"),
    "lsp": dict(method="lsp", keep_fraction=0.6),
    "palign": dict(method="palign", judge="answer", completion="close", max_answer_tokens=12),
    "sft": dict(method="sft"),
}


@pytest.fixture
def fixed_texts(monkeypatch, tokenizer):
    """A judge that asks for twelve tokens of reasoning, and completions that end."""
    ending = tokenizer(r"\boxed{7}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    monkeypatch.setattr(Decoder, "complete", lambda self, contexts, max_new_tokens: [ending for _ in contexts])
    monkeypatch.setattr(
        AnswerJudge, "judge", lambda self, items: [cut >= min(12, len(trace.reasoning_ids)) for trace, cut in items]
    )


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_the_golden_ones(run, fixed_texts, tokenizer, tmp_path, pytestconfig, name):
    flags = METHODS[name]
    if name == "lsp":
        make_tiny_model(tokenizer, seed=3).save_pretrained(tmp_path / "teacher_model")
        tokenizer.save_pretrained(tmp_path / "teacher_model")
        flags = flags | dict(teacher_model_name_or_path=tmp_path / "teacher_model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [loss for _, loss, _ in losses(run("run", max_steps=10, **flags))]
    finally:
        torch.set_num_threads(threads)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if pytestconfig.getoption("--write-golden"):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(golden | {name: found}, indent=1) + "\n")
        return
    if not golden:
        pytest.skip(f"no golden losses of {PLATFORM}: --write-golden writes them")
    assert found == (
        golden[name] if pytestconfig.getoption("--assert-equal") else pytest.approx(golden[name], rel=1e-4)
    )
