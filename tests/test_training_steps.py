"""The whole-step benchmark's parts: that the LSP reference and ours are one step, and who is refused or falls back."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import predict
from bench import test_bench_training as suite
from bench.contest import check, in_turn
from bench.deadline import Deadline
from bench.lines import TrainingLine
from bench.lsp_reference import LSPReference, padded
from bench.measure import NotMeasured
from bench.predict import COMPILED, ours_forms, planned_ours, planned_reference, predictions
from bench.record import Results
from bench.training import BranchSteps, PairSteps, Shared
from bench.training_settings import CPU_PAIRS, GPU_BRANCHES, GPU_PAIRS, Branches, Pair, those_that_fit
from trsd.ceilings import Ceilings, known
from trsd.compiled_layers import CompiledLayers
from trsd.fused_meter import fused
from trsd_kernels import FusedLinearDistillation

PAIR = Pair("small teacher", "small student", 50, 2, (0.5, 1.0))
CPU = Ceilings(name="CPU", products=1e11, copies=1e10, memory=None)


@pytest.fixture(scope="module")
def shared():
    return Shared(PAIR.student, PAIR.teacher, "cpu")


@pytest.fixture
def steps(shared, tmp_path):
    return PairSteps(PAIR, 0.7, shared, tmp_path)


def gradients(step):
    """The gradients that the optimizer finds."""
    found, optimizer = {}, step.shared.optimizer
    inside = optimizer.step

    def keep():
        found.update({name: p.grad.clone() for name, p in step.shared.student.named_parameters()})
        inside()

    optimizer.step = keep
    try:
        step.work()
    finally:
        del optimizer.step
    return found


@pytest.mark.parametrize(
    "form",
    ["online", "lean", "recomputed", "cached", "best"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("online compiled", "cached compiled", "best compiled")],
)
def test_every_contender_takes_the_step_of_the_reference(steps, form):
    ours = {
        "online": partial(steps.online, recomputed=False),
        "lean": partial(steps.online, recomputed=True, lean=True),
        "recomputed": partial(steps.online, recomputed=True),
        "cached": partial(steps.cached, recomputed=False),
        "best": partial(steps.reference, best=True, recomputed=False),
        "online compiled": partial(steps.online, recomputed=False, compiled=True),
        "cached compiled": partial(steps.cached, recomputed=False, compiled=True),
        "best compiled": partial(steps.reference, best=True, recomputed=False, compiled=True),
    }[form]()
    reference = steps.reference(best=False, recomputed=True)
    wanted, got = gradients(reference), gradients(ours)
    assert ours.loss == pytest.approx(reference.loss, rel=1e-5) and ours.norm == pytest.approx(reference.norm, rel=1e-5)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_reference_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    row = padded(torch.tensor([3, 1, 4, 1, 5]), pad_to=16)
    reference = object.__new__(LSPReference)
    reference.alpha, reference.temperature = 0.3, 2.0
    student, teacher = torch.randn(2, 1, 16, 7, dtype=torch.float64)
    got = reference.loss(student, teacher, row)
    wanted = 0.0
    for place in range(11, 15):  # the tokens behind the padding that predict
        q, p = torch.softmax(student[0, place] / 2.0, 0), torch.softmax(teacher[0, place] / 2.0, 0)
        hard = -torch.log_softmax(student[0, place], 0)[row.input_ids[0, place + 1]]
        wanted += (0.7 * hard - 0.3 * 4.0 * (p * q.log()).sum()) / 4
    assert float(got) == pytest.approx(float(wanted), rel=1e-6)


def test_padding_is_on_the_left_and_only_where_it_is_needed():
    row = padded(torch.arange(1, 6), pad_to=4)
    assert row.input_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]] and row.attention_mask.sum() == 5
    assert row.kept.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert padded(torch.arange(4), pad_to=4).attention_mask is None


def test_nobody_changes_the_weights(steps):
    before = [parameter.clone() for parameter in steps.shared.student.parameters()]
    for step in (steps.reference(best=True, recomputed=False), steps.online(recomputed=False)):
        step.work()
    assert all(torch.equal(a, b) for a, b in zip(before, steps.shared.student.parameters(), strict=True))
    assert not [p for p in steps.shared.student.parameters() if p.grad is not None]


def test_operations_are_those_that_torch_counts(steps):
    """Of the reference, but for the masked pairs that SDPA's count holds."""
    step = steps.reference(best=True, recomputed=False)
    step.work()
    with FlopCounterMode(display=False) as counter:
        step.work()
    assert steps.flops(teacher=True) == pytest.approx(counter.get_total_flops(), rel=0.06)
    assert 0.6 < steps.flops(teacher=False) / steps.flops(teacher=True) < 0.9


