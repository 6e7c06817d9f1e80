"""Accuracy against thinking budget: ``python -m trsd.evaluate --model MODEL --data QUESTIONS --budgets 0,64,50%``.

Every question is thought about once, freely; at each budget the thinking is cut there, closed with the closer and
answered (``decoding.py``). Reported per budget: accuracy with a bootstrap interval over questions, pass@k
(``statistics.py``), how often the close was forced, how often no answer or no closed box was found, how often the
answer ended by itself, and tokens used.

``--responses FILE`` grades responses that were written elsewhere instead (``responses.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from trsd.command import run_command
from trsd.data import Loaded, Question, describe_drops, load_data
from trsd.decoding import Answer, Decoder, Sampling, check_decoding
from trsd.errors import InputError
from trsd.files import write_json, write_text
from trsd.grading import check_grader, extract_answer, grade, last_boxed
from trsd.metrics import progress_bar
from trsd.models import load_for_decoding, load_tokenizer, model_folder
from trsd.plots import plot_curves
from trsd.recipe import Budgets, budget_problems, resolve_budgets
from trsd.responses import grade_file
from trsd.statistics import accuracy_figures, area_under_curve
from trsd.thinking import ThinkFormat

NUM_EXAMPLES = 6


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
        budgets: ``64`` or ``50%`` of ``median_thinking_tokens``, which defaults to this model's own; none of them
            measures unconstrained thinking alone.
        max_thinking_tokens: limit of the unconstrained thinking.
        max_answer_tokens: answer allowance at every budget.
        num_samples: samples per question; use more than one only with a temperature above 0.
        median_thinking_tokens: what percents are taken of, so that two models meet the same budgets in tokens.

    Returns:
        A json-ready dict: ``unconstrained`` (see ``measure`` and ``measure_thinking``), ``budgets`` (one ``measure``
        each), ``auc`` (None for fewer than two budgets), ``examples``.
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
    return {
        "num_questions": len(questions),
        "num_samples": num_samples,
        "closer": decoder.think.closer,
        "sampling": vars(decoder.sampling),
        "percent_of": median,
        "unconstrained": measure(free, repeated, decoder.tokenizer, num_samples)
        | measure_thinking(free, repeated, decoder.tokenizer, num_samples),
        "budgets": curve,
        "auc": area_under_curve([row["tokens"] for row in curve], [row["accuracy"] for row in curve]),
        "examples": [
            _example(index, repeated, free, answers, rows, decoder.tokenizer)
            for index in range(0, min(NUM_EXAMPLES * num_samples, len(repeated)), num_samples)
        ],
    }


def measure(
    answers: Sequence[Answer], questions: Sequence[Question], tokenizer: Any, num_samples: int
) -> dict[str, Any]:
    """Accuracy, rates and tokens of one set of answers, the samples of a question standing together.

    Returns:
        ``accuracy``, ``low``, ``high`` and ``pass_at`` (see ``statistics.accuracy_figures``), rates, and
        ``mean_tokens``. ``no_box_rate`` is the share of answers without a closed box; such an answer can be found in
        another form, ``no_answer_rate`` is the share in which none is.
    """
    texts = [tokenizer.decode(answer.answer_ids, skip_special_tokens=True) for answer in answers]
    return {
        **accuracy_figures(_graded(texts, questions, num_samples)),
        "forced_close_rate": float(np.mean([bool(a.close_ids) and not a.closed for a in answers])),
        "no_answer_rate": float(np.mean([extract_answer(text) is None for text in texts])),
        "no_box_rate": float(np.mean([last_boxed(text) is None for text in texts])),
        "termination_rate": float(np.mean([answer.finished for answer in answers])),
        "mean_tokens": float(np.mean([len(a.reasoning_ids) + len(a.close_ids) + len(a.answer_ids) for a in answers])),
    }


def measure_thinking(
    free: Sequence[Answer], questions: Sequence[Question], tokenizer: Any, num_samples: int
) -> dict[str, float]:
    """What is asked of unconstrained thinking alone.

    Returns:
        ``unclosed_rate``, the share of thinking that did not end by itself: it has no answer, so it counts wrong in
        ``accuracy``. ``accuracy_of_whole_text`` grades reasoning and answer as one text, since a model that never
        learnt to close states its answer all the same; a box in the reasoning counts there before an answer without
        one. And the mean and median length of the thinking.
    """
    lengths = [len(answer.reasoning_ids) for answer in free]
    texts = [
        "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer.reasoning_ids, answer.answer_ids))
        for answer in free
    ]
    whole = accuracy_figures(_graded(texts, questions, num_samples))
    return {
        "unclosed_rate": float(np.mean([not answer.closed for answer in free])),
        "accuracy_of_whole_text": whole["accuracy"],
        "mean_thinking_tokens": float(np.mean(lengths)),
        "median_thinking_tokens": float(np.median(lengths)),
    }


def _graded(texts: Sequence[str], questions: Sequence[Question], num_samples: int) -> list[list[bool]]:
    correct = [grade(text, question.gold) for text, question in zip(texts, questions, strict=True)]
    return [correct[start : start + num_samples] for start in range(0, len(correct), num_samples)]


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
    """The result as a text table, with pass@k where there are several samples."""
    free = result["unconstrained"]
    passes = [f"pass@{k}" for k in free["pass_at"] if k != "1"]
    head = "budget      tokens  accuracy  [95 % interval]  forced close  no answer  terminated"
    lines = ["  ".join([head, *(f"{name:>7}" for name in passes)])]
    for row in result["budgets"]:
        lines.append(_table_row(row["budget"], f"{row['tokens']}", row))
    lines.append(_table_row("free", f"{free['mean_thinking_tokens']:.0f}", free))
    if free["unclosed_rate"]:
        lines.append(
            f"free thinking that never closed: {free['unclosed_rate']:.1%}, counted wrong above; "
            f"accuracy of the whole text {free['accuracy_of_whole_text']:.3f}"
        )
    area = "" if result["auc"] is None else f"area under the curve {result['auc']:.3f}, "
    lines.append(f"{area}{result['num_questions']} questions")
    return "\n".join(lines)


def _table_row(name: str, tokens: str, row: dict[str, Any]) -> str:
    cells = (
        f"{name:<10} {tokens:>7}  {row['accuracy']:>8.3f}  [{row['low']:.3f}, {row['high']:.3f}]   "
        f"{row['forced_close_rate']:>11.0%}  {row['no_answer_rate']:>9.0%}  {row['termination_rate']:>10.0%}"
    )
    return "  ".join([cells, *(f"{value:>7.3f}" for k, value in row["pass_at"].items() if k != "1")])


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure accuracy against thinking budget, or grade responses that were written elsewhere."""

    responses: Path | None = None
    """Grade these instead of a model: .jsonl or .parquet rows of problem or question, answer and response."""
    model: str = "bundled:reasoner"
    """Model folder, checkpoint, hub name or bundled model."""
    data: str = "bundled:questions/evaluation.jsonl"
    """Questions with reference answers: .jsonl, .parquet or a hub data set."""
    budgets: Budgets = ("0%", "25%", "50%", "75%", "100%")
    """Thinking budgets: tokens, or percent of the median unconstrained thinking; '' for unconstrained alone."""
    output_dir: Path | None = None
    """Where evaluation.json, table.txt and curve.png go; left out, only the table is printed."""
    max_samples: int | None = None
    """Use only so many questions."""
    num_samples: int = 1
    """Samples per question, for acc@n and pass@k; more than one needs a temperature."""
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
    run_command(EvaluateArguments, run, prog="python -m trsd.evaluate", argv=argv)


