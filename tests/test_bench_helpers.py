"""The benchmarks' own parts: what is made of the figures, and what they are measured on."""

import json
from functools import partial

import pytest
import torch
from conftest import make_tiny_model

from bench.attention import (
    CPU_BRANCHES,
    CPU_PLAIN,
    GPU_BRANCHES,
    GPU_PLAIN,
    Contender,
    Heads,
    Setting,
    cases,
    even_cuts,
    flops,
    mixed_lengths,
    visible_pairs,
)
from bench.lines import FillLine, StepLine, read_line
from bench.measure import NotMeasured, record_lines
from bench.record import Results, results_path
from bench.sequence_lengths import sample, token_lengths
from bench.step_settings import CPU_CUTS, GPU_CUTS, Cuts, real_examples
from bench.student_step import (
    PaddedPass,
    RandomTeacher,
    Step,
    build_model,
    largest_rows_that_fit,
    packed_passes,
    set_checkpointing,
)
from trsd.batching import pack_examples
from trsd.models import PACKED_ATTENTION
from trsd_kernels import varlen_attention


def test_ratios_and_paths(monkeypatch, tmp_path):
    line = StepLine(
        group="a model",
        contender="somebody",
        milliseconds=3.0,
        quartiles=(2.7, 3.3),
        reference_milliseconds=2.0,
        peak_bytes=10,
        reference_peak_bytes=5,
        num_tokens=6,
        flops=9e9,
    )
    assert (line.time_ratio, line.memory_ratio, line.tokens_per_second) == (1.5, 2.0, 2000)
    assert (line.spread, line.tflops_per_second) == (pytest.approx(0.1), pytest.approx(3.0))
    assert line.extra()["time_ratio"] == 1.5 and "gigabytes_per_second" not in line.extra()
    nobody = StepLine(group="a model", contender="nobody", outcome="out of memory")
    assert nobody.time_ratio is None and nobody.extra() == {"outcome": "out of memory"}
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    assert (
        results_path("errors", "NVIDIA H200 (SXM)", "2026-01-02") == tmp_path / "errors-nvidia-h200-sxm-2026-01-02.json"
    )


def never():
    return False


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    return Results("suite", "a suite")


def test_results_keep_lines_of_any_kind(results):
    results.add(FillLine(group="rows of 8", contender="short", fill_rate=0.5, rows=3))
    results.add(StepLine(group="a model", contender="one", milliseconds=2.0, reference_milliseconds=4.0))
    results.add(StepLine(group="a model", contender="two", outcome="out of memory"))
    results.add(FillLine(group="rows of 8", contender="long", fill_rate=1.0, rows=4))
    assert results.find(contender="long").rows == 4
    assert results.find(group="a model", contender="one").time_ratio == 0.5
    assert results.find(contender="two") is None and results.find(milliseconds=3.0) is None
    table = results.table().splitlines()
    assert [line.split()[0] for line in table if line] == ["rows", "fill", "short", "long", "a", "ms", "one", "two"]
    assert table[-1].split(maxsplit=1)[1] == "out of memory"
    suite = json.loads(results.path.read_text())["suites"]["suite"]
    assert [line["contender"] for line in suite["lines"]] == ["short", "one", "two", "long"]
    assert suite["environment"] == results.environment
    assert [read_line(values) for values in suite["lines"]] == results.lines


def test_a_later_run_replaces_what_it_measures_again_and_a_later_commit_everything(results):
    add = partial(StepLine, group="a model")
    for name in ("one", "two"):
        results.add(add(contender=name, milliseconds=1.0))
    other = Results("another", "another suite")
    other.add(add(contender="three"))
    again = Results("suite", "a suite")
    again.add(add(contender="two", milliseconds=2.0, quartiles=(1.0, 3.0)))
    suites = json.loads(results.path.read_text())["suites"]
    assert [(line["contender"], line["milliseconds"]) for line in suites["suite"]["lines"]] == [
        ("two", 2.0),
        ("one", 1.0),
    ]
    assert read_line(suites["suite"]["lines"][0]).quartiles == (1.0, 3.0)
    assert [line["contender"] for line in suites["another"]["lines"]] == ["three"]
    later = Results("suite", "a suite")
    later.environment = later.environment | {"commit": "later"}
    later.add(add(contender="four"))
    suites = json.loads(results.path.read_text())["suites"]
    assert [line["contender"] for line in suites["suite"]["lines"]] == ["four"]


def test_lines_of_no_known_kind_are_refused():
    with pytest.raises(ValueError, match="StepLine"):
        read_line({"kind": "Something"})


