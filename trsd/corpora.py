"""Rows of published reasoning corpora as conversations, for ``data.RowReader``.

    OpenThoughts, Bespoke-Stratos, Sky-T1   conversations of from / value, a system column, thoughts and solutions in
                                            <|begin_of_thought|> ... <|end_of_thought|> tags of their own
    Llama-Nemotron                          input (messages, or a text) and output, with <think>; a system_prompt column
    Alpaca's form                           instruction, input (which may be empty) and output, with <think>
    SYNTHETIC-1                             prompt and llm_response, with <think>; its SFT data has messages

System messages are left out: in these corpora they tell a model how to lay out its thinking, which the chat template
does here.
"""

from typing import Any

from trsd.errors import InputError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
THOUGHT_TAGS = ("<|begin_of_thought|>", "<|end_of_thought|>")
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's turn
SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")


def as_conversation(row: dict[str, Any], *, where: str) -> list[dict[str, str]] | None:
    """The messages of a corpus row, system messages left out; None for a row of another form.

    Raises:
        InputError: a row of one of the forms above that is malformed, by ``where``.
    """
    if "conversations" in row:
        messages = _turns(row, "conversations", where)
    elif isinstance(row.get("instruction"), str) and "output" in row and isinstance(row.get("input", ""), str | None):
        text = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        messages = [{"role": "user", "content": text}, _assistant(row, "output", where)]
    elif "input" in row and "output" in row:
        messages = [*_prompt(row, "input", where), _assistant(row, "output", where)]
    elif "prompt" in row and "llm_response" in row:
        messages = [*_prompt(row, "prompt", where), _assistant(row, "llm_response", where)]
    else:
        return None
    return [message for message in messages if message["role"] != "system"]


def with_think_tags(text: str, *, open_tag: str, close_tag: str) -> str:
    """``text`` with a corpus's thought tags replaced by the model's own, and its solution tags removed."""
    for theirs, ours in zip(THOUGHT_TAGS, (open_tag, close_tag), strict=True):
        text = text.replace(theirs, ours)
    for tag in SOLUTION_TAGS:
        text = text.replace(tag, "")
    return text


def _turns(row: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    turns = row[name]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: {name} must be a list of objects with from and value (or role and content)")
    messages = []
    for turn in turns:
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(value, str) or not isinstance(speaker, str):
            raise InputError(f"{where}: every turn of {name} needs a from and a value of text")
        if speaker not in ROLES:
            raise InputError(f"{where}: {name} has a turn from {speaker!r}; known: {', '.join(ROLES)}")
        thoughts = {each: turn[each] for each in THOUGHT_FIELDS if isinstance(turn.get(each), str)}
        messages.append({"role": ROLES[speaker], "content": value} | thoughts)
    return messages


def _prompt(row: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    if isinstance(row[name], str):
        return [{"role": "user", "content": row[name]}]
    return _turns(row, name, where)


def _assistant(row: dict[str, Any], name: str, where: str) -> dict[str, str]:
    if not isinstance(row[name], str):
        raise InputError(f"{where}: {name} must be text, got {type(row[name]).__name__}")
    return {"role": "assistant", "content": row[name]}
