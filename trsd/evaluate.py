"""Accuracy against thinking budget: ``python -m trsd.evaluate --model MODEL --data QUESTIONS --budgets 0,64,50%``.

Every question is thought about once, freely; at each budget the thinking is cut there, closed with the closer and
answered (``decoding.py``). Reported per budget: accuracy with a bootstrap interval over questions, how often the close
was forced, how often no answer was found, how often the answer ended by itself, and tokens used.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from trsd.data import Loaded, Question, describe_drops, load_data
from trsd.decoding import Answer, Decoder, Sampling
from trsd.errors import InputError
from trsd.files import write_json, write_text
from trsd.grading import check_grader, extract_answer, grade
from trsd.metrics import progress_bar
from trsd.models import load_for_decoding, load_tokenizer, model_folder, quieten_transformers
from trsd.plots import plot_curves
from trsd.recipe import Budgets, budget_problems, resolve_budgets
from trsd.thinking import ThinkFormat

NUM_EXAMPLES = 6
BOOTSTRAP_SAMPLES = 1000


def evaluate(
    decoder: Decoder,
    questions: Sequence[Question],
    budgets: tuple[str, ...],
    *,
    max_thinking_tokens: int,
    max_answer_tokens: int,
    num_samples: int = 1,
    median_thinking_tokens: float | None = None,
) -> dict[str, Any]:
    """The accuracy-budget curve of the decoder's model.

    Args:
        decoder: model, tokenizer, think format and sampling.
        questions: each with a reference answer.
        budgets: ``64`` or ``50%`` of ``median_thinking_tokens``, which defaults to this model's own.
        max_thinking_tokens: limit of the unconstrained thinking.
        max_answer_tokens: answer allowance at every budget.
        num_samples: samples per question; use more than one only with a temperature above 0.
        median_thinking_tokens: what percents are taken of, so that two models meet the same budgets in tokens.

    Returns:
        A json-ready dict: ``unconstrained``, ``budgets`` (one entry each), ``auc``, ``examples``.
    """
    check_grader(question.gold for question in questions)
    repeated = [question for question in questions for _ in range(num_samples)]
    prompts = [decoder.think.prompt_ids(decoder.tokenizer, question.messages) for question in repeated]
    free = decoder.think_and_answer(
        prompts, max_thinking_tokens=max_thinking_tokens, max_answer_tokens=max_answer_tokens
    )
    lengths = [len(answer.reasoning_ids) for answer in free]
    median = float(np.median(lengths)) if median_thinking_tokens is None else median_thinking_tokens
    tokens = resolve_budgets(budgets, median)
    answers = decoder.answers_at_budgets(
        prompts, free, sorted(set(tokens.values())), max_answer_tokens=max_answer_tokens
    )
    rows = sorted(tokens.items(), key=lambda item: item[1])
    curve = [
        {"budget": text, "tokens": count} | measure(answers[count], repeated, decoder.tokenizer, num_samples)
        for text, count in rows
    ]
    unconstrained = measure(free, repeated, decoder.tokenizer, num_samples)
    unconstrained |= {
        "mean_thinking_tokens": float(np.mean(lengths)),
        "median_thinking_tokens": float(np.median(lengths)),
    }
    return {
        "num_questions": len(questions),
        "num_samples": num_samples,
        "closer": decoder.think.closer,
        "sampling": vars(decoder.sampling),
        "percent_of": median,
        "unconstrained": unconstrained,
        "budgets": curve,
        "auc": area_under_curve([row["tokens"] for row in curve], [row["accuracy"] for row in curve]),
        "examples": [
            _example(index, repeated, free, answers, rows, decoder.tokenizer)
            for index in range(0, min(NUM_EXAMPLES * num_samples, len(repeated)), num_samples)
        ],
    }


def measure(
    answers: Sequence[Answer], questions: Sequence[Question], tokenizer: Any, num_samples: int
) -> dict[str, float]:
    """Accuracy (with its 95 % bootstrap interval over questions), rates and tokens of one set of answers."""
    texts = [tokenizer.decode(answer.answer_ids, skip_special_tokens=True) for answer in answers]
    correct = np.array([grade(text, question.gold) for text, question in zip(texts, questions, strict=True)], float)
    per_question = correct.reshape(-1, num_samples).mean(1)
    low, high = bootstrap_interval(per_question)
    return {
        "accuracy": float(per_question.mean()),
        "low": low,
        "high": high,
        "forced_close_rate": float(np.mean([bool(a.close_ids) and not a.closed for a in answers])),
        "no_answer_rate": float(np.mean([extract_answer(text) is None for text in texts])),
        "termination_rate": float(np.mean([answer.finished for answer in answers])),
        "mean_tokens": float(np.mean([len(a.reasoning_ids) + len(a.close_ids) + len(a.answer_ids) for a in answers])),
    }


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [num_questions], by resampling questions (seeded)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def area_under_curve(tokens: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Mean accuracy over the budget range, trapezoids between budgets; None for a single budget."""
    if len(set(tokens)) < 2:
        return None
    return float(np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]))