@pytest.mark.parametrize(
    "best,recomputed,compiled",
    [(False, True, False), (True, False, False), pytest.param(True, False, True, marks=pytest.mark.slow)],
)
def test_the_references_memory_is_predicted(shared, tmp_path, best, recomputed, compiled):
    pair, how = CPU_PAIRS[0], dict(best=best, recomputed=recomputed)
    step = PairSteps(pair, 1.0, shared, tmp_path).reference(**how)
    if compiled:  # in such a way that it can be seen
        step.reference.layers = CompiledLayers([shared.student, shared.teacher], fused)
    step.work()
    peak, milliseconds = planned_reference(pair, 1.0, CPU, target="cpu", compiled=compiled, **how)
    assert peak == pytest.approx(step.peak_bytes(), rel=0.1) and milliseconds > 0


@pytest.mark.parametrize("name,form", [(suite.ONLINE, {}), (suite.LEAN, dict(lean=True)), (suite.CACHED, None)])
def test_our_memory_is_predicted(shared, tmp_path, name, form):
    pair, recomputed = CPU_PAIRS[0], name == suite.LEAN
    steps = PairSteps(pair, 1.0, shared, tmp_path)
    step = steps.cached(recomputed=False) if form is None else steps.online(recomputed=recomputed, **form)
    step.work()
    peak, _ = planned_ours(pair, ours_forms(pair, 1.0)[name], CPU, target="cpu")
    assert peak == pytest.approx(step.peak_bytes(), rel=0.1)


@pytest.mark.slow
def test_compiled_steps_are_predicted_to_take_less_memory_and_time():
    pair, gpu = GPU_PAIRS[1], known("H200")
    found = predictions(pair, 0.5, gpu)
    for name in ("LSP reference, best settings", "ours, teacher cached"):
        (plain, slow), (compiled, fast) = found[name](), found[name + COMPILED]()
        assert compiled < 0.97 * plain and fast < 0.9 * slow, name


def test_full_length_by_ours_is_predicted_to_hold_less_than_the_reference_at_one_half():
    pair, gpu = GPU_PAIRS[0], known("H200")
    half, _ = predictions(pair, 0.5, gpu)["LSP reference"]()
    whole, _ = predictions(pair, 1.0, gpu)["ours, teacher online, lean"]()
    assert whole < half


def test_branches_and_separate_sequences_take_one_step(tmp_path):
    branches = Branches("small student", 32, 4, 6, num_traces=2, prompt_length=5)
    shared = Shared(branches.model, None, "cpu")
    with torch.no_grad():
        for parameter in shared.teacher.parameters():
            parameter.mul_(1.5)  # or it would be the student
    made = BranchSteps(branches, shared, tmp_path)
    wanted, got = (made.ours(form, recomputed=False) for form in ("separate", "branches"))
    found = gradients(got)
    for name, gradient in gradients(wanted).items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
    assert got.loss == pytest.approx(wanted.loss, rel=1e-4) and got.num_tokens < wanted.num_tokens
    assert made.flops("branches") < made.flops("separate")


class FakeStep:
    """A step of a given loss that fits, or does not."""

    num_tokens, quartiles, milliseconds = 3, (1.0, 1.0), 1.0

    def __init__(self, loss, *, recomputed, fits=True):
        self.loss, self.norm, self.fits, self.recomputed, self.seconds = loss, 1.0, fits, recomputed, []
        self.gradient = torch.ones(3)

    def peak_bytes(self):
        if self.fits is False or (self.fits == "recomputed" and not self.recomputed):
            raise torch.OutOfMemoryError
        return 7

    def once(self):
        self.seconds.append(1.0)

    def clean_up(self):
        self.cleaned = True


