"""Whole training steps: ours in its forms against the LSP reference, over fractions; branches against separate cuts.

On a GPU with random weights of Qwen3's shapes, fp32 weights and bf16 compute, the paper's lengths; on a CPU a small
pair in fp32. The contenders of a group run in turn on the same models (``training.py``). Before any is timed, its loss
and gradient norm are held against the others': the reference's, less the teacher's entropy, which its soft term holds.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from bench.lines import TrainingLine
from bench.measure import NotMeasured, forget, timed_fields
from bench.predict import COMPILED, ours_forms, planned_ours, planned_reference
from bench.training import GRADIENT_TOLERANCE, TOLERANCE, BranchSteps, PairSteps, Shared, TrainingStep
from bench.training_settings import CPU_BRANCHES, CPU_PAIRS, GPU_BRANCHES, GPU_PAIRS, Branches, Pair
from trsd.ceilings import Ceilings, known_device, measure
from trsd.models import quieten_transformers

SUITE = ("training", "whole training steps: teacher, student, loss, backward, optimizer")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PAIRS, BRANCHES = (GPU_PAIRS, GPU_BRANCHES) if ON_GPU else (CPU_PAIRS, CPU_BRANCHES)
REFERENCE, BEST, HALF = "LSP reference", "LSP reference, best settings", "LSP reference on the leading half"
ONLINE, LEAN, FP8 = "ours, teacher online", "ours, teacher online, lean", "ours, teacher in fp8"
CACHED = "ours, teacher cached"
COMPILED_BEST, COMPILED_ONLINE, COMPILED_FP8, COMPILED_CACHED = (n + COMPILED for n in (BEST, ONLINE, FP8, CACHED))
SHARED, SEPARATE, WHOLE = "ours, branches", "ours, separate packed sequences", "ours, one full-length branch"
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


def ready(make: Callable[..., TrainingStep], choices: Sequence[bool]) -> tuple[TrainingStep | None, dict[str, Any]]:
    """(a step that fits, the fields that are known of it): without recomputing activations if that is a choice."""
    for recomputed in choices:
        step = None
        try:
            step = make(recomputed=recomputed)
            peak = step.peak_bytes()
            step.once()  # warmed up
            step.seconds.clear()
            return step, dict(peak_bytes=peak, num_tokens=step.num_tokens, loss_value=step.loss, recomputed=recomputed)
        except NotMeasured as error:
            return None, dict(outcome=f"not measured: {error}")
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        except Exception as error:  # one contender's fault is not the others'
            outcome = f"failed: {type(error).__name__}: {str(error)[:80]!r}"
            traceback.clear_frames(error.__traceback__)
        if step is not None:
            step.clean_up()  # gradients of a backward that was cut short
        del step
        forget()
        if outcome != "out of memory":
            break
    return None, dict(outcome=outcome)


def check(step: TrainingStep, wanted: TrainingStep, dtype: torch.dtype) -> str:
    """Why a step is refused: another loss or gradient than the one that is wanted; empty when it is the same."""
    for what, got, right in (("loss", step.loss, wanted.loss), ("gradient norm", step.norm, wanted.norm)):
        if not abs(got - right) <= TOLERANCE[dtype] * abs(right):
            return f"refused, its {what} is {got:.6g}, and {right:.6g} was expected"
    error = float((step.gradient - wanted.gradient).norm() / wanted.gradient.norm())
    return "" if error <= GRADIENT_TOLERANCE[dtype] else f"refused, its gradient is {error:.1e} off what was expected"


def in_turn(
    benchmark: Callable, makers: dict[str, tuple[Callable, Sequence[bool]]], rounds: int, *, apart: str
) -> list[dict[str, Any]]:
    """The fields of every contender's line; the first is the reference, and all but ``apart`` must agree with it."""
    steps: dict[str, TrainingStep] = {}
    fields: dict[str, dict[str, Any]] = {}
    expected, compared = None, 0
    for name, (make, choices) in makers.items():
        step, fields[name] = ready(make, choices)
        if step is not None and name != apart:
            expected = expected or step
            compared += step is not expected
            if refused := check(step, expected, torch.bfloat16 if ON_GPU else torch.float32):
                step, fields[name] = None, dict(outcome=refused)
        if step is not None:
            steps[name] = step
    if steps and not compared:
        fields |= {name: dict(outcome="refused, there is nothing to hold it against") for name in steps}
        steps = {}
    if not steps:
        return list(fields.values())
    first, *others = steps.values()

    def run_others() -> None:
        for step in others:
            step.once()

    benchmark.pedantic(first.once, setup=run_others, rounds=rounds)
    reference = next(iter(makers))
    for name, step in steps.items():
        fields[name] |= timed_fields(step, steps.get(reference, step))
        fields[name]["reference_peak_bytes"] = fields[reference].get("peak_bytes")
        if reference not in steps:
            fields[name] |= dict(reference_milliseconds=None, reference_quartiles=None)
    return list(fields.values())


