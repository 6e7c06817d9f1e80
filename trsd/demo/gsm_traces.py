r"""Traces that make a small model a reasoner: worked solutions of school problems, then a redundant check.

    derivation   the worked solution as its author wrote it ("His friend has 7 - 6 = 1 toys. ...")
    check        "Wait, let me double-check." and every equation of the solution once more, without its story
    answer       "The answer is \boxed{8}."

The derivation is about the first half of the thinking, which is how real reasoning models overthink. Two sources:

    gsm_symbolic   the generator of the PyPI package reasoning-gym (extra ``gsm``), its templates by number; a question
                   belongs to the split its own text hashes to, so train and evaluation never overlap
    GSM8K          a file of the user's, rows of question and worked solution with <<48/2=24>> annotations and ####

A solution is taken only when each of its equations was read, is exactly right, and the last one gives the answer.

``python -m trsd.demo.gsm_traces --split train --num_symbolic 2000 --gsm8k train.jsonl --num_gsm8k 400 --solutions
--output sft.jsonl``
"""

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from trsd.command import run_command
from trsd.data import describe_drops
from trsd.demo.problems import Problem, as_row, split_of
from trsd.errors import InputError
from trsd.files import write_text
from trsd.grading import as_fraction
from trsd.traces import read_rows

# The templates of gsm_symbolic of which the first 100 draws all serve, the shortest questions and traces first.
READABLE_TEMPLATES = (43, 58, 16, 26, 72, 50, 20, 69, 62, 95, 39, 14, 31, 78, 54, 57, 59, 34, 91, 8)
READABLE_TEMPLATES += (67, 47, 41, 12, 45, 70, 40, 88, 5, 51, 64, 93, 7, 68, 28, 27, 89, 92, 19)
EASY_TEMPLATES = READABLE_TEMPLATES[:5]
CHECK = "Wait, let me double-check."
MOST_FRUITLESS_DRAWS = 20000

_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"(?: (?!x )[A-Za-z'-]+){0,2}"
# "138 pieces + 654 pieces = 792", "9 x 14 = 126": numbers, each with up to two words as its unit, and one result.
_WRITTEN = re.compile(
    rf"(?P<left>{_NUMBER}{_UNIT}(?: ?[-+*/x÷] ?{_NUMBER}{_UNIT})+) ?= ?"
    rf"(?P<right>{_NUMBER})(?!\.?\d|[-+*/x÷]| [-+*/x÷] ?\d)"
)
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


@dataclass(frozen=True)
class Equation:
    """An expression of numbers and operators, and its result, both as written."""

    left: str
    right: str

    @property
    def holds(self) -> bool:
        """Whether the two sides are exactly equal; an expression that cannot be read is not."""
        try:
            return evaluate_expression(self.left) == evaluate_expression(self.right)
        except (ValueError, ZeroDivisionError):
            return False


def evaluate_expression(text: str) -> Fraction:
    """The exact value of numbers, ``+ - * /`` and brackets; ValueError for anything else."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(ast.get_source_segment(source, node))
        raise ValueError(f"{text!r} is no arithmetic")

    source = text.strip()
    try:
        return value(ast.parse(source, mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"{text!r} is no arithmetic") from error


def read_equations(solution: str) -> list[Equation] | None:
    """The equations of a solution in plain words, in order; None unless every ``=`` belongs to one that was read."""
    text = re.sub(r"[$£€]", "", solution)
    found = list(_WRITTEN.finditer(text))
    if len(found) < text.count("="):
        return None
    return [Equation(_plain(match["left"]), match["right"]) for match in found]


def _plain(expression: str) -> str:
    """``138 pieces + 654 pieces`` as ``138 + 654``."""
    parts = re.findall(rf"{_NUMBER}|(?<![A-Za-z])x(?![A-Za-z])|[-+*/÷](?= ?\d)", expression)
    return " ".join({"x": "*", "÷": "/"}.get(part, part) for part in parts)


def worked_problem(question: str, solution: str, equations: list[Equation] | None, gold: str) -> Problem | str:
    """A problem with derivation, check and answer, or the reason why the solution cannot serve."""
    if not equations:
        return "equations that cannot be read"
    if not all(equation.holds for equation in equations):
        return "an equation that is not exactly right"
    if as_fraction(equations[-1].right) != as_fraction(gold):
        return "the last equation does not give the answer"
    again = " ".join(f"{equation.left} = {equation.right}." for equation in equations)
    return Problem(
        question=question,
        reasoning=f"{solution}\n{CHECK} {again} It is the same, so the answer is {gold}.",
        response=f"The answer is \\boxed{{{gold}}}.",
        answer=gold,
    )


def gsm8k_problem(row: dict[str, Any], where: str = "row") -> Problem | str:
    """A row of GSM8K as a problem, its annotations turned into the check; or the reason why it cannot serve."""
    if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
        raise InputError(f"{where}: expected the columns question and answer of GSM8K, got {sorted(row)}")
    solution, tag, gold = row["answer"].rpartition("####")
    if not tag:
        return "no #### and final answer behind the worked solution"
    equations = [Equation(*(_bare(side) for side in match.groups())) for match in _ANNOTATION.finditer(solution)]
    text = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return worked_problem(row["question"].strip(), text, equations, _bare(gold))


def _bare(text: str) -> str:
    """A number or expression without thousands' commas, with a digit before each point and spaces around operators."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip())
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return re.sub(r"(?<=[\d)])\s*([-+*/])\s*", r" \1 ", text)