class FakeBenchmark:
    def pedantic(self, work, *, setup, rounds):
        for _ in range(rounds):
            setup()
            work()


def broken(**_):
    raise RuntimeError("no kernel")


def unavailable(**_):
    raise NotMeasured("no such GPU")


def test_contenders_fall_back_are_refused_or_left_out_each_by_itself():
    either = (False, True)
    makers = {
        "reference": (partial(FakeStep, 2.0), either),
        "same": (partial(FakeStep, 2.0001, fits="recomputed"), either),
        "another loss": (partial(FakeStep, 2.1), either),
        "half": (partial(FakeStep, 9.0), either),
        "too large": (partial(FakeStep, 2.0, fits=False), either),
        "missing": (unavailable, either),
        "broken": (broken, either),
    }
    fields = dict(zip(makers, in_turn(FakeBenchmark(), makers, 3, apart="half", deadline=Deadline()), strict=True))
    assert fields["reference"]["recomputed"] is False and fields["same"]["recomputed"] is True
    assert fields["same"]["rounds"] == fields["half"]["rounds"] == 3
    assert fields["another loss"]["outcome"] == "refused, its loss is 2.1, and 2 was expected"
    assert fields["too large"]["outcome"] == "out of memory"
    assert fields["missing"]["outcome"] == "not measured: no such GPU"
    assert fields["broken"]["outcome"] == "failed: RuntimeError: 'no kernel'"


def test_what_nothing_can_be_held_against_is_not_timed():
    makers = {"reference": (partial(FakeStep, 2.0, fits=False), (True,)), "ours": (partial(FakeStep, 2.0), (True,))}
    _, ours = in_turn(FakeBenchmark(), makers, 2, apart="", deadline=Deadline())
    assert ours == {"outcome": "refused, there is nothing to hold it against"}


@pytest.mark.parametrize("change", [dict(divergence="reverse_kl"), dict(temperature=1.1), dict(alpha=0.52)], ids=str)
def test_a_step_of_another_objective_is_refused(steps, change):
    reference = steps.reference(best=True, recomputed=False)
    ours = steps.online(recomputed=False)
    ours.loop.student.objective.distill = FusedLinearDistillation(**(dict(alpha=0.5) | change))
    for step in (reference, ours):
        step.work()
    assert check(ours, reference, torch.float32).startswith("refused")
    again = steps.online(recomputed=False)
    again.work()
    assert check(again, reference, torch.float32) == ""


def test_without_the_reference_there_are_times_and_no_ratios():
    makers = {"reference": (partial(FakeStep, 2.0, fits=False), (True,))}
    makers |= {name: (partial(FakeStep, 2.0), (True,)) for name in ("ours", "also ours")}
    reference, ours, _ = in_turn(FakeBenchmark(), makers, 2, apart="", deadline=Deadline())
    assert reference == {"outcome": "out of memory"}
    assert ours["milliseconds"] == 1.0 and ours["reference_milliseconds"] is None


class Tiring(FakeStep):
    """A step that goes well so often, and then raises."""

    def __init__(self, loss, *, recomputed, often, error):
        super().__init__(loss, recomputed=recomputed)
        self.often, self.error = often, error

    def once(self):
        if self.often == 0:
            raise self.error
        self.often -= 1
        super().once()


@pytest.mark.parametrize("name", ["reference", "ours"])
def test_who_finds_no_memory_beside_the_others_leaves_them(name):
    makers = {each: (partial(FakeStep, 2.0), (True,)) for each in ("reference", "ours", "another")}
    makers[name] = (partial(Tiring, 2.0, often=2, error=torch.OutOfMemoryError()), (True,))
    fields = dict(zip(makers, in_turn(FakeBenchmark(), makers, 3, apart="", deadline=Deadline()), strict=True))
    assert fields.pop(name) == {"outcome": "out of memory beside the other contenders"}
    assert [each["rounds"] for each in fields.values()] == [3, 3]


