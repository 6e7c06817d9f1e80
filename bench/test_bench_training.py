"""Whole training steps: ours in its forms against the LSP reference, over fractions; branches against separate cuts.

On a GPU with random weights of Qwen3's shapes, fp32 weights and bf16 compute, the paper's lengths; on a CPU a small
pair in fp32. The contenders of a group run in turn on the same models (``training.py``). Before any is timed, its loss
and gradient norm are held against the others': the reference's, less the teacher's entropy, which its soft term holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from bench.contest import in_turn
from bench.deadline import TIME_IS_UP, Deadline
from bench.lines import TrainingLine
from bench.measure import NotMeasured, forget
from bench.predict import COMPILED, ours_forms, planned_ours, planned_reference
from bench.training import BranchSteps, PairSteps, Shared, TrainingStep
from bench.training_settings import CPU_BRANCHES, CPU_PAIRS, GPU_BRANCHES, GPU_PAIRS, Branches, Pair, those_that_fit
from trsd.ceilings import Ceilings, known_device, measure
from trsd.models import quieten_transformers

SUITE = ("training", "whole training steps: teacher, student, loss, backward, optimizer")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PAIRS, BRANCHES = those_that_fit(GPU_PAIRS, GPU_BRANCHES) if ON_GPU else (CPU_PAIRS, CPU_BRANCHES)
REFERENCE, BEST, HALF = "LSP reference", "LSP reference, best settings", "LSP reference on the leading half"
ONLINE, LEAN, FP8 = "ours, teacher online", "ours, teacher online, lean", "ours, teacher in fp8"
CACHED = "ours, teacher cached"
COMPILED_BEST, COMPILED_ONLINE, COMPILED_FP8, COMPILED_CACHED = (n + COMPILED for n in (BEST, ONLINE, FP8, CACHED))
SHARED, SEPARATE, WHOLE = "ours, branches", "ours, separate packed sequences", "ours, one full-length branch"
TARGET_PAIR = PAIRS[0] if ON_GPU else GPU_PAIRS[0]
PLANNED = (0.5, 1.0)  # fractions whose prediction is held against the measurement
ROUNDS = 5
MFU = 0.45

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a target for a GPU, and there is no CUDA device")
unused_is_fine = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def name_of(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value.name


@pytest.fixture(scope="module")
def ceilings(one_thread: None) -> Ceilings:
    """Of the device; measured, for a prediction is for this one."""
    return measure(DEVICE)


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, one_thread: None) -> Iterator[Callable[[], Shared]]:
    """The models of the parameter's pair, built when they are asked for; those of the one before are freed first."""
    forget()
    quieten_transformers()
    built: list[Shared] = []
    too_large: list[bool] = []

    def get() -> Shared:
        if too_large:
            raise torch.OutOfMemoryError("the models do not fit")
        if not built:
            setting = request.param
            too_large.append(True)  # until they are there
            names = (setting.student, setting.teacher) if isinstance(setting, Pair) else (setting.model, None)
            built.append(Shared(*names, DEVICE))
            too_large.clear()
        return built[0]

    yield get
    built.clear()
    forget()


def ceiling_tflops(ceilings: Ceilings) -> float:
    entry = known_device(DEVICE)
    return (entry.stated_products if entry else ceilings.products) / 1e12


def measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, deadline, tmp_path):
    """All contenders of a pair at one fraction."""
    benchmark.group = pair.group(keep_fraction)

    def measured() -> list[dict[str, Any]]:
        steps = PairSteps(pair, keep_fraction, shared(), tmp_path)
        either = (False, True)
        makers = {
            REFERENCE: (partial(steps.reference, best=False), (True,)),
            BEST: (partial(steps.reference, best=True), either),
            ONLINE: (steps.online, either),
            LEAN: (partial(steps.online, lean=True), (True,)),
            FP8: (partial(steps.online, fp8=True) if keep_fraction in PLANNED else too_many, either),
            CACHED: (steps.cached, either),
            **compiled_makers(steps, keep_fraction),
        }
        if keep_fraction == 1.0:
            makers[HALF] = (partial(steps.reference, best=False, keep_fraction=0.5), (True,))
        if keep_fraction not in PLANNED:
            shared().forget_fp8()
        rounds = ROUNDS if keep_fraction in PLANNED else 3
        fields = in_turn(benchmark, makers, rounds, apart=HALF, deadline=deadline, dtype=DTYPE)
        for name, each in zip(makers, fields, strict=True):
            runs = name not in (CACHED, COMPILED_CACHED)
            each |= dict(flops=steps.flops(teacher=runs), ceiling_tflops=ceiling_tflops(ceilings))
            if name == HALF:
                each["flops"] = PairSteps(pair, 0.5, shared(), tmp_path).flops(teacher=True)
        return fields

    about = dict(method="lsp", student=pair.student, teacher=pair.teacher, fraction=keep_fraction)
    line = partial(TrainingLine, group=pair.group(keep_fraction), **about)
    record([partial(line, contender=name) for name in contenders(keep_fraction)], measured)


