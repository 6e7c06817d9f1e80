"""A second opinion on the first derivation: a model behind an OpenAI-compatible chat endpoint is asked for it.

It is shown the question, the answer and the numbered sentences of the reasoning, and replies with the number of the
sentence that first derives the answer, or 0. One request a trace; every one has a timeout and is tried a few times, so
nothing waits forever. The key, if any, comes from the environment variable OPENAI_API_KEY.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException

from trsd.errors import InputError

PROMPT = """Below are a question, its final answer, and a chain of thought cut into numbered sentences.

Question:
{question}

Final answer: {answer}

Chain of thought:
{sentences}

Which sentence is the first to derive the final answer, that is, to compute or conclude it rather than to quote or to
guess it? Reply with the number of that sentence alone, or with 0 if none does."""

MAX_REPLY_BYTES = 2**22
TOO_LONG = re.compile(r"context|too long|too large|maximum.{0,40}(?:length|tokens)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said of one trace."""

    sentence: int | None
    """Number of the sentence, counted from 1; 0 for none; None when there is no readable reply."""
    problem: str | None = None
    """Why there is no readable reply."""


@dataclass(frozen=True, kw_only=True)
class DerivationJudge:
    """Asks one model."""

    url: str
    """``http://host:8000``, with or without ``/v1`` or ``/v1/chat/completions``."""
    model: str
    timeout_seconds: float = 120.0
    """Of one attempt, from its start to the end of the reply."""
    attempts: int = 3
    backoff_seconds: float = 2.0
    """Wait before the second attempt; doubled before each further one."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise InputError(f"judge_url: expected http://host:port or https://..., got {self.url!r}")
        if not self.model:
            raise InputError("judge_model: name the model that the judge's server should use")

    @property
    def endpoint(self) -> str:
        """The address that requests go to."""
        base = self.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        return f"{base}/v1/chat/completions"

    def first_derivation(self, question: str, answer: str, sentences: Sequence[str]) -> Verdict:
        """The sentence that first derives ``answer``.

        Raises:
            InputError: the endpoint refuses, or fails at every attempt.
        """
        numbered = "\n".join(f"[{number}] {text.strip()}" for number, text in enumerate(sentences, start=1))
        prompt = PROMPT.format(question=question.strip(), answer=answer, sentences=numbered)
        try:
            reply = self._ask(prompt)
        except _PromptTooLong:
            return Verdict(sentence=None, problem="longer than the judge's context")
        number = read_number(reply)
        if number is None or number > len(sentences):
            return Verdict(sentence=None, problem="no sentence number in the reply")
        return Verdict(sentence=number)

    def _ask(self, prompt: str) -> str:
        """The text of the reply."""
        last = "no attempt was made"
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff_seconds * 2 ** (attempt - 1))
            try:
                return _content(self._post(prompt))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace").strip()
                last = f"HTTP {error.code} {said[:200]}"
                if error.code in (400, 413) and TOO_LONG.search(said):
                    raise _PromptTooLong from None
                if error.code < 500 and error.code not in (408, 429):
                    raise InputError(f"the judge at {self.endpoint} refuses: {last}") from None
            except (OSError, HTTPException, ValueError) as error:
                last = f"{type(error).__name__}: {error}"
        raise InputError(f"the judge at {self.endpoint} failed {self.attempts} times, the last time with {last}")

    def _post(self, prompt: str) -> bytes:
        deadline = time.monotonic() + self.timeout_seconds
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.endpoint, data=body, headers=headers)
        received = bytearray()
        # urllib's timeout is that of one read: a reply that trickles in needs a deadline.
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            while part := response.read1(2**16):
                received += part
                if len(received) > MAX_REPLY_BYTES:
                    raise ValueError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the reply took more than {self.timeout_seconds:g} s")
        return bytes(received)


class _PromptTooLong(Exception):
    """The server says that the prompt does not fit its model."""


def read_number(reply: str) -> int | None:
    """The one number that a reply names, what a judge thinks in <think> tags left out; None for none or several."""
    said = reply.rpartition("</think>")[2]
    numbers = set(re.findall(r"(?<![\w.-])\d{1,6}(?![\w]|\.\d)", said))
    return int(numbers.pop()) if len(numbers) == 1 else None


def _content(body: bytes) -> str:
    """The text of a chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, json.JSONDecodeError):
        raise ValueError(f"no chat completion: {body[:200]!r}") from None
    return content if isinstance(content, str) else ""