def test_an_interrupt_ends_the_rounds_and_what_follows_and_loses_nothing():
    makers = {name: (partial(FakeStep, 2.0), (True,)) for name in ("reference", "ours")}
    makers["slow"] = (partial(Tiring, 2.0, often=2, error=KeyboardInterrupt()), (True,))
    deadline = Deadline()
    fields = in_turn(FakeBenchmark(), makers, 5, apart="", deadline=deadline)
    assert [each["rounds"] for each in fields] == [1, 2, 1] and deadline()
    assert all(
        each == {"outcome": "not measured: TRSD_BENCH_SECONDS have passed"}
        for each in in_turn(FakeBenchmark(), makers, 5, apart="", deadline=deadline)
    )


def test_an_interrupt_before_any_round_leaves_those_that_had_run():
    makers = {name: (partial(FakeStep, 2.0), (True,)) for name in ("reference", "ours", "late")}
    makers["slow"] = (partial(Tiring, 2.0, often=0, error=KeyboardInterrupt()), (True,))
    fields = dict(zip(makers, in_turn(FakeBenchmark(), makers, 5, apart="", deadline=Deadline()), strict=True))
    assert fields["slow"] == {"outcome": "not measured: interrupted"}
    assert fields["late"]["rounds"] == 1


def test_little_time_is_for_fewer_rounds():
    makers = {name: (partial(FakeStep, 2.0), (True,)) for name in ("reference", "ours")}  # a second each
    for seconds, rounds in ((7.9, 3), (100.0, 5), (1.0, 2)):
        deadline = Deadline(seconds)
        found = in_turn(FakeBenchmark(), makers, 5, apart="", deadline=deadline)
        assert [each["rounds"] for each in found] == [rounds, rounds], seconds


@pytest.mark.parametrize("gib, first, branches", [(139, 0, "Qwen3-4B"), (79, 1, "Qwen3-1.7B"), (8, 0, "Qwen3-1.7B")])
def test_pairs_whose_models_leave_no_room_are_left_out(gib, first, branches, monkeypatch):
    memory = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    pairs, found = those_that_fit(GPU_PAIRS, GPU_BRANCHES)
    assert pairs == GPU_PAIRS[first:] and [each.model for each in found] == [branches]


def test_a_plan_is_put_into_the_line_that_it_is_of(monkeypatch, tmp_path, shared):
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    results = Results("training", "steps")
    about = dict(method="lsp", student=PAIR.student, teacher=PAIR.teacher, fraction=0.5, group=PAIR.group(0.5))
    results.add(TrainingLine(contender=suite.ONLINE, recomputed=True, peak_bytes=5, **about))
    results.add(TrainingLine(contender=suite.LEAN, outcome="out of memory", **about))
    suite.test_a_plan_is_within_ten_percent(PAIR, 0.5, suite.ONLINE, CPU, None, results, Deadline())
    (stored, _) = json.loads(results.path.read_text())["suites"]["training"]["lines"]
    recipe = replace(ours_forms(PAIR, 0.5)[suite.ONLINE], gradient_checkpointing=True)
    wanted, _ = planned_ours(PAIR, recipe, CPU, target="cpu")
    assert stored["planned_bytes"] == results.lines[0].planned_bytes == wanted and stored["peak_bytes"] == 5
    for name, deadline in ((suite.LEAN, Deadline()), (suite.ONLINE, Deadline(0.0))):
        with pytest.raises(pytest.skip.Exception):
            suite.test_a_plan_is_within_ten_percent(PAIR, 0.5, name, CPU, None, results, deadline)


def test_targets_are_told_apart():
    names = [target.name for target in suite.targets()]
    assert len(set(names)) == len(names) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--gpu", "H300"], "known are H200"), (["--fractions", "0.5,2"], "'2'"), (["--fractions", "half"], "'half'")],
)
def test_predictions_of_nothing_known_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        predict.main(words)
    assert exit_.value.code == 2 and said in capsys.readouterr().err
