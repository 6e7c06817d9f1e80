"""Shared fixtures: the bundled tokenizer, a random two-layer Qwen3 of its vocabulary, and a few traces."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import interpreter
import pytest
import sanitizer
import thinned
import torch
import torch.distributed as dist
from hypothesis import settings
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from trsd.demo.problems import draw_problems
from trsd.metrics import read_metrics
from trsd.models import PACKED_ATTENTION, tokenizer_fingerprint
from trsd.ranks import Ranks
from trsd.thinking import ThinkFormat
from trsd.traces import Trace, write_traces

settings.register_profile("noisy_machine", deadline=None)
settings.load_profile("noisy_machine")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.prepare()


@pytest.fixture(autouse=True)
def checked_memory(request):
    """In the interpreter every launch is checked for races and for accesses out of bounds; peers look after theirs."""
    checked = INTERPRETED and request.module.__name__ != "test_bench_peers"
    with sanitizer.sanitized() if checked else nullcontext():
        yield


REASONER = Path(__file__).parent.parent / "trsd" / "demo" / "reasoner"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    if INTERPRETED:  # which takes milliseconds for a program of a kernel
        fast = [item for item in items if not {"gpu", "slow"} & {marker.name for marker in item.iter_markers()}]
        for item in thinned.left_out(fast):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What was imported stays: the collections of every run that is tested look at what the run made alone."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    group = parser.getgroup("golden losses")
    group.addoption("--assert-equal", action="store_true", help="compare losses with tests/golden/ bit for bit")
    group.addoption("--write-golden", action="store_true", help="write this platform's losses to tests/golden/")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(REASONER)


@pytest.fixture(scope="session")
def think(tokenizer):
    return ThinkFormat.of(tokenizer)


def make_tiny_model(tokenizer, *, seed=0, dtype=torch.float32, tie=True, hidden_size=64, vocab_size=None):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,  # large, so that distributions are far from uniform and differences show
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.eval()


@pytest.fixture
def tiny_model(tokenizer):
    return make_tiny_model(tokenizer)


@pytest.fixture
def tiny_folder(tokenizer, tmp_path):
    """A model folder of the tiny random model."""
    folder = tmp_path / "tiny"
    make_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_traces(tokenizer, think, num_traces, *, seed=0):
    """Traces in the demo's format with the generator's worked solutions as reasoning."""
    problems = draw_problems("train", seed=seed)
    rng = random.Random(seed)
    fingerprint = tokenizer_fingerprint(tokenizer)
    traces = []
    for index in range(num_traces):
        problem = next(problems)
        text = " ".join(problem.reasoning.split()[: rng.randint(1, 40)])
        traces.append(
            Trace(
                id=f"trace-{index}",
                question=problem.question,
                gold=problem.answer,
                prompt_ids=think.prompt_ids(tokenizer, [{"role": "user", "content": problem.question}]),
                reasoning_ids=tokenizer(text, add_special_tokens=False).input_ids,
                close_ids=list(think.natural_close_ids),
                answer_ids=[
                    *tokenizer(problem.response, add_special_tokens=False).input_ids,
                    tokenizer.eos_token_id,
                ],
                reasoning=text,
                answer=problem.response,
                closed=True,
                correct=True,
                tokenizer=fingerprint,
            )
        )
    return traces


@pytest.fixture
def traces(tokenizer, think):
    return make_traces(tokenizer, think, 7)


@pytest.fixture
def trace_file(tmp_path, tokenizer, think):
    path = tmp_path / "traces.jsonl"
    write_traces(path, make_traces(tokenizer, think, 10))
    return path


@pytest.fixture
def words(tiny_folder, trace_file, tmp_path):
    """The command line of a run of the tiny model on ten given traces; flags override."""

    def words(name="run", **flags):
        defaults = dict(
            model_name_or_path=tiny_folder,
            data=trace_file,
            eval_data=None,
            output_dir=tmp_path / name,
            max_steps=6,
            train_batch_size=4,
            max_tokens_per_batch=512,
            max_length=512,
            learning_rate=1e-3,
            anchor_share=0.2,
        )
        return [word for key, value in (defaults | flags).items() for word in (f"--{key}", str(value))]

    return words


@pytest.fixture
def whole_report():
    """For tests of a run's report: ``run`` draws its pictures and counts its memory by part."""


@pytest.fixture
def run(words, tmp_path, monkeypatch, request):
    """Run the trainer with ``words``; returns the run's folder."""

    def run(name="run", **flags):
        import bare_reports  # not at the top: the GPU tests run where its command line's parser is not installed

        from trsd import train

        if "whole_report" not in request.fixturenames:
            bare_reports.leave_out(monkeypatch.setattr)
        train.main(words(name, **flags))
        return tmp_path / name

    return run


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """SIGINT raises and SIGHUP ends, also where the tests were started as a background job, which ignores them."""
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in before.items():
        before[number] = signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refusal(capsys, call):
    with pytest.raises(SystemExit) as exit_:
        call()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def row_of(trace_file):
    return json.loads(trace_file.read_text().splitlines()[0])


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture
def one_rank():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


class Launcher:
    """Runs over several ranks, each a process; see ``rank_server.py``."""

    def __init__(self):
        folder = Path(__file__).parent
        paths = [str(folder), str(folder.parent), str(folder.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(folder / "rank_server.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)

    def __call__(self, words, num_ranks, **options):
        """Of the trainer: the ranks' exit codes, what each printed, and the seconds it took."""
        return self._ask(words=words, num_ranks=num_ranks, **options)

    def call(self, function, *arguments, num_ranks=2):
        """Of a test module's ``function``, which finds its rank in the environment; arguments are JSON."""
        name = [function.__module__, function.__name__]
        codes, logs, _ = self._ask(function=name, arguments=arguments, num_ranks=num_ranks, seconds=300)
        assert codes == [0] * num_ranks, f"exit codes {codes}:\n" + "\n".join(logs)

    def _ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        found = json.loads(self.server.stdout.readline())
        return found["codes"], found["logs"], found["seconds"]

    def close(self):
        self.server.stdin.close()
        self.server.wait(30)


@pytest.fixture(scope="session")
def launch():
    launcher = Launcher()
    yield launcher
    launcher.close()
