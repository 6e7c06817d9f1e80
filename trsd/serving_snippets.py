"""Code to copy from a model card: answering at a thinking budget with transformers, ``vllm serve`` and llama.cpp.

All write what ``decoding.py`` does, ``prompt | reasoning[:budget] | closer | answer``, greedily, in two calls. Token
ids go in and out, so that no text is tokenized otherwise than in training. vLLM can do it by itself where the tags are
tokens: it forces ``reasoning_end_str``, and counts as thinking what the prompt holds behind the open tag.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any, NamedTuple

from trsd.thinking import ThinkFormat

VLLM_PARSER, VLLM_TAGS = "qwen3", ("<think>", "</think>")
MESSAGES = 'messages = [{"role": "user", "content": "How many prime numbers are there below 20?"}]'


class Writer(NamedTuple):
    """Python that defines ``write(ids, max_new_tokens)``, which returns the ids of what is written behind ``ids``."""

    imports: str
    code: str


TRANSFORMERS = Writer(
    """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer""",
    """\
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")


def write(ids, max_new_tokens):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": 1.0}
    found = model.generate(ids, attention_mask=mask, **options)
    return found[0, ids.shape[1] :].tolist()""",
)
_POST_IMPORTS = """\
import json
from urllib.request import Request, urlopen"""
_POST = """\
def post(address, wanted):
    request = Request(address, json.dumps(wanted).encode(), {"Content-Type": "application/json"})
    return json.load(urlopen(request))"""
_CLIENT_IMPORTS = f"""\
{_POST_IMPORTS}

from transformers import AutoTokenizer"""
VLLM = Writer(
    _CLIENT_IMPORTS,
    f"""\


{_POST}


def write(ids, max_new_tokens):
    wanted = {{"model": "mine", "prompt": ids, "max_tokens": max_new_tokens, "temperature": 0}}
    reply = post("http://localhost:8000/v1/completions", wanted | {{"return_token_ids": True}})
    return reply["choices"][0]["token_ids"]""",
)
LLAMA_CPP = Writer(
    _CLIENT_IMPORTS,
    f"""\


{_POST}


def write(ids, max_new_tokens):
    wanted = {{"prompt": ids, "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True}}
    return post("http://localhost:8080/completion", wanted)["tokens"]""",
)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How one model is served."""

    open_tag: str
    close_tag: str
    closer: str
    opener: str
    """What the prompt ends with, added where the chat template leaves it out."""
    opener_tokens: int
    """Tokens of it behind the open tag."""
    enable_thinking: bool
    """What the chat template is told."""
    vllm_closes: bool
    """vLLM's own budget knows the tags: they are those of its parser, a token each."""
    budget: int
    """Thinking tokens, for the example."""
    max_answer_tokens: int

    @classmethod
    def of(cls, think: ThinkFormat, tokenizer: Any, *, budget: int, max_answer_tokens: int) -> "Serving":
        """Of a think format and the tokenizer that it is of."""

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False).input_ids)

        return cls(
            open_tag=think.open_tag,
            close_tag=think.close_tag,
            closer=think.closer,
            opener=think.opener,
            opener_tokens=count(think.opener) - count(think.open_tag),
            enable_thinking=think.open_tag in str(tokenizer.chat_template),
            vllm_closes=(think.open_tag, think.close_tag) == VLLM_TAGS and list(map(count, VLLM_TAGS)) == [1, 1],
            budget=budget,
            max_answer_tokens=max_answer_tokens,
        )


def program(serving: Serving, writer: Writer) -> str:
    """Python that answers a question at a budget by way of ``writer``."""
    thinking = "" if serving.enable_thinking else ", enable_thinking=False"
    return f"""\
{writer.imports}

FOLDER = "."  # this folder, or its name on the Hub
CLOSER, CLOSE_TAG, OPENER = {serving.closer!r}, {serving.close_tag!r}, {serving.opener!r}
budget, max_answer_tokens = {serving.budget}, {serving.max_answer_tokens}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
{writer.code}


def ids_of(text):
    return tokenizer(text, add_special_tokens=False).input_ids


{MESSAGES}
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{thinking})
if not prompt.rstrip().endswith(OPENER.rstrip()):
    prompt += OPENER
start = ids_of(prompt)
thought = write(start, budget + len(ids_of(CLOSE_TAG)))
if CLOSE_TAG not in tokenizer.decode(thought):  # it did not end by itself: cut it there, and close it
    thought = [i for i in thought[:budget] if i != tokenizer.eos_token_id] + ids_of(CLOSER)
answer = [] if thought[-1] == tokenizer.eos_token_id else write(start + thought, max_answer_tokens)
print(tokenizer.decode(thought + answer))"""


def vllm_serve(serving: Serving) -> str:
    """The command that serves this folder."""
    command = "vllm serve . --served-model-name mine --generation-config vllm"
    if not serving.vllm_closes:
        return command
    reasoning = {"reasoning_start_str": serving.open_tag, "reasoning_end_str": serving.closer}
    words = f"--reasoning-parser {VLLM_PARSER} --reasoning-config {shlex.quote(json.dumps(reasoning))}"
    return f"{command} \\\n    {words}"


def vllm_program(serving: Serving) -> str:
    """Python that asks ``vllm serve`` for an answer at a budget."""
    if not serving.vllm_closes:
        return program(serving, VLLM)
    tokens = serving.budget + serving.opener_tokens
    why = f"  # {serving.budget}, and what stands behind {serving.open_tag}" if serving.opener_tokens else ""
    return f"""\
{_POST_IMPORTS}


{_POST}


{MESSAGES}
wanted = {{
    "model": "mine",
    "messages": messages,
    "thinking_token_budget": {tokens},{why}
    "max_tokens": {serving.budget + serving.max_answer_tokens + 32},
    "temperature": 0,
    "skip_special_tokens": False,
}}
print(post("http://localhost:8000/v1/chat/completions", wanted)["choices"][0]["message"])"""
