"""Grading of responses that were written elsewhere: ``python -m trsd.evaluate --responses FILE``, without a model.

Rows hold ``problem`` or ``question``, the reference ``answer`` and a ``response``; rows of the same problem are samples
of one question. What is graded is the text behind the close tag, where a model says what it has settled on, and the
whole response where thinking never closed: P-ALIGN's students, trained on prefixes, leave 27 of 90 open and are right
in some of them. Accuracy, interval and pass@k are those of ``statistics.py``.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trsd.errors import InputError
from trsd.files import check_free_of_evaluations, write_json, write_text
from trsd.grading import check_grader, extract_answer, grade, has_format, last_boxed, num_undecided
from trsd.statistics import accuracy_figures
from trsd.traces import content_key, read_rows


class Response(NamedTuple):
    """What was written to a question, and the question's reference answer."""

    question: str
    gold: str
    text: str


def read_responses(path: Path) -> list[Response]:
    """The rows of a .jsonl or .parquet file; a row without its columns, or whose problem had another answer, raises."""
    responses: list[Response] = []
    golds: dict[str, tuple[str, str]] = {}
    for where, row in read_rows(path):
        name = "question" if "question" in row else "problem"
        answer = row.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            row = {**row, "answer": str(answer)}
        for wanted in (name, "answer", "response"):
            if not isinstance(row.get(wanted), str):
                raise InputError(
                    f"{where}: expected problem or question, answer and response, all of them text; "
                    + (f"{wanted} is {type(row[wanted]).__name__}" if wanted in row else f"columns are {sorted(row)}")
                )
        if not row["answer"].strip():
            raise InputError(f"{where}: the reference answer is empty: give one, or leave the row out")
        response = Response(row[name], row["answer"], row["response"])
        gold, first = golds.setdefault(response.question, (response.gold, where))
        if gold != response.gold:
            raise InputError(f"{where}: the answer is {response.gold!r}, but {gold!r} to the same problem in {first}")
        responses.append(response)
    if not responses:
        raise InputError(f"{path} holds no row")
    return responses


def graded_text(response: str, *, close_tag: str) -> str:
    """What is graded of a response: the text behind the first close tag, or all of it when there is none."""
    thinking, tag, answer = response.partition(close_tag)
    return answer if tag else thinking


def measure_responses(
    responses: Sequence[Response], *, open_tag: str = "<think>", close_tag: str = "</think>"
) -> dict[str, Any]:
    """Accuracy, pass@k and rates of stored responses.

    Args:
        responses: in any order; those to the same question are its samples, and questions count alike.
        open_tag: what opens thinking; may be missing from responses, where the prompt held it.
        close_tag: what ends thinking.

    Returns:
        A json-ready dict: ``accuracy``, ``low``, ``high``, ``pass_at`` (see ``statistics.accuracy_figures``);
        ``accuracy_of_whole_text``, when all of every response is graded; ``unclosed_rate``, the share without the
        close tag; ``untagged_rate``, the share without either tag; ``no_box_rate`` and ``no_answer_rate``, of graded
        texts without a closed box and without any answer; ``format_failure_rate``, of those that state none in a known
        form: neither one nor more than a last number; ``num_undecided``, graded texts that took too long to compare
        and count as wrong; ``mean_characters``; ``question_ids`` and ``correct``, the questions and the verdicts on
        their samples, for ``trsd.compare``; and ``responses``, what each one was found to state and whether that is
        right.
    """
    if not open_tag or not close_tag:
        raise InputError(f"the tags must not be empty, got open_tag {open_tag!r} and close_tag {close_tag!r}")
    check_grader(response.gold for response in responses)
    texts = [graded_text(response.text, close_tag=close_tag) for response in responses]
    undecided = num_undecided()
    correct = [grade(text, response.gold) for text, response in zip(texts, responses, strict=True)]
    undecided = num_undecided() - undecided
    whole = [
        right if text == response.text else grade(response.text, response.gold)
        for text, response, right in zip(texts, responses, correct, strict=True)
    ]
    samples = _by_question(responses, correct)
    stated = [extract_answer(text) for text in texts]
    golds = {response.question: extract_answer(response.gold, whole_text=True) for response in responses}
    unclosed = [close_tag not in response.text for response in responses]
    untagged = [open_tag not in response.text and close_tag not in response.text for response in responses]
    return {
        "num_questions": len(samples),
        "num_responses": len(responses),
        "num_samples": min(map(len, samples)),
        "open_tag": open_tag,
        "close_tag": close_tag,
        **accuracy_figures(samples),
        "accuracy_of_whole_text": float(np.mean([np.mean(rights) for rights in _by_question(responses, whole)])),
        "unclosed_rate": float(np.mean(unclosed)),
        "untagged_rate": float(np.mean(untagged)),
        "no_box_rate": float(np.mean([last_boxed(text) is None for text in texts])),
        "no_answer_rate": float(np.mean([answer is None for answer in stated])),
        "format_failure_rate": float(np.mean([not has_format(text) for text in texts])),
        "num_undecided": undecided,
        "mean_characters": float(np.mean([len(response.text) for response in responses])),
        "question_ids": [
            content_key(question, gold or "") for question, gold in golds.items()
        ],  # as data.py makes them
        "correct": samples,
        "responses": [
            {"stated": answer, "gold": response.gold, "correct": right}
            for answer, response, right in zip(stated, responses, correct, strict=True)
        ],
    }


