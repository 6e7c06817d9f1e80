"""A plan as text: memory by part, operations and least time by family, disk, and what to turn."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trsd.ceilings import Ceilings
from trsd.errors import InputError
from trsd.recipe import Recipe
from trsd.step_simulation import ACTIVATION_PARTS, StepCost

GIB = 2**30
# What a GPU holds that no tensor shows: the context with its libraries, and pieces that fit nothing.
CONTEXT_BYTES, FRAGMENTS = 2**30, 0.03


@dataclass(kw_only=True)
class Plan:
    """What a recipe would take on a device."""

    recipe: Recipe
    ceilings: Ceilings
    source: str
    """Where the ceilings are from."""
    gpus: int
    num_traces: int
    lengths: tuple[int, int, int]
    """Tokens of prompt, reasoning and answer of a trace."""
    cost: StepCost
    cache_bytes_per_trace: float
    alternatives: list[tuple[dict[str, Any], StepCost | InputError]] = field(default_factory=list)
    """Other values, and what the recipe would take with them, or why that cannot be said."""

    def try_change(self, change: dict[str, Any], cost_of: Callable[[Recipe], StepCost]) -> None:
        """Add what the recipe would take with other values, where they make a recipe."""
        other = replace(self.recipe, **change)
        if other.problems():
            return
        try:
            self.alternatives.append((change, cost_of(other)))
        except InputError as error:
            self.alternatives.append((change, error))

    def held(self, cost: StepCost) -> dict[str, float]:
        """Bytes by part on one GPU; what training shards is shared, and a layer and a head are gathered for use."""
        if self.gpus == 1:
            return dict(cost.held)
        found = {name: size if name in ACTIVATION_PARTS else size / self.gpus for name, size in cost.held.items()}
        return found | {"gathered: two layers, a head": 2.0 * cost.largest_layer_bytes + cost.head_bytes}

    def needed(self, cost: StepCost) -> float:
        """Bytes one device must have."""
        peak = sum(self.held(cost).values())
        return peak if self.ceilings.name == "CPU" else (1 + FRAGMENTS) * peak + CONTEXT_BYTES

    def fits(self, cost: StepCost) -> bool | None:
        """Whether the device has enough; None where its memory is not known."""
        return None if self.ceilings.memory is None else self.needed(cost) <= self.ceilings.memory


def report(plan: Plan) -> str:
    """The whole plan."""
    return "\n\n".join([_headline(plan), _memory(plan), _time(plan), _disk(plan), _advice(plan)])


def _headline(plan: Plan) -> str:
    recipe, cost, device = plan.recipe, plan.cost, plan.ceilings
    teacher = recipe.teacher_model_name_or_path or "itself"
    learns = f" from {teacher} ({recipe.teacher})" if recipe.alpha else ""
    memory = "" if device.memory is None else f" of {device.memory / GIB:.1f} GiB"
    prompt, reasoning, answer = plan.lengths
    each = " of each GPU" if plan.gpus > 1 else ""
    rows = f"{_counted(cost.num_rows, 'row')} of at most {recipe.max_tokens_per_batch:,}"
    return (
        f"{recipe.method}: {recipe.model_name_or_path}{learns}, {plan.gpus} x {device.name}{memory}\n"
        f"a step{each}: {_counted(recipe.train_batch_size, 'trace')} of {prompt} + {reasoning} + {answer} tokens "
        "(prompt, reasoning, answer)"
        f"\n        {cost.num_tokens:,} tokens run and {cost.supervised_tokens:,} are learnt, in {rows}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count > 1 else "")


def _memory(plan: Plan) -> str:
    rows = [(name, size) for name, size in plan.held(plan.cost).items() if size]
    rows.append(("peak of live tensors", sum(size for _, size in rows)))
    unit, scale = ("GiB", GIB) if rows[-1][1] >= GIB else ("MiB", 2**20)
    rows = [(name, size / scale) for name, size in rows]
    needed, fits = plan.needed(plan.cost) / GIB, plan.fits(plan.cost)
    text = _table("memory of one device at its fullest", unit, rows, digits=2)
    if fits is None:
        return text
    memory = plan.ceilings.memory / GIB
    spare = memory - needed
    said = f"it fits, {spare:.1f} GiB are left" if fits else f"IT DOES NOT FIT: {-spare:.1f} GiB are missing"
    beside = "" if plan.ceilings.name == "CPU" else ", the context and fragments included"
    sharded = f"\nas FSDP2 shards it: torchrun --nproc_per_node {plan.gpus} -m trsd.train" if plan.gpus > 1 else ""
    return f"{text}\n{needed:.1f} GiB are needed{beside}: {said}{sharded}"


def _time(plan: Plan) -> str:
    cost, device = plan.cost, plan.ceilings
    lines = [f"{'a step, by what takes the time':<50}{'TFLOP':>10}{'s at least':>12}"]
    for name, seconds in sorted(cost.seconds.items(), key=lambda item: -item[1]):
        if seconds:
            lines.append(f"  {name:<48}{cost.flops.get(name, 0) / 1e12:>10.2f}{seconds:>12.3f}")
    flops, seconds = sum(cost.flops.values()), sum(cost.seconds.values())
    lines.append(f"  {'together':<48}{flops / 1e12:>10.2f}{seconds:>12.3f}")
    rate = f"{device.products / 1e12:.4g} TFLOP/s and {device.copies / 1e12:.3g} TB/s"
    lines.append(f"no step is faster: each operation by itself, at {rate}")
    lines.append(f"({device.name}, {plan.source})")
    per_epoch = seconds * plan.num_traces / cost.num_traces / plan.gpus
    lines.append(f"an epoch of {plan.num_traces:,} traces: at least {_duration(per_epoch)}")
    return "\n".join(lines)


def _disk(plan: Plan) -> str:
    if not plan.cache_bytes_per_trace:
        return "teacher targets on disk: none"
    size = plan.cache_bytes_per_trace * plan.num_traces / GIB
    return f"teacher targets on disk: {size:.2f} GiB for {plan.num_traces:,} traces ({plan.recipe.teacher})"


def _advice(plan: Plan) -> str:
    lines = [f"{'GiB needed':>10}{'s at least':>12}  fits  with"]
    for change, cost in [({}, plan.cost), *plan.alternatives]:
        name = " ".join(f"--{key} {value}" for key, value in change.items()) or "the recipe as it is"
        if isinstance(cost, InputError):
            lines.append(f"{'?':>10}{'?':>12}  ?     {name} ({cost})")
            continue
        fits = {True: "yes", False: "no", None: "?"}[plan.fits(cost)]
        lines.append(f"{plan.needed(cost) / GIB:>10.2f}{sum(cost.seconds.values()):>12.3f}  {fits:<4}  {name}")
    return "\n".join(lines)


def _table(title: str, unit: str, rows: list[tuple[str, float]], *, digits: int) -> str:
    lines = [f"{title:<64}{unit:>10}"]
    return "\n".join(lines + [f"  {name:<62}{value:>10.{digits}f}" for name, value in rows])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
