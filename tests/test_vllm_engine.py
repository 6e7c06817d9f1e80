"""vLLM, in a process of its own and behind HTTP, against transformers: the bundled reasoner in float32, on a CPU.

Run as a program by a Python that has vLLM, this file writes what ``VLLMEngine`` does to a JSON file, which the tests
read: vLLM starts once. The reasoner's folder gets sampling defaults of its own, which must change nothing.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trsd.engines import Continuation, Sampling, Written, one
from trsd.engines.folder import decoding_facts
from trsd.errors import InputError
from trsd.models import load_tokenizer
from trsd.thinking import ThinkFormat

ROOT = Path(__file__).parent.parent
REASONER, QUESTIONS = ROOT / "trsd" / "demo" / "reasoner", ROOT / "trsd" / "demo" / "questions" / "evaluation.jsonl"
OWN_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PYTHON = str(OWN_PYTHON) if OWN_PYTHON.exists() else sys.executable if find_spec("vllm") else None
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed: make vllm-venv"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="figures are for float32 on a CPU"),
]

NUM_PROMPTS, LENGTH = 32, 200
OPTIONS = {"max_num_seqs": 8, "max_model_len": 512}
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.5, top_p=0.8)
PENALISED = Sampling(repetition_penalty=1.2)
EQUALS = 33  # the token "=", which some of the answers below hold
# Contexts that mean nothing, after which the reasoner is unsure of itself and repeats itself.
ODD_CONTEXTS = [[200 + (37 * row + place * place * 11) % 400 for place in range(20)] for row in range(8)]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other crawl where others use the cores too
}


def prompts_and_tokenizer():
    tokenizer = load_tokenizer(REASONER)
    think = ThinkFormat.of(tokenizer)
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:NUM_PROMPTS]]
    return [think.prompt_ids(tokenizer, [{"role": "user", "content": row["question"]}]) for row in rows], tokenizer


def think_then_answer(prompt, closer=(7, 8)):
    (thought,) = yield [Continuation(context_ids=prompt, max_new_tokens=LENGTH)]
    contexts = [[*prompt, *thought.ids[:cut], *closer] for cut in (0, 40, 80)]
    answers = yield [Continuation(context_ids=context, max_new_tokens=20, stop_ids=(EQUALS,)) for context in contexts]
    return [thought, *answers], [prompt, *contexts]


def written_by(engine, prompts):
    """What an engine writes in every way that is compared, as lists that JSON can hold."""

    def write(sampling, chosen, seed=3):
        wishes = [Continuation(context_ids=ODD_CONTEXTS[i], max_new_tokens=60, seed=seed + i) for i in chosen]
        results = dict(engine.run([one(wish) for wish in wishes], sampling))
        return [results[place] for place in range(len(wishes))]

    scripts = dict(engine.run([think_then_answer(prompt) for prompt in prompts], GREEDY))
    few = range(len(ODD_CONTEXTS))
    return {
        "scripts": [scripts[place] for place in range(len(prompts))],
        "sampled": write(SAMPLED, few),
        "sampled again": write(SAMPLED, few),
        "sampled alone": write(SAMPLED, [5]),
        "sampled otherwise": write(SAMPLED, few, seed=100),
        "penalised": write(PENALISED, few),
    }


def refusal_of(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def run_offline(folder, target):
    """What this file does as a program."""
    from vllm import SamplingParams

    from trsd.engines.vllm import VLLMEngine

    prompts, tokenizer = prompts_and_tokenizer()
    found = {"bad option": refusal_of(lambda: VLLMEngine(folder, tokenizer, llm_options={"no_such_option": 1}))}
    found["reserved option"] = refusal_of(lambda: VLLMEngine(folder, tokenizer, llm_options={"logprobs_mode": "x"}))
    engine = VLLMEngine(folder, tokenizer, llm_options=OPTIONS)
    found["facts"] = [engine.eos_ids, engine.context_limit, engine.vocab_size, engine.max_scripts]
    found |= written_by(engine, prompts)

    # More scripts than may be in flight; leaving after the first must leave nothing behind.
    engine.max_scripts, submitted = 4, []
    add = engine.llm.llm_engine.add_request
    engine.llm.llm_engine.add_request = lambda name, *args, **options: (
        submitted.append(name) or add(name, *args, **options)
    )
    wishes = [Continuation(context_ids=prompt, max_new_tokens=20 if i else 1) for i, prompt in enumerate(prompts)]
    results = engine.run([one(wish) for wish in wishes], GREEDY)
    found["first"] = next(results)[0]
    found["submitted for the first"] = len(submitted)
    results.close()
    found["left behind"] = engine.llm.llm_engine.get_num_unfinished_requests()
    found["place order"] = sorted(place for place, _ in engine.run([one(wish) for wish in wishes], GREEDY))

    submitted.clear()
    long = Continuation(context_ids=[5] * 400, max_new_tokens=200)
    found["too long"] = refusal_of(lambda: list(engine.run([one(long)], GREEDY)))
    found["too hot"] = refusal_of(lambda: list(engine.run([one(wishes[0])], Sampling(temperature=3.0))))
    found["submitted though refused"] = len(submitted)

    tokens = [{"prompt_token_ids": prompt} for prompt in prompts[:4]]
    scored = engine.llm.generate(tokens, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found["prompt log_probs"] = [
        [row[token].logprob for row, token in zip(text.prompt_logprobs[1:], text.prompt_token_ids[1:], strict=True)]
        for text in scored
    ]
    Path(target).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reasoner with sampling defaults that would change every text."""
    folder = tmp_path_factory.mktemp("models") / "reasoner"
    shutil.copytree(REASONER, folder)
    path = folder / "generation_config.json"
    defaults = {"do_sample": True, "temperature": 1.7, "top_k": 3, "min_p": 0.3, "repetition_penalty": 3.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    return folder


@pytest.fixture(scope="module")
def offline(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("offline") / "found.json"
    command = [PYTHON, __file__, str(folder), str(target)]
    result = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(target.read_text())


@contextlib.contextmanager
def serving(words, cwd=None):
    """Inside, vLLM's server with these ``words`` of its command line answers; the URL, on a free port."""
    from fake_server import free_port

    port = free_port()
    # Its own group, so that all of its processes can be ended. The build for CPUs has no command line but this one.
    process = subprocess.Popen(
        [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words, "--host", "127.0.0.1", "--port", str(port)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder):
    """The URL of what ``vllm serve`` is."""
    limits = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "512"]
    with serving(["--model", str(folder), "--served-model-name", "reasoner", *limits]) as url:
        yield url


def _wait_for(url, process, seconds=240):
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"vllm serve ended with {process.returncode}"
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def served(server):
    from trsd.engines.endpoints import Patience
    from trsd.engines.server import ServerEngine

    prompts, tokenizer = prompts_and_tokenizer()
    facts = decoding_facts(REASONER, tokenizer)
    engine = ServerEngine(server, tokenizer, facts, concurrency=12, patience=Patience(request_seconds=60))
    found = json.loads(json.dumps(written_by(engine, prompts)))
    return found | {"facts": [engine.eos_ids, engine.context_limit, engine.vocab_size, 32]}


@pytest.fixture(params=["offline", "served"])
def found(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    return prompts_and_tokenizer()[0]


@torch.no_grad()
def generate(model, prompts, length, **settings):
    """transformers' greedy texts, up to and with EOS."""
    widest = max(map(len, prompts))
    # A row's own first token is its padding, since a repetition penalty looks at padding too.
    ids = torch.tensor([[prompt[0]] * (widest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=2, pad_token_id=0, **settings)
    output = model.generate(ids, attention_mask=mask, generation_config=config)[:, widest:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in output]


@torch.no_grad()
def score(model, context, ids):
    """log-probabilities of every token at every place of ``ids`` behind ``context``: [len(ids), vocab_size]."""
    logits = model(torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1)


def near_ties(model, context, ours, theirs):
    """Whether two greedy texts part where the model finds both tokens equally likely, up to rounding."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    row = score(model, context, ours[: place + 1])[place]
    return abs(row[ours[place]] - row[theirs[place]]) < 1e-3


def test_the_engines_know_the_model(found):
    assert found["facts"] == [[2], 512, 640, 32]


def test_greedy_thinking_is_that_of_transformers(found, reference, prompts):
    ours = [Written(*thought).ids for (thought, *_), _ in found["scripts"]]
    theirs = generate(reference, prompts, LENGTH)
    other = [i for i in range(NUM_PROMPTS) if ours[i] != theirs[i]]
    assert len(other) <= NUM_PROMPTS // 10
    assert all(near_ties(reference, prompts[i], ours[i], theirs[i]) for i in other)
    assert sum(len(ids) for ids in ours) > 100 * NUM_PROMPTS


def test_answers_behind_cut_thinking_are_greedy_and_stop_where_they_were_told_to(found, reference):
    stopped = 0
    for texts, contexts in found["scripts"]:
        for (ids, _), context in zip(texts[1:], contexts[1:], strict=True):
            rows = score(reference, context, ids)
            chosen = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (chosen > rows.max(-1).values - 1e-3).all()
            assert not {2, EQUALS} & set(ids[:-1]) and (len(ids) == 20 or ids[-1] in (2, EQUALS))
            stopped += ids[-1] == EQUALS
    assert stopped > 5


@pytest.mark.parametrize("kind", ["scripts", "sampled", "penalised"])
def test_log_probabilities_are_the_models_own_before_temperature_and_penalties(found, reference, kind):
    if kind == "scripts":
        rows = [row for texts, contexts in found[kind] for row in zip(texts, contexts, strict=True)]
    else:
        rows = list(zip(found[kind], ODD_CONTEXTS, strict=True))
    worst = 0.0
    for (ids, log_probs), context in rows:
        theirs = score(reference, context, ids).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, float((theirs - torch.tensor(log_probs)).abs().max()))
    assert worst < 1e-4


def test_sampling_follows_the_seed_whatever_runs_beside_it(found):
    ids = {kind: [row[0] for row in found[kind]] for kind in found if kind.startswith("sampled")}
    assert ids["sampled"] == ids["sampled again"]
    assert ids["sampled alone"] == [ids["sampled"][5]]
    assert all(a != b for a, b in zip(ids["sampled"], ids["sampled otherwise"], strict=True))


def test_sampling_stays_in_the_nucleus_and_leaves_the_greedy_path(found, reference):
    greedy = 0
    for (ids, _), context in zip(found["sampled"], ODD_CONTEXTS, strict=True):
        probs = (score(reference, context, ids) / SAMPLED.temperature).softmax(-1)
        chosen = probs.gather(1, torch.tensor(ids)[:, None])
        before = torch.where(probs > chosen, probs, 0).sum(-1)  # of the tokens more likely than the chosen one
        assert (before < SAMPLED.top_p + 1e-4).all()
        greedy += int((before == 0).all())
    assert greedy == 0


def test_a_repetition_penalty_is_that_of_transformers(found, reference):
    theirs = generate(reference, ODD_CONTEXTS, 60, repetition_penalty=PENALISED.repetition_penalty)
    ours = [ids for ids, _ in found["penalised"]]
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 7
    assert theirs != generate(reference, ODD_CONTEXTS, 60)


def test_prompt_log_probabilities_are_those_of_transformers(offline, reference, prompts):
    for prompt, ours in zip(prompts, offline["prompt log_probs"], strict=False):
        theirs = score(reference, prompt[:1], prompt[1:]).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert float((theirs - torch.tensor(ours)).abs().max()) < 1e-4


def test_scripts_are_submitted_a_few_at_a_time_and_leaving_aborts_the_rest(offline):
    assert offline["first"] == 0 and offline["submitted for the first"] == 4
    assert offline["left behind"] == 0
    assert offline["place order"] == list(range(NUM_PROMPTS))


def test_what_vllm_cannot_do_is_refused_before_it_is_submitted(offline):
    assert "a prompt has 400 tokens and 200 may follow, but the model's context holds 512" in offline["too long"]
    assert "temperature: vLLM takes at most 2" in offline["too hot"]
    assert offline["submitted though refused"] == 0


def test_options_that_vllm_does_not_know_or_that_decide_results_are_refused(offline):
    assert "no_such_option" in offline["bad option"] and "vllm_args" in offline["bad option"]
    assert "vllm_args: logprobs_mode cannot be set" in offline["reserved option"]


def test_a_name_that_the_server_does_not_know_is_refused_with_the_one_it_serves(server):
    from trsd.engines.server import ServerEngine

    _, tokenizer = prompts_and_tokenizer()
    with pytest.raises(InputError, match="'other' is not served; served_model can be 'reasoner'"):
        ServerEngine(server, tokenizer, decoding_facts(REASONER, tokenizer), served_model="other")


COMMANDS = {
    "generate": ["--max_samples", "6", "--max_thinking_tokens", "250", "--output", "traces.jsonl"],
    "evaluate": ["--max_samples", "6", "--max_thinking_tokens", "250", "--budgets", "20,80,100%", "--output_dir", "."],
}


def run_command(folder, name, python, *flags):
    command = [python, "-m", f"trsd.{name}", *COMMANDS[name], *flags]
    result = subprocess.run(
        command, env=os.environ | ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    if name == "evaluate":
        found = json.loads((folder / "evaluation.json").read_text())
        return [found["unconstrained"]["mean_tokens"], found["budgets"], found["examples"]]
    rows = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    return [(row["question"], row["reasoning_ids"], row["answer_ids"], row["correct"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_writes_the_same_through_every_engine(server, tmp_path, name):
    def through(engine, python, *flags):
        folder = tmp_path / engine
        folder.mkdir()
        return run_command(folder, name, python, "--engine", engine, *flags)

    ours = through("hf", sys.executable)
    assert through("server", sys.executable, "--server", server, "--concurrency", "8") == ours
    assert through("vllm", PYTHON, "--vllm_args", json.dumps(OPTIONS)) == ours
    assert len(ours) >= 3


if __name__ == "__main__":
    run_offline(Path(sys.argv[1]), sys.argv[2])