def draw_symbolic(
    split: str, *, seed: int, templates: tuple[int, ...] = EASY_TEMPLATES, dropped: Counter[str] | None = None
) -> Iterator[Problem]:
    """Endless distinct problems of ``split`` from the templates in turn, the same for the same seed.

    Args:
        split: "train" or "evaluation".
        seed: of the draws.
        templates: numbers of gsm_symbolic's generators.
        dropped: counts what was left out, by reason.

    Raises:
        ImportError: reasoning-gym is not installed.
        InputError: a template that does not exist, or templates that have no further usable problem.
    """
    generators = _generators()
    if unknown := sorted(set(templates) - set(generators)):
        raise InputError(f"templates: gsm_symbolic has no generator {unknown}, only 0 to {max(generators)}")
    rng, seen, fruitless = random.Random(f"{split}:{seed}"), set(), 0
    while fruitless < MOST_FRUITLESS_DRAWS:
        for template in templates:
            fruitless += 1
            made = generators[template](rng, 1.0)
            question = made["question"]
            if split_of(question) != split or question in seen:
                continue
            seen.add(question)
            solution = made["metadata"]["answer_cot"].rpartition("####")[0].strip()
            problem = worked_problem(question, solution, read_equations(solution), made["answer"])
            if isinstance(problem, Problem):
                fruitless = 0
                yield problem
            elif dropped is not None:
                dropped[problem] += 1
    raise InputError(
        f"templates: {', '.join(map(str, templates))} gave {len(seen)} questions of the {split} split and no usable "
        f"one in {MOST_FRUITLESS_DRAWS} further draws: ask for fewer problems, or add templates"
    )


def _generators() -> dict[int, Callable[[random.Random, float], dict[str, Any]]]:
    try:
        from reasoning_gym.arithmetic import GSMSymbolicDataset, GSMSymbolicDatasetConfig
    except ImportError as error:
        raise ImportError(
            f"gsm_symbolic needs reasoning-gym ({error}): pip install 'trsd[gsm]', or leave --num_symbolic out"
        ) from None
    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1)).generators


def gsm8k_problems(path: Path, *, max_characters: int | None, dropped: Counter[str]) -> Iterator[Problem]:
    """The problems of a GSM8K file, in its order, whose question and solution together are not too long."""
    for where, row in read_rows(path):
        problem = gsm8k_problem(row, where)
        if isinstance(problem, str):
            dropped[problem] += 1
        elif max_characters and len(problem.question) + len(problem.reasoning) > max_characters:
            dropped[f"more than {max_characters} characters"] += 1
        else:
            yield problem


@dataclass(frozen=True, kw_only=True)
class TraceArguments:
    """Write worked traces to learn from, or questions with their answers, from gsm_symbolic and GSM8K."""

    output: Path
    """The .jsonl file to write."""
    split: Literal["train", "evaluation"] = "train"
    """Which of gsm_symbolic's problems; no question is in both."""
    num_symbolic: int = 0
    """Problems from gsm_symbolic."""
    templates: tuple[int, ...] = EASY_TEMPLATES
    """Numbers of the generators of gsm_symbolic, drawn in turn."""
    gsm8k: Path | None = None
    """A file of GSM8K, train for training."""
    num_gsm8k: int | None = None
    """Problems from that file; left out, all that can be used."""
    max_characters: int | None = None
    """Leave out problems of GSM8K whose question and trace are longer."""
    solutions: bool = False
    """Rows of prompt, reasoning, answer and gold, instead of question and answer."""
    seed: int = 0
    """Of the draws and of the order."""


def run(args: TraceArguments) -> None:
    """Draw, read, mix and write."""
    if args.output.exists():
        raise InputError(f"{args.output} exists already: choose another --output, or move it away")
    dropped: Counter[str] = Counter()
    problems = []
    if args.num_symbolic:
        drawn = draw_symbolic(args.split, seed=args.seed, templates=args.templates, dropped=dropped)
        problems += islice(drawn, args.num_symbolic)
    if args.gsm8k:
        read = gsm8k_problems(args.gsm8k, max_characters=args.max_characters, dropped=dropped)
        problems += islice(read, args.num_gsm8k)
    if not problems:
        raise InputError(f"no problem is left ({describe_drops(dropped) or 'give --num_symbolic or --gsm8k'})")
    random.Random(args.seed).shuffle(problems)
    rows = [as_row(problem, solution=args.solutions) for problem in problems]
    write_text(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows in {args.output}")
    if drops := describe_drops(dropped):
        print(f"left out: {drops}")


def main(argv: list[str] | None = None) -> None:
    """Write traces from the command line; input that cannot be used exits with code 2."""
    run_command(TraceArguments, run, prog="python -m trsd.demo.gsm_traces", argv=argv)


if __name__ == "__main__":
    main()