def contenders(keep_fraction: float) -> list[str]:
    """At a fraction, in the order of their lines."""
    names = [REFERENCE, BEST, ONLINE, LEAN, FP8, CACHED]
    if keep_fraction in PLANNED:
        names += [COMPILED_BEST, COMPILED_ONLINE, COMPILED_CACHED, COMPILED_FP8]
    return names + [HALF] * (keep_fraction == 1.0)


def compiled_makers(steps: PairSteps, keep_fraction: float) -> dict[str, tuple[Callable, Sequence[bool]]]:
    """The contenders whose layers are compiled; not at every fraction, for the first of them compiles a while."""
    if keep_fraction not in PLANNED:
        return {}
    how, either = dict(compiled=True), (False, True)
    return {
        COMPILED_BEST: (partial(steps.reference, best=True, **how), either),
        COMPILED_ONLINE: (partial(steps.online, **how), either),
        COMPILED_CACHED: (partial(steps.cached, **how), either),
        COMPILED_FP8: (partial(steps.online, fp8=True, **how), either),
    }


def too_many(**_: Any) -> TrainingStep:
    """Not at every fraction: a second teacher in memory takes room from the others."""
    raise NotMeasured(f"at f = {' and '.join(map(str, PLANNED))} alone")


def fractions(wanted: Callable[[Pair, float], bool]) -> pytest.MarkDecorator:
    """The pairs and fractions that are wanted."""
    chosen = [(pair, f) for pair in PAIRS for f in pair.fractions if wanted(pair, f)]
    cases = [pytest.param(pair, pair, f, id=pair.group(f)) for pair, f in chosen]
    return pytest.mark.parametrize("shared,pair,keep_fraction", cases, indirect=["shared"])


def is_first(pair: Pair, keep_fraction: float) -> bool:
    """Whether a target needs it: it is measured before all others."""
    return pair == PAIRS[0] and keep_fraction in PLANNED


@unused_is_fine
@fractions(is_first)
def test_fractions_of_the_targets(shared, pair, keep_fraction, ceilings, benchmark, record, out_of_time, tmp_path):
    measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, out_of_time, tmp_path)


@unused_is_fine
@pytest.mark.parametrize(
    "shared,branches", [pytest.param(each, each, id=each.name) for each in BRANCHES], indirect=["shared"]
)
def test_branches(shared, branches: Branches, ceilings, benchmark, record, out_of_time, tmp_path):
    benchmark.group = branches.name

    def measured() -> list[dict[str, Any]]:
        steps = BranchSteps(branches, shared(), tmp_path)
        forms = {SHARED: "branches", WHOLE: "whole", SEPARATE: "separate"}
        makers = {name: (partial(steps.ours, form), (False, True)) for name, form in forms.items()}
        fields = in_turn(benchmark, makers, ROUNDS, apart=WHOLE, deadline=out_of_time, dtype=DTYPE)
        for (name, form), each in zip(forms.items(), fields, strict=True):
            each |= dict(flops=steps.flops(form), ceiling_tflops=ceiling_tflops(ceilings))
            each |= dict(branches=1 if name == WHOLE else branches.num_cuts)
        return fields

    about = dict(method="trsd", student=branches.model, teacher=branches.model, fraction=1.0)
    names = (SHARED, WHOLE, SEPARATE)
    record([partial(TrainingLine, group=branches.name, contender=name, **about) for name in names], measured)


@unused_is_fine
@fractions(lambda pair, keep_fraction: not is_first(pair, keep_fraction))
def test_other_fractions(shared, pair, keep_fraction, ceilings, benchmark, record, out_of_time, tmp_path):
    measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, out_of_time, tmp_path)


