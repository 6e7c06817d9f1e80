"""Where thinking begins and ends in token ids, and how a cut trace is closed.

A model thinks between an opener and a close tag, then answers. In a trace the tokens run

    prompt (ends with the opener) | reasoning | close (tag and the whitespace after it) | answer (ends with EOS)

A cut trace is ``prompt | reasoning[:cut] | closer | answer``. The closer is one string, the same in training,
evaluation and serving; presets below. Tags may be single special tokens (Qwen3) or several ordinary ones.
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from trsd.errors import InputError

CLOSERS = {
    # The chat template's own form, what the model writes when it stops by itself.
    "template": "\n{close}\n\n",
    # Qwen3 technical report (arXiv 2505.09388), section 4.3: the instruction that stops thinking at a budget.
    "qwen3_early_stop": (
        "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
        "{close}.\n\n"
    ),
    # AnytimeReasoner (arXiv 2505.13438).
    "anytime": "...\n\n...\n\n{close}\n\n**Final Answer**\n",
}
# Openers that P-ALIGN's released outputs (arXiv 2601.10064) write otherwise than "<think>\n" ... "\n</think>\n\n":
# the text of the opener, and the close.
DRAFT_LAYOUTS = {"<Begin_of_Draft>": ("<Begin_of_Draft>", "{close}\n")}


def encode_exactly(tokenizer: Any, text: str, *, what: str) -> list[int]:
    """Token ids of ``text`` alone; refuses a text that does not come back the same: it would not be what is served."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not ids or back != text:
        raise InputError(
            f"{what} {text!r} cannot be tokenized alone: it comes back as {back!r}. Choose a text that survives this "
            f"tokenizer, or one of the presets {', '.join(CLOSERS)}"
        )
    return ids


@dataclass(frozen=True, kw_only=True)
class ThinkFormat:
    """How one tokenizer's model marks its thinking."""

    open_tag: str
    close_tag: str
    closer: str
    closer_ids: tuple[int, ...]
    natural_close_ids: tuple[int, ...]
    """The close as the chat template writes it, encoded by itself."""

    @classmethod
    def of(
        cls, tokenizer: Any, *, closer: str = "template", open_tag: str = "<think>", close_tag: str = "</think>"
    ) -> "ThinkFormat":
        """The format of ``tokenizer``; ``closer`` is a preset's name or a text that holds the close tag."""
        tags = [open_tag.strip(), close_tag.strip(), tokenizer.eos_token]
        if not all(tags) or len(set(tags)) < len(tags):
            raise InputError(
                f"open_tag, close_tag: expected two texts that differ from each other and from the EOS token "
                f"{tokenizer.eos_token!r}, got {open_tag!r} and {close_tag!r}"
            )
        natural = _close(open_tag, close_tag)
        text = natural if closer == "template" else CLOSERS.get(closer, closer).replace("{close}", close_tag)
        if close_tag not in text:
            raise InputError(
                f"closer {text!r} does not hold {close_tag!r}, so thinking would never end: add it, or use one of the "
                f"presets {', '.join(CLOSERS)}"
            )
        return cls(
            open_tag=open_tag,
            close_tag=close_tag,
            closer=text,
            closer_ids=tuple(encode_exactly(tokenizer, text, what="closer")),
            natural_close_ids=tuple(encode_exactly(tokenizer, natural, what="close")),
        )

    @property
    def opener(self) -> str:
        """What a prompt ends with."""
        return _layout(self.open_tag)[0]

    @property
    def natural_close(self) -> str:
        """The close as the chat template writes it."""
        return _close(self.open_tag, self.close_tag)

    def say_added_opener(self, tokenizer: Any) -> None:
        """Say on stderr that the chat template does not know the opener, for such a model may not know to think."""
        if tokenizer.chat_template is not None and self.open_tag not in str(tokenizer.chat_template):
            print(
                f"note: the chat template does not mention {self.open_tag}: it is added to every prompt. A model that "
                "was not taught to think may never close it: it needs traces that another model wrote",
                file=sys.stderr,
            )

    def prompt_ids(self, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        """Chat messages as token ids that end with the opener, which is added when the template leaves it out.

        A template that does not know the opener is rendered without its own thinking, which would stand before ours.
        """
        text = _render(tokenizer, messages, enable_thinking=self.open_tag in str(tokenizer.chat_template))
        if not text.rstrip().endswith(self.open_tag):
            text += self.opener
        return tokenizer(text, add_special_tokens=False).input_ids

    def direct_prompt_ids(self, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        """Chat messages as token ids after which the model answers at once, in the template's non-thinking mode.

        A template that opens the thinking all the same has it closed, with nothing thought.
        """
        text = _render(tokenizer, messages, enable_thinking=False)
        if text.rstrip().endswith(self.open_tag):
            text += self.natural_close
        return tokenizer(text, add_special_tokens=False).input_ids

    def split(
        self, ids: Sequence[int], texts: Sequence[str] | Mapping[int, str]
    ) -> tuple[list[int], list[int], list[int]] | None:
        """Split what a model wrote after the opener into (reasoning, close, answer); None without a close tag.

        ``texts`` are the ``token_texts`` of the tokenizer, or those of ``ids``. The tag may be one token or several,
        and its ends may be merged with what stands beside them: such a token, and whitespace behind the tag, belongs to
        the close.
        """
        ends = list(accumulate(len(texts[i]) for i in ids))
        start = "".join(texts[i] for i in ids).find(self.close_tag)
        if start < 0:
            return None
        first = bisect_right(ends, start)
        last = bisect_left(ends, start + len(self.close_tag)) + 1
        while last < len(ids) and texts[ids[last]].isspace():
            last += 1
        return list(ids[:first]), list(ids[first:last]), list(ids[last:])


def _layout(open_tag: str) -> tuple[str, str]:
    """(opener, close) as they are written, the close with ``{close}`` for the tag."""
    return DRAFT_LAYOUTS.get(open_tag, (f"{open_tag}\n", CLOSERS["template"]))


def _close(open_tag: str, close_tag: str) -> str:
    return _layout(open_tag)[1].replace("{close}", close_tag)


def _render(tokenizer: Any, messages: list[dict[str, str]], *, enable_thinking: bool) -> str:
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template: use an instruction-tuned model, or set one on it")
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=enable_thinking, tokenize=False
        )
    except Exception as error:  # a template raises what it likes, for instance when it wants no system message
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from error


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of every token id below ``vocab_size``; ids that the tokenizer does not know (padding) have none."""
    known = len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    return [*texts, *[""] * (vocab_size - known)]