def _example(
    index: int,
    questions: Sequence[Question],
    free: Sequence[Answer],
    answers: dict[int, list[Answer]],
    rows: Sequence[tuple[str, int]],
    tokenizer: Any,
) -> dict[str, Any]:
    """One question with what was thought and answered, as text."""

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    gold = questions[index].gold
    return {
        "question": questions[index].question,
        "gold": gold,
        "reasoning": text(free[index].reasoning_ids),
        "answer": text(free[index].answer_ids),
        "correct": grade(text(free[index].answer_ids), gold),
        "thinking_tokens": len(free[index].reasoning_ids),
        "at_budgets": [
            {
                "budget": name,
                "tokens": count,
                "reasoning": text(answers[count][index].reasoning_ids),
                "answer": text(answers[count][index].answer_ids),
                "correct": grade(text(answers[count][index].answer_ids), gold),
            }
            for name, count in rows
        ],
    }


def graded_questions(loaded: Loaded) -> list[Question]:
    """The questions of a data source, all of which must have a reference answer."""
    questions = loaded.questions
    if loaded.traces:
        raise InputError("evaluation data holds traces: expected rows with question and answer")
    without = [question for question in questions if question.gold is None]
    if without or not questions:
        raise InputError(
            f"evaluation needs questions with a reference answer; {len(without)} of {len(questions)} have none"
            + (f", the first: {without[0].question[:80]!r}" if without else "")
        )
    return questions


def table(result: dict[str, Any]) -> str:
    """The result as a text table."""
    lines = ["budget      tokens  accuracy  [95 % interval]  forced close  no answer  terminated"]
    for row in result["budgets"]:
        lines.append(_table_row(row["budget"], f"{row['tokens']}", row))
    free = result["unconstrained"]
    lines.append(_table_row("free", f"{free['mean_thinking_tokens']:.0f}", free))
    if result["auc"] is not None:
        lines.append(f"area under the curve {result['auc']:.3f}, {result['num_questions']} questions")
    return "\n".join(lines)


def _table_row(name: str, tokens: str, row: dict[str, float]) -> str:
    return (
        f"{name:<10} {tokens:>7}  {row['accuracy']:>8.3f}  [{row['low']:.3f}, {row['high']:.3f}]   "
        f"{row['forced_close_rate']:>11.0%}  {row['no_answer_rate']:>9.0%}  {row['termination_rate']:>10.0%}"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure accuracy against thinking budget."""

    model: str = "bundled:reasoner"
    """Model folder, checkpoint, hub name or bundled model."""
    data: str = "bundled:questions/evaluation.jsonl"
    """Questions with reference answers: .jsonl, .parquet or a hub data set."""
    budgets: Budgets = ("0%", "25%", "50%", "75%", "100%")
    """Thinking budgets: tokens, or percent of the median unconstrained thinking."""
    output_dir: Path | None = None
    """Where evaluation.json, table.txt and curve.png go; left out, only the table is printed."""
    max_samples: int | None = None
    """Use only so many questions."""
    num_samples: int = 1
    """Samples per question."""
    max_thinking_tokens: int = 1024
    """Limit of the unconstrained thinking."""
    max_answer_tokens: int = 64
    """Answer allowance."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    seed: int = 0
    """Sampling seed."""
    batch_size: int = 128
    """Sequences decoded together."""
    closer: str = "template"
    """What closes cut thinking: a preset's name or a text with the close tag; use the one trained with."""
    open_tag: str = "<think>"
    """The tag that opens thinking."""
    close_tag: str = "</think>"
    """The tag that ends thinking."""
    percent_of: float | None = None
    """Token count that percents are taken of, to give two models the same budgets; left out, this model's median."""


def main(argv: list[str] | None = None) -> None:
    """Evaluate from the command line; input that cannot be used exits with code 2."""
    args = tyro.cli(EvaluateArguments, args=argv, prog="python -m trsd.evaluate", use_underscores=True)
    quieten_transformers()
    try:
        run(args)
    except (InputError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run(args: EvaluateArguments) -> None:
    """Load, evaluate, print and store."""
    if found := budget_problems(args.budgets):
        raise InputError(f"budgets: {found[0]}")
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder)
    think = ThinkFormat.of(tokenizer, closer=args.closer, open_tag=args.open_tag, close_tag=args.close_tag)
    loaded = load_data(args.data, tokenizer=tokenizer, think=think, max_rows=args.max_samples)
    questions = graded_questions(loaded)
    if drops := describe_drops(loaded.dropped):
        print(f"dropped: {drops}")
    decoder = Decoder(
        load_for_decoding(folder),
        tokenizer,
        think,
        batch_size=args.batch_size,
        sampling=Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed),
        progress=progress_bar("evaluate"),
    )
    result = {"model": args.model, "data": args.data} | evaluate(
        decoder,
        questions,
        args.budgets,
        max_thinking_tokens=args.max_thinking_tokens,
        max_answer_tokens=args.max_answer_tokens,
        num_samples=args.num_samples,
        median_thinking_tokens=args.percent_of,
    )
    print(table(result))
    if args.output_dir:
        write_json(args.output_dir / "evaluation.json", result)
        write_text(args.output_dir / "table.txt", table(result) + "\n")
        plot_curves({args.model: result}, args.output_dir / "curve.png")
        print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