def ceiling_tflops(ceilings: Ceilings) -> float:
    entry = known_device(DEVICE)
    return (entry.stated_products if entry else ceilings.products) / 1e12


def measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, tmp_path):
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
        fields = in_turn(benchmark, makers, ROUNDS if keep_fraction in PLANNED else 3, apart=HALF)
        for name, each in zip(makers, fields, strict=True):
            runs = name not in (CACHED, COMPILED_CACHED)
            each |= dict(flops=steps.flops(teacher=runs), ceiling_tflops=ceiling_tflops(ceilings))
            if name == HALF:
                each["flops"] = PairSteps(pair, 0.5, shared(), tmp_path).flops(teacher=True)
            elif is_planned(name, keep_fraction) and "recomputed" in each:
                each |= planned(pair, keep_fraction, name, ceilings, recomputed=each["recomputed"])
        return fields

    names = [REFERENCE, BEST, ONLINE, LEAN, FP8, CACHED]
    if keep_fraction in PLANNED:
        names += [COMPILED_BEST, COMPILED_ONLINE, COMPILED_CACHED, COMPILED_FP8]
    names += [HALF] * (keep_fraction == 1.0)
    about = dict(method="lsp", student=pair.student, teacher=pair.teacher, fraction=keep_fraction)
    line = partial(TrainingLine, group=pair.group(keep_fraction), **about)
    record([partial(line, contender=name) for name in names], measured)


def is_planned(name: str, keep_fraction: float) -> bool:
    """Whether its step is predicted; on a GPU, where time is short, no more than a target asks for."""
    if not ON_GPU:
        return keep_fraction in PLANNED
    return keep_fraction == PLANNED[-1] and (COMPILED not in name or name == COMPILED_CACHED)


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
def test_fractions_of_the_targets(shared, pair, keep_fraction, ceilings, benchmark, record, tmp_path):
    measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, tmp_path)


def planned(pair: Pair, keep_fraction: float, name: str, ceilings: Ceilings, *, recomputed: bool) -> dict[str, Any]:
    """What was predicted of a contender."""
    if name in (REFERENCE, BEST, COMPILED_BEST):
        how = dict(target=DEVICE, best=name != REFERENCE, compiled=name == COMPILED_BEST, recomputed=recomputed)
        peak, milliseconds = planned_reference(pair, keep_fraction, ceilings, **how)
    else:
        recipe = replace(ours_forms(pair, keep_fraction)[name], gradient_checkpointing=recomputed)
        peak, milliseconds = planned_ours(pair, recipe, ceilings, target=DEVICE)
    return dict(planned_bytes=peak, planned_milliseconds=milliseconds)


@unused_is_fine
@pytest.mark.parametrize(
    "shared,branches", [pytest.param(each, each, id=each.name) for each in BRANCHES], indirect=["shared"]
)
def test_branches(shared, branches: Branches, ceilings, benchmark, record, tmp_path):
    benchmark.group = branches.name

    def measured() -> list[dict[str, Any]]:
        steps = BranchSteps(branches, shared(), tmp_path)
        forms = {SHARED: "branches", WHOLE: "whole", SEPARATE: "separate"}
        makers = {name: (partial(steps.ours, form), (False, True)) for name, form in forms.items()}
        fields = in_turn(benchmark, makers, ROUNDS, apart=WHOLE)
        for (name, form), each in zip(forms.items(), fields, strict=True):
            each |= dict(flops=steps.flops(form), ceiling_tflops=ceiling_tflops(ceilings))
            each |= dict(branches=1 if name == WHOLE else branches.num_cuts)
        return fields

    about = dict(method="trsd", student=branches.model, teacher=branches.model, fraction=1.0)
    names = (SHARED, WHOLE, SEPARATE)
    record([partial(TrainingLine, group=branches.name, contender=name, **about) for name in names], measured)


@unused_is_fine
@fractions(lambda pair, keep_fraction: not is_first(pair, keep_fraction))
def test_other_fractions(shared, pair, keep_fraction, ceilings, benchmark, record, tmp_path):
    measure_fraction(shared, pair, keep_fraction, ceilings, benchmark, record, tmp_path)


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
    """Of the first pair, and of branches."""
    half, whole = (GPU_PAIRS[0].group(f) for f in (0.5, 1.0))
    branches = GPU_BRANCHES[0].name
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
    found = [results.find(group=GPU_PAIRS[0].group(1.0), contender=name) for name in (CACHED, COMPILED_CACHED)]
    reached = [line.mfu for line in found if line]
    if not reached:
        pytest.fail("the student's step was not measured")
    assert max(reached) >= MFU, f"model FLOPs utilisation {max(reached):.2f}\n{results.table()}"


@needs_gpu
@unused_is_fine
def test_plans_are_within_ten_percent(benchmark, results):
    planned = [line for line in results.lines if getattr(line, "planned_bytes", None)]
    off = {f"{line.group}, {line.contender}": line.planned_bytes / line.peak_bytes for line in planned}
    assert off and all(0.9 <= ratio <= 1.1 for ratio in off.values()), off