@pytest.mark.parametrize(
    "error,outcome",
    [
        (NotMeasured("no such GPU"), "not measured: no such GPU"),
        (ImportError("nothing here"), "not measured: pip install it (nothing here)"),
        (torch.OutOfMemoryError("full"), "out of memory"),
        (RuntimeError("broken"), "failed: RuntimeError: 'broken'"),
    ],
)
def test_a_line_that_is_not_measured_is_recorded_with_its_reason(results, error, outcome):
    def measure():
        raise error

    lines = [partial(StepLine, group="a model", contender=name) for name in ("one", "two")]
    expected = RuntimeError if outcome.startswith("failed") else pytest.skip.Exception
    with pytest.raises(expected):
        record_lines(results, lines, measure, out_of_time=never, install="it")
    assert [line.outcome for line in results.lines] == [outcome, outcome]


def test_nothing_begins_when_the_time_is_over(results):
    with pytest.raises(pytest.skip.Exception, match="TRSD_BENCH_SECONDS"):
        record_lines(
            results, [partial(StepLine, group="a model", contender="one")], pytest.fail, out_of_time=lambda: True
        )
    assert results.lines[0].outcome == "not measured: TRSD_BENCH_SECONDS have passed"


@pytest.mark.parametrize(
    "setting,separate",
    [
        (CPU_PLAIN[0], False),
        (CPU_BRANCHES[0], False),
        (CPU_BRANCHES[0], True),
        (Setting(Heads(2, 1, 8), (9,), (0, 9, 4), 3), False),
    ],
)
def test_pairs_are_those_of_the_mask(setting, separate):
    layout = setting.layout(separate=separate)
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for segment, (_, length, *_) in enumerate(layout.segments()):
        tokens = layout.sequence(segment)
        for place in range(len(tokens) - length, len(tokens)):
            mask[tokens[place], tokens[: place + 1]] = True
    assert visible_pairs(layout) == int(mask.sum())
    # Two products forward, five backward, each a multiplication and an addition for every pair and channel.
    assert flops(layout, setting.heads) == 7 * 2 * int(mask.sum()) * setting.heads.num_heads * setting.heads.head_dim


def test_mixed_lengths_are_the_same_every_time_and_fill_the_row():
    lengths = mixed_lengths(16384, 128, 4096)
    assert lengths == mixed_lengths(16384, 128, 4096) != mixed_lengths(16384, 128, 4096, seed=1)
    assert sum(lengths) == 16384
    assert all(128 <= length <= 4096 for length in lengths[:-1]) and 0 < lengths[-1] <= 4096
    assert even_cuts(10, 4) == (2, 5, 7, 10)


def test_separate_sequences_are_those_of_the_branches():
    layout, separate = (CPU_BRANCHES[0].layout(separate=separate) for separate in (False, True))
    positions = [layout.position_ids[layout.sequence(segment)] for segment in range(1, layout.num_segments)]
    assert torch.equal(torch.cat(positions), separate.position_ids)


def test_attention_for_a_gpu_is_laid_out_and_refused_without_one():
    assert [sum(setting.lengths) for setting in GPU_PLAIN] == [8192, 16384, 8192]
    assert [len(setting.cuts) for setting in GPU_BRANCHES] == [8, 4]
    assert all(setting.name and contender.name for setting, contender in cases("cuda"))
    with pytest.raises(NotMeasured, match="CUDA"):
        Contender("torch").prepare(CPU_PLAIN[0], device="cpu", dtype=torch.bfloat16)


def test_models_for_a_gpu_are_made_in_bf16_for_packed_rows():
    model = build_model("Qwen3-1.7B", "meta")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("cuts", [*GPU_CUTS, *CPU_CUTS], ids=lambda cuts: cuts.name)
def test_branches_and_separate_sequences_learn_the_same_answers(cuts):
    branches, separate = (cuts.examples(640, branches=flag) for flag in (True, False))
    assert len(branches) == cuts.num_traces and len(separate) == cuts.num_traces * cuts.num_cuts
    rows = [pack_examples(each, 2**20, "cpu")[0] for each in (branches, separate)]
    assert rows[0].labels.shape == rows[1].labels.shape and rows[0].num_thinking == rows[1].num_thinking == 0
    assert torch.equal(rows[0].labels.sort().values, rows[1].labels.sort().values)
    assert rows[0].num_tokens < rows[1].num_tokens / 2


SMALL_CUTS = Cuts("tiny", 24, 4, 5, prompt_length=3, num_traces=2)


def loss_and_gradient(step):
    step.forward_and_backward()
    gradient = step.model.get_decoder().layers[0].self_attn.k_proj.weight.grad.clone()
    step.clean_up()
    return step.loss, gradient


