"""A checkpoint that training wrote, as vLLM serves it: by the commands of its own model card, and offline, on a CPU.

Run as a program by a Python that has vLLM, this file answers at budgets offline. The checkpoint is the bundled
reasoner's after three steps on a few traces, so it is no folder that anybody has prepared for serving.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_vllm_engine import ENVIRONMENT, PYTHON, QUESTIONS, pytestmark, serving  # noqa: F401

from trsd.decoding import Decoder, Limits
from trsd.engines.folder import decoding_facts
from trsd.models import load_model, load_tokenizer
from trsd.thinking import ThinkFormat
from trsd.traces import write_traces

CLOSER = "Enough.\n</think>\n\n"  # none that the model would write by itself
BUDGETS, LIMITS = (0, 20, 90, 250), Limits(max_thinking_tokens=250, max_answer_tokens=24)
NUM_QUESTIONS = 12
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "512"]


def questions():
    return [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()[:NUM_QUESTIONS]]


def decoder_of(folder, engine_of):
    tokenizer = load_tokenizer(folder)
    return Decoder(engine_of(tokenizer), tokenizer, ThinkFormat.of(tokenizer, closer=CLOSER))


def answers_of(decoder):
    """Token ids behind the prompt, of every question at every budget."""
    prompts = [decoder.think.prompt_ids(decoder.tokenizer, [{"role": "user", "content": q}]) for q in questions()]
    _, at = decoder.think_at_budgets(prompts, BUDGETS, LIMITS)
    return [[[*a.reasoning_ids, *a.close_ids, *a.answer_ids] for a in at[budget]] for budget in BUDGETS]


def run_offline(folder, target):
    """What this file does as a program: our own engine, and vLLM with the folder's own defaults."""
    from vllm import LLM, SamplingParams

    from trsd.engines.vllm import VLLMEngine

    options = {"max_num_seqs": 8, "max_model_len": 512}
    decoder = decoder_of(folder, lambda tokenizer: VLLMEngine(folder, tokenizer, llm_options=options))
    found = {"answers": answers_of(decoder)}
    del decoder
    llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, **options)
    defaults = llm.get_default_sampling_params()
    found["defaults"] = [defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty]
    messages = [{"role": "user", "content": questions()[0]}]
    greedy = SamplingParams(temperature=0, max_tokens=400, skip_special_tokens=False)
    (reply,) = llm.chat([messages], greedy, use_tqdm=False)
    found["chat"] = [reply.prompt_token_ids, list(reply.outputs[0].token_ids), reply.outputs[0].finish_reason]
    Path(target).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from conftest import make_traces  # not at the top: the Python that has vLLM has not what it imports

    from trsd import train

    folder = tmp_path_factory.mktemp("trained")
    tokenizer = load_tokenizer(Path(__file__).parent.parent / "trsd" / "demo" / "reasoner")
    traces = make_traces(tokenizer, ThinkFormat.of(tokenizer, closer=CLOSER), 12)
    write_traces(folder / "traces.jsonl", traces)
    settings = dict(max_steps=3, train_batch_size=4, max_length=512, max_tokens_per_batch=2048, learning_rate=1e-4)
    settings |= dict(data=folder / "traces.jsonl", output_dir=folder / "run", closer=CLOSER, **vars(LIMITS))
    train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    return folder / "run" / "checkpoint-3"


@pytest.fixture(scope="module")
def ours(checkpoint):
    from trsd.engines.hf import HFEngine

    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    decoder = decoder_of(checkpoint, lambda tokenizer: HFEngine(model, tokenizer, batch_size=NUM_QUESTIONS))
    return answers_of(decoder)


@pytest.fixture(scope="module")
def offline(checkpoint, tmp_path_factory):
    target = tmp_path_factory.mktemp("offline") / "found.json"
    command = [PYTHON, __file__, str(checkpoint), str(target)]
    result = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(target.read_text())