def run(args: EvaluateArguments) -> None:
    """Load, evaluate, print and store."""
    if args.responses:
        if unused := _unused_with_responses(args):
            raise InputError(f"--responses loads no model and writes nothing new: leave out {', '.join(unused)}")
        grade_file(args.responses, open_tag=args.open_tag, close_tag=args.close_tag, output_dir=args.output_dir)
        return
    check_decoding(args)
    if args.percent_of is not None and not 0 < args.percent_of < float("inf"):
        raise InputError(f"percent_of: expected a positive number of tokens, got {args.percent_of}")
    if found := budget_problems(args.budgets):
        raise InputError(f"budgets: {found[0]}")
    if args.num_samples < 1 or (args.num_samples > 1 and args.temperature == 0):
        raise InputError(
            f"num_samples: expected 1, or more with a temperature above 0 (greedy samples are all alike), got "
            f"{args.num_samples} with temperature {args.temperature}"
        )
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
        if result["budgets"]:
            plot_curves({args.model: result}, args.output_dir / "curve.png")
        print(f"written to {args.output_dir}")


def _unused_with_responses(args: EvaluateArguments) -> list[str]:
    used = {"responses", "output_dir", "open_tag", "close_tag"}
    names = [entry.name for entry in fields(args) if getattr(args, entry.name) != entry.default]
    return [f"--{name}" for name in names if name not in used]


if __name__ == "__main__":
    main()