class Target(NamedTuple):
    """A line of ours takes at most ``limit`` times what another line of the same run takes.

    Where the other is the LSP reference, all of its settings count, the one that took less of each.
    """

    quantity: str
    """"time", "memory", or "both"."""
    limit: float
    group: str
    contenders: tuple[str, ...]
    """Any of them may reach it."""
    other_group: str
    other: str

    @property
    def name(self) -> str:
        ours, theirs = f"{self.contenders[0]} ({self.group})", f"{self.other} ({self.other_group})"
        return f"{self.quantity} of {ours} <= {self.limit:.2f} x {theirs}"

    def reached(self, line: TrainingLine, other: TrainingLine) -> float:
        """The multiple that was measured."""
        time, memory = line.milliseconds / other.milliseconds, line.peak_bytes / other.peak_bytes
        return {"time": time, "memory": memory, "both": max(time, memory)}[self.quantity]


def targets() -> list[Target]:
    """Of the first pair that fits, and of branches."""
    half, whole = (TARGET_PAIR.group(f) for f in (0.5, 1.0))
    branches = (BRANCHES if ON_GPU else GPU_BRANCHES)[0].name
    return [
        Target("both", 1.0, whole, (ONLINE, LEAN, COMPILED_ONLINE, COMPILED_CACHED), half, REFERENCE),
        Target("time", 0.5, half, (ONLINE, COMPILED_ONLINE), half, REFERENCE),
        Target("time", 0.35, half, (CACHED, COMPILED_CACHED), half, REFERENCE),
        Target("time", 1.4, branches, (SHARED,), branches, WHOLE),
        Target("time", 1 / 3, branches, (SHARED,), branches, SEPARATE),
    ]


@needs_gpu
@unused_is_fine
@pytest.mark.parametrize("target", targets(), ids=name_of)
def test_target(target, benchmark, results):
    lines = [line for name in target.contenders if (line := results.find(group=target.group, contender=name))]
    names = (REFERENCE, BEST, COMPILED_BEST) if target.other == REFERENCE else (target.other,)
    others = [line for name in names if (line := results.find(group=target.other_group, contender=name))]
    if not lines or not others:
        pytest.fail(f"{target.name}: not measured")
    reached = min(max(target.reached(line, other) for other in others) for line in lines)
    assert reached <= target.limit, f"{target.name}: reached {reached:.2f}\n{results.table()}"


@needs_gpu
@unused_is_fine
def test_the_students_step_keeps_the_gpu_busy(benchmark, results):
    found = [results.find(group=TARGET_PAIR.group(1.0), contender=name) for name in (CACHED, COMPILED_CACHED)]
    reached = [line.mfu for line in found if line]
    if not reached:
        pytest.fail("the student's step was not measured")
    assert max(reached) >= MFU, f"model FLOPs utilisation {max(reached):.2f}\n{results.table()}"


def is_planned(pair: Pair, keep_fraction: float, name: str) -> bool:
    """Whether its step is predicted; on a GPU, where time is short, no more than a target asks for."""
    if not ON_GPU:
        return name != HALF
    return (pair, keep_fraction) == (PAIRS[0], 1.0) and (COMPILED not in name or name == COMPILED_CACHED)


def planned(pair: Pair, keep_fraction: float, name: str, ceilings: Ceilings, *, recomputed: bool) -> dict[str, Any]:
    """What is predicted of a contender."""
    if name in (REFERENCE, BEST, COMPILED_BEST):
        how = dict(target=DEVICE, best=name != REFERENCE, compiled=name == COMPILED_BEST, recomputed=recomputed)
        peak, milliseconds = planned_reference(pair, keep_fraction, ceilings, **how)
    else:
        recipe = replace(ours_forms(pair, keep_fraction)[name], gradient_checkpointing=recomputed)
        peak, milliseconds = planned_ours(pair, recipe, ceilings, target=DEVICE)
    return dict(planned_bytes=peak, planned_milliseconds=milliseconds)


def plans() -> list[Any]:
    """The lines that plans are held against, as parameters."""
    chosen = [(pair, f, name) for pair in PAIRS for f in PLANNED for name in contenders(f)]
    return [pytest.param(*each, id=f"{each[0].group(each[1])}, {each[2]}") for each in chosen if is_planned(*each)]


@unused_is_fine
@pytest.mark.parametrize("pair,keep_fraction,name", plans())
def test_a_plan_is_within_ten_percent(
    pair, keep_fraction, name, ceilings, benchmark, results, out_of_time: Deadline
) -> None:
    """After everything else, for a plan takes seconds in which no GPU works."""
    line = results.find(group=pair.group(keep_fraction), contender=name)
    if line is None or out_of_time():
        pytest.skip("not measured" if line is None else TIME_IS_UP)
    line = results.amend(line, **planned(pair, keep_fraction, name, ceilings, recomputed=line.recomputed))
    assert not ON_GPU or 0.9 <= line.planned_bytes / line.peak_bytes <= 1.1