@pytest.mark.parametrize("checkpointing", [False, True])
def test_branches_and_separate_sequences_come_to_the_same_gradient(tokenizer, checkpointing):
    model = make_tiny_model(tokenizer)
    set_checkpointing(model, checkpointing)
    teacher = RandomTeacher(model, [SMALL_CUTS.answer_length] * SMALL_CUTS.num_traces)
    branches, separate = (SMALL_CUTS.examples(len(tokenizer), branches=flag) for flag in (True, False))
    wanted = loss_and_gradient(Step(model, teacher, packed_passes(separate, 64, model)))
    got = loss_and_gradient(Step(model, teacher, packed_passes(branches, 64, model)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_packed_and_padded_batches_come_to_the_same_gradient(tokenizer):
    model = make_tiny_model(tokenizer)
    examples = real_examples([9, 40, 17, 64, 5], len(tokenizer))
    teacher = RandomTeacher(model, [len(example.labels) for example in examples])
    packed = Step(model, teacher, packed_passes(examples, 100, model))
    padded = Step(model, teacher, [PaddedPass(examples[:3], "cpu"), PaddedPass(examples[3:], "cpu")])
    assert (packed.num_tokens, padded.num_tokens) == (130, 3 * 39 + 2 * 63)
    torch.testing.assert_close(loss_and_gradient(padded), loss_and_gradient(packed), rtol=1e-4, atol=1e-6)


def test_rows_are_halved_until_they_fit(tokenizer):
    examples = real_examples([9, 40, 17, 64, 5], len(tokenizer))

    class FakeStep:
        def __init__(self, max_tokens):
            self.max_tokens = max_tokens

        def peak_bytes(self):
            if self.max_tokens > 70:
                raise torch.OutOfMemoryError
            return 7

        def clean_up(self):
            pass

    step, peak, max_tokens = largest_rows_that_fit(examples, 130, lambda _, max_tokens: FakeStep(max_tokens))
    assert (step.max_tokens, peak, max_tokens) == (65, 7, 65)
    with pytest.raises(torch.OutOfMemoryError, match="not even rows of 63"):
        largest_rows_that_fit(examples, 130, lambda _, max_tokens: FakeStep(1000))


def test_real_lengths_are_sampled_alike_and_missing_data_is_named(monkeypatch, tmp_path):
    lengths = {"long": [5000, 9000, 7000], "short": [100, 200]}
    drawn = sample(lengths, {"long": 2, "short": 1}, longest=8192)
    assert drawn == sample(lengths, {"long": 2, "short": 1}, longest=8192)
    assert sorted(drawn)[1:] == [5000, 7000]
    monkeypatch.setenv("TRSD_BENCH_DATA", str(tmp_path))
    with pytest.raises(NotMeasured, match="tokenizer.json"):
        token_lengths()


def test_tuning_measures_every_candidate_and_names_what_cannot_run(monkeypatch, capsys):
    from bench import tune_attention
    from bench.attention import Heads, Setting
    from trsd_kernels.attention_tiles import Tiling

    def attention(query, key, value, layout, *, softmax_scale, blocks):
        if Tiling(64, 64, 8, 1) in blocks:
            raise RuntimeError("out of shared memory")
        return query * key.repeat_interleave(2, 1).sum() * value.sum()

    monkeypatch.setattr(tune_attention, "triton_attention", attention)
    setting = Setting(Heads(2, 1, 64), (32,), (8, 16), 4)
    found = tune_attention.tune([setting], device="cpu", dtype=torch.float32)
    count = sum(
        len(set(tune_attention.candidates(kernel, found_tiling(found, kernel)))) for kernel in tune_attention.KERNELS
    )
    assert len(found) == count and {each.kernel for each in found} == set(tune_attention.KERNELS)
    failed = {each.tiling for each in found if each.milliseconds is None}
    assert failed == {(64, 64, 8, 1)}
    assert "out of shared memory" in capsys.readouterr().out


def found_tiling(found, kernel):
    """The shipped tiling, which is measured first."""
    from trsd_kernels.attention_tiles import Tiling

    return Tiling(*next(each.tiling for each in found if each.kernel == kernel))


def test_attention_is_checked_before_it_is_timed(monkeypatch):
    from bench import attention

    check = dict(device="cpu", dtype=torch.float32)
    for with_branches, separate in ((False, False), (True, False), (True, True)):
        error = attention.worst_error(
            Contender("sdpa", separate), Heads(4, 2, 32), with_branches=with_branches, **check
        )
        assert 0 < error < 1e-6

    def wrong(query, key, value, *, layout, backend):
        out = varlen_attention(query, key, value, layout=layout, backend=backend)
        return out if query.dtype == torch.float64 else out + 0.01 * value.repeat_interleave(2, 1)

    monkeypatch.setattr(attention, "varlen_attention", wrong)
    attention.worst_error.cache_clear()
    with pytest.raises(NotMeasured, match=r"refused, its output is .* off float64's"):
        attention.worst_error(Contender("sdpa"), Heads(4, 2, 32), with_branches=False, **check)
    attention.worst_error.cache_clear()


@pytest.mark.parametrize("content", ["", "{}", '{"suites": ', "[1]"])
def test_a_damaged_results_file_costs_nothing_that_is_measured(results, content):
    results.path.parent.mkdir(parents=True, exist_ok=True)
    results.path.write_text(content)
    with pytest.warns(UserWarning, match="set aside"):
        results.add(StepLine(group="a model", contender="one", milliseconds=1.0))
    assert [line["contender"] for line in json.loads(results.path.read_text())["suites"]["suite"]["lines"]] == ["one"]
    assert results.path.with_suffix(".damaged").read_text() == content
