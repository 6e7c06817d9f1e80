"""Tasks for EleutherAI's lm-evaluation-harness whose questions, prompts and grading are ours.

With ``pip install 'trsd[lm-eval]'``, so that what ``lm_eval`` says of a model can be held against ``trsd.evaluate``:

    TASKS=$(python -c 'import trsd.lm_eval_tasks as tasks; print(tasks.__path__[0])')
    lm_eval --model hf --model_args pretrained=MODEL --apply_chat_template --include_path $TASKS \\
        --tasks trsd_questions --metadata '{"data": "questions.jsonl"}' --gen_kwargs max_gen_toks=4096

``trsd_questions`` asks the questions of ``data`` (or of the environment variable TRSD_DATA), anything that ``--data``
of ``trsd.evaluate`` takes; ``trsd_gsm8k`` and ``trsd_math500`` ask those benchmarks where neither is given.
``open_tag`` and ``close_tag`` can stand beside ``data``. Thinking is part of what is generated, so ``max_gen_toks`` has
to leave room for it; the answer is what stands behind the close tag, and thinking that never closes counts as wrong.

lm-eval hands over text without special tokens. Where the close tag is one, it has to cut the thinking off itself, by
``think_end_token=ID`` among the model_args; whether thinking closed is then not known, and what never did is graded
whole. A model whose prompts would not come out as ours, or whose tag would be lost, is refused before it runs.
"""

import os
from typing import TYPE_CHECKING, Any

from trsd.errors import InputError

if TYPE_CHECKING:
    from trsd.data import Question
    from trsd.thinking import ThinkFormat


def questions(
    *,
    data: str | None = None,
    benchmark: str | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    open_tag: str = "<think>",
    close_tag: str = "</think>",
    **model_args: Any,
) -> dict[str, Any]:
    """The ``custom_dataset`` of the tasks: a data set of one row per question, as its split ``test``.

    Args:
        data: what to ask; else the environment variable TRSD_DATA, else ``benchmark``.
        benchmark: the task's own data set.
        tokenizer: folder or hub name of the tokenizer; else ``pretrained``, the model's.
        open_tag, close_tag: what begins and ends thinking.
        model_args: the others of lm-eval's ``--model_args`` and ``--metadata``.
    """
    import datasets

    from trsd.data import load_data
    from trsd.evaluation import graded_questions
    from trsd.models import load_tokenizer, model_folder
    from trsd.thinking import ThinkFormat

    source = data or os.environ.get("TRSD_DATA") or benchmark
    name = tokenizer or pretrained
    if source is None or name is None:
        raise InputError(
            'expected questions (--metadata \'{"data": "questions.jsonl"}\' or TRSD_DATA) and a tokenizer '
            f"(pretrained= or tokenizer= in --model_args), got data {source} and tokenizer {name}"
        )
    loaded = load_tokenizer(model_folder(name))
    think = ThinkFormat.of(loaded, open_tag=open_tag, close_tag=close_tag)
    asked = graded_questions(load_data(source, tokenizer=loaded, think=think, asking=True))
    cut_off = model_args.get("think_end_token") is not None
    check_close_tag(loaded, think, cut_off=cut_off)
    template_args = {key: model_args[key] for key in ("enable_thinking",) if model_args.get(key) is not None}
    rows = [
        {
            "id": question.id,
            "question": question.question,
            "gold": question.gold,
            "gen_prefix": prefix_of(loaded, think, question, template_args),
            "close_tag": "" if cut_off else close_tag,
        }
        for question in asked
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def check_close_tag(tokenizer: Any, think: "ThinkFormat", *, cut_off: bool) -> None:
    """Raise for a close tag that lm-eval would drop from the text it hands over."""
    ids = tokenizer(think.close_tag, add_special_tokens=False).input_ids
    if cut_off or think.close_tag in tokenizer.decode(ids, skip_special_tokens=True):
        return
    raise InputError(
        f"{think.close_tag} is a special token of this tokenizer, which lm-eval leaves out of what it hands over: add "
        f"think_end_token={ids[0]} to --model_args"
    )


def prefix_of(tokenizer: Any, think: "ThinkFormat", question: "Question", template_args: dict[str, Any]) -> str:
    """What lm-eval has to put behind its own prompt of ``question`` to make it ours: nothing, or the think opener."""
    roles = [message["role"] for message in question.messages]
    if roles != ["user"]:
        raise InputError(f"question {question.id} is a conversation of {', '.join(roles)}: expected one user's turn")
    ours = think.prompt_ids(tokenizer, question.messages)
    theirs = tokenizer.apply_chat_template(
        question.messages, tokenize=False, add_generation_prompt=True, **template_args
    )
    for prefix in ("", f"{think.open_tag}\n"):
        if tokenizer(theirs + prefix, add_special_tokens=False).input_ids == ours:
            break
    else:
        raise InputError(
            "lm-eval's prompt cannot be made ours for this chat template: try enable_thinking=True in --model_args. "
            f"It ends with {theirs[-60:]!r}, ours with {tokenizer.decode(ours)[-60:]!r}"
        )
    if not prefix:
        return prefix
    turns = [*question.messages, {"role": "assistant", "content": prefix}]
    continued = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=False, continue_final_message=True, **template_args
    )
    if tokenizer(continued, add_special_tokens=False).input_ids != ours:
        raise InputError(
            f"this chat template does not open the thinking with {think.open_tag!r} and does not let lm-eval do so: "
            "add the opener to its generation prompt"
        )
    return prefix


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The figures of one answer, each of which lm-eval averages.

    ``accuracy``, and the shares ``no_answer_rate`` and ``format_failure_rate`` (see ``trsd.responses``); where the tag
    can be seen, also ``unclosed_rate`` and ``accuracy_of_whole_text``, which grades thinking and answer as one.
    """
    from trsd.grading import extract_answer, grade, has_format

    text, closed = results[0], True
    if doc["close_tag"]:
        _, tag, answer = text.partition(doc["close_tag"])
        text, closed = answer, bool(tag)
    figures = {
        "accuracy": float(grade(text, doc["gold"])),
        "no_answer_rate": float(extract_answer(text) is None),
        "format_failure_rate": float(not has_format(text)),
    }
    if doc["close_tag"]:
        whole = grade(results[0].replace(doc["close_tag"], "\n", 1), doc["gold"])
        figures |= {"unclosed_rate": float(not closed), "accuracy_of_whole_text": float(whole)}
    return figures