def _by_question(responses: Sequence[Response], correct: Sequence[bool]) -> list[list[bool]]:
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for response, right in zip(responses, correct, strict=True):
        groups[response.question].append(right)
    return list(groups.values())


def responses_table(result: dict[str, Any]) -> str:
    """The result of ``measure_responses`` as text."""
    lines = [f"{result['num_responses']} responses to {result['num_questions']} questions"]
    even = result["num_responses"] == result["num_questions"] * result["num_samples"]
    name = f"accuracy (acc@{result['num_samples']}, pass@1)" if even else "accuracy (pass@1)"
    lines.append(f"{name:<28}{result['accuracy']:>8.3f}  [{result['low']:.3f}, {result['high']:.3f}]")
    lines += [f"{f'pass@{k}':<28}{value:>8.3f}" for k, value in result["pass_at"].items() if k != "1"]
    lines.append(f"{'accuracy of whole texts':<28}{result['accuracy_of_whole_text']:>8.3f}")
    for key, label in (
        ("unclosed_rate", "thinking never closed"),
        ("no_box_rate", "no closed \\boxed{}"),
        ("format_failure_rate", "no answer in a known form"),
        ("no_answer_rate", "no answer"),
    ):
        lines.append(f"{label:<28}{result[key]:>8.0%}")
    lines.append(f"{'mean characters':<28}{result['mean_characters']:>8,.0f}")
    if result["num_undecided"]:
        lines.append(f"{result['num_undecided']} answers took too long to compare and counted as wrong")
    if result["untagged_rate"] == 1:
        lines.append(
            f"no response holds {result['open_tag']} or {result['close_tag']}, so all were graded whole: name the tags "
            "they use with --open_tag and --close_tag"
        )
    return "\n".join(lines)


def grade_file(path: Path, *, open_tag: str, close_tag: str, output_dir: Path | None) -> None:
    """Read, measure and print; with ``output_dir``, write evaluation.json and table.txt there."""
    if output_dir:
        check_free_of_evaluations(output_dir)
    measured = measure_responses(read_responses(path), open_tag=open_tag, close_tag=close_tag)
    text = responses_table(measured)
    print(text)
    if output_dir:
        write_json(output_dir / "evaluation.json", {"data": str(path)} | measured)
        write_text(output_dir / "table.txt", text + "\n")
        print(f"written to {output_dir}")