def blocks(checkpoint, language):
    """The code of the card's part about vLLM."""
    text = (checkpoint / "README.md").read_text().split("## vLLM\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server(checkpoint):
    """The URL of what the card's own command serves, on a free port."""
    (command,) = blocks(checkpoint, "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", "."]
    with serving(["--model", *words[2:], *OPTIONS], cwd=checkpoint) as url:
        yield url


def num_alike(found, ours):
    return sum(a == b for one, other in zip(found, ours, strict=True) for a, b in zip(one, other, strict=True))


# Greedy texts may part where two tokens are equally likely up to rounding, as test_vllm_engine.py looks at closely.
MOST = len(BUDGETS) * NUM_QUESTIONS
ENOUGH = MOST - MOST // 10


def test_offline_answers_at_budgets_are_those_of_transformers(offline, ours):
    assert num_alike(offline["answers"], ours) >= ENOUGH


def test_the_folders_own_defaults_add_no_sampling_and_end_where_answers_were_taught_to(offline, checkpoint, ours):
    assert offline["defaults"] == [1.0, 1.0, 0, 1.0]
    prompt, written, reason = offline["chat"]
    tokenizer = load_tokenizer(checkpoint)
    think = ThinkFormat.of(tokenizer, closer=CLOSER)
    assert prompt == think.prompt_ids(tokenizer, [{"role": "user", "content": questions()[0]}])
    assert (
        reason == "stop" and written[-1] == tokenizer.eos_token_id == decoding_facts(checkpoint, tokenizer).eos_ids[0]
    )
    assert written == ours[BUDGETS.index(250)][0]


def test_served_answers_at_budgets_are_those_of_transformers(server, checkpoint, ours):
    from trsd.engines.server import ServerEngine

    facts = decoding_facts(checkpoint, load_tokenizer(checkpoint))
    decoder = decoder_of(checkpoint, lambda tokenizer: ServerEngine(server, tokenizer, facts))
    assert num_alike(answers_of(decoder), ours) >= ENOUGH


def test_vllms_own_budget_forces_the_same_closer_at_the_same_place(server, checkpoint, ours):
    import httpx

    tokenizer = load_tokenizer(checkpoint)
    think = ThinkFormat.of(tokenizer, closer=CLOSER)
    found = []
    for budget in BUDGETS:
        answers = []
        for question in questions():
            wanted = {
                "model": "mine",
                "prompt": think.prompt_ids(tokenizer, [{"role": "user", "content": question}]),
                "max_tokens": budget + len(think.closer_ids) + LIMITS.max_answer_tokens,
                "temperature": 0,
                "thinking_token_budget": budget + 1,  # the opener's line break stands behind the open tag
                "return_token_ids": True,
            }
            reply = httpx.post(f"{server}/v1/completions", json=wanted, timeout=60).json()
            answers.append(reply["choices"][0]["token_ids"])
        found.append(answers)
    assert num_alike(found, ours) >= ENOUGH
    assert all(list(think.closer_ids) == ids[20 : 20 + len(think.closer_ids)] for ids in found[1])


def test_the_cards_own_client_separates_thinking_and_answer(server, checkpoint, ours):
    (code,) = blocks(checkpoint, "python")
    budget = int(re.search(r'"thinking_token_budget": (\d+)', code)[1])
    code = code.replace(f'"thinking_token_budget": {budget}', f'"thinking_token_budget": {90 + 1}')
    code = code.replace("http://localhost:8000", server).replace(
        "How many prime numbers are there below 20?", questions()[0]
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "card", "exec"), {})
    message = eval(out.getvalue())
    tokenizer = load_tokenizer(checkpoint)
    thought, _, answer = tokenizer.decode(ours[BUDGETS.index(90)][0]).partition("</think>")
    assert message["reasoning"].strip() == thought.strip() and thought.endswith("Enough.\n")
    said = answer.removesuffix(tokenizer.eos_token).strip()  # up to max_answer_tokens; the client allows a few more
    assert said and message["content"].strip().startswith(said)


if __name__ == "__main__":
    run_offline(Path(sys.argv[1]), sys.argv[2])
