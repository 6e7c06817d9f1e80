"""The bundled problems and the bundled reasoner are what their card says."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from trsd.data import load_data
from trsd.decoding import Decoder
from trsd.demo import make_student, problems
from trsd.demo.problems import draw_problem, draw_problems, split_of
from trsd.engines.hf import HFEngine
from trsd.evaluation import evaluate
from trsd.grading import grade
from trsd.models import load_model, model_folder
from trsd.thinking import ThinkFormat

QUESTIONS = Path(problems.__file__).parent / "questions"


def evaluate_arithmetic(text):
    """Every ``a op b=c`` in ``text`` as (is it true, c)."""
    import re

    for a, operation, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text):
        a, b, c = int(a), int(b), int(c)
        yield {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation] == c, c


def test_worked_solutions_are_right_and_state_the_answer():
    rng = random.Random(0)
    for _ in range(500):
        problem = draw_problem(rng)
        derivation, back, again = problem.reasoning.split("\n")
        assert all(right for right, _ in evaluate_arithmetic(problem.reasoning))
        assert [c for _, c in evaluate_arithmetic(derivation)][-1] == int(problem.answer)
        assert [c for _, c in evaluate_arithmetic(again)][-1] == int(problem.answer)
        assert "double-check" in back and 0 < int(problem.answer) <= problems.LARGEST_NUMBER
        assert grade(problem.response, problem.answer)


def test_checks_take_more_room_than_the_derivation():
    shares = []
    for problem in islice(draw_problems("train", seed=1), 200):
        shares.append(len(problem.reasoning.split("\n")[0]) / len(problem.reasoning))
    assert 0.25 < sum(shares) / len(shares) < 0.45


def test_splits_never_share_a_question_and_repeat_with_their_seed():
    train = [p.question for p in islice(draw_problems("train", seed=3), 3000)]
    evaluation = [p.question for p in islice(draw_problems("evaluation", seed=3), 1000)]
    assert not set(train) & set(evaluation)
    assert len(set(train)) == 3000 and {split_of(q) for q in train} == {"train"}
    assert {split_of(q) for q in evaluation} == {"evaluation"}
    assert train[:50] == [p.question for p in islice(draw_problems("train", seed=3), 50)]
    assert train[:50] != [p.question for p in islice(draw_problems("train", seed=4), 50)]


@pytest.mark.parametrize("split,count,seed", [("train", 1024, 1), ("evaluation", 300, 0)])
def test_bundled_questions_are_the_generators(split, count, seed):
    rows = [json.loads(line) for line in (QUESTIONS / f"{split}.jsonl").read_text().splitlines()]
    drawn = islice(draw_problems(split, seed=seed), count)
    assert rows == [{"question": p.question, "answer": p.answer} for p in drawn]


def test_bundled_training_questions_are_new_to_the_reasoner():
    bundled = {json.loads(line)["question"] for line in (QUESTIONS / "train.jsonl").read_text().splitlines()}
    assert not bundled & {p.question for p in islice(draw_problems("train", seed=0), 20000)}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train"):
        next(draw_problems("test", seed=0))


def test_command_prints_problems(capsys):
    problems.main(["--split", "train", "--num_problems", "3", "--seed", "9"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_worked_solutions_are_traces_to_learn_from(tmp_path):
    path = tmp_path / "solutions.jsonl"
    problems.main(["--split", "train", "--num_problems", "5", "--solutions", "--output", str(path)])
    tokenizer = AutoTokenizer.from_pretrained(model_folder("bundled:reasoner"))
    traces = load_data(str(path), tokenizer=tokenizer, think=ThinkFormat.of(tokenizer)).traces
    assert len(traces) == 5 and all(trace.correct for trace in traces)


def test_bundled_student_is_what_its_script_makes_of_the_reasoner(tmp_path, capsys):
    make_student.main(["--output_dir", str(tmp_path / "student")])
    made, bundled = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "student", model_folder("bundled:student"))
    )
    assert made.keys() == bundled.keys() and all(torch.equal(made[name], bundled[name]) for name in made)
    assert "1,304,064 parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        make_student.main(["--output_dir", str(tmp_path / "student")])


def test_reasoner_is_a_small_plain_qwen3_with_a_real_tokenizer():
    folder = model_folder("bundled:reasoner")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10 * 2**20
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, Qwen3ForCausalLM) and 1e6 <= model.num_parameters() <= 5e6
    for token in ("<think>", "</think>"):
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
    text = "Größe 数 12+3=15 </think>\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    chat = [{"role": "user", "content": "How many?"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).endswith("<think>\n")
    closed = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert closed.endswith("<think>\n\n</think>\n\n")


def test_reasoner_solves_fresh_problems_and_overthinks(tmp_path):
    """97 % of fresh problems right unconstrained, and less than 40 % with half of its thinking."""
    folder = model_folder("bundled:reasoner")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    think = ThinkFormat.of(tokenizer)
    path = tmp_path / "fresh.jsonl"
    problems.main(["--num_problems", "128", "--seed", "20", "--output", str(path)])
    questions = load_data(str(path), tokenizer=tokenizer, think=think).questions
    decoder = Decoder(HFEngine(load_model(folder, dtype=torch.float32, device="cpu"), tokenizer), tokenizer, think)
    result = evaluate(decoder, questions, ("50%",), max_thinking_tokens=320, max_answer_tokens=32)
    assert result["unconstrained"]["accuracy"] >= 0.97
    assert result["unconstrained"]["termination_rate"] >= 0.97
    assert result["budgets"][0]["accuracy"] <= 0.4
