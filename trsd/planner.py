"""What a recipe would take on a device, and what its settings would change: the work of ``trsd.plan``."""

from dataclasses import replace

import torch

from trsd.ceilings import Ceilings, known, known_device, measure
from trsd.errors import InputError
from trsd.plan import PlanArguments
from trsd.plan_report import Plan
from trsd.planning import alternatives, cache_bytes_per_trace, placement_of, planned_traces, step_cost, together
from trsd.recipe import Recipe

DEFAULT_GPU = "H100"


def ceilings_of(arguments: PlanArguments, *, bundled: bool) -> tuple[Ceilings, str]:
    """(what the device can do, where that is from); a ``bundled`` model is for a CPU where there is no GPU."""
    nothing_said = arguments.gpu is None and arguments.gpu_memory is None
    if arguments.gpu == "cpu" or (bundled and nothing_said and not torch.cuda.is_available()):
        found, source = measure("cpu"), "measured here"
    elif arguments.gpu is None and torch.cuda.is_available():
        there = known_device("cuda")  # a GPU that others work on has no room to be measured
        found, source = (there, "as known by its name") if there else (measure("cuda"), "measured here")
    else:
        found = known(arguments.gpu or DEFAULT_GPU)
        source = "measured on one" if found.measured else "three quarters of what its maker states"
        source += "" if arguments.gpu else "; --gpu names another"
    if arguments.gpu_memory is not None:
        found = replace(found, memory=arguments.gpu_memory * 2**30)
    return found, source


def run(arguments: PlanArguments, recipe: Recipe) -> Plan:
    """Plan a recipe. Raises InputError for models, devices and lengths that cannot be had."""
    lengths = arguments.lengths(recipe.max_length)
    if sum(lengths) > recipe.max_length:
        raise InputError(
            f"prompt, reasoning and answer of {lengths[0]} + {lengths[1]} + {lengths[2]} tokens are longer than "
            f"max_length {recipe.max_length}: raise it, or shorten them"
        )
    ceilings, source = ceilings_of(arguments, bundled=recipe.model_name_or_path.startswith("bundled:"))
    target = "cpu" if ceilings.name == "CPU" else "cuda"
    recipe = placement_of(recipe, target=target).recipe
    traces = planned_traces(recipe.train_batch_size, lengths)
    plan = Plan(
        recipe=recipe,
        ceilings=ceilings,
        source=source,
        gpus=arguments.gpus,
        num_traces=arguments.num_traces,
        lengths=lengths,
        cost=step_cost(recipe, traces, ceilings, target=target),
        cache_bytes_per_trace=cache_bytes_per_trace(recipe, traces, target=target),
    )
    changes = alternatives(recipe, target=target)
    for change in changes:
        plan.try_change(change, lambda other: step_cost(other, traces, ceilings, target=target))
    for change in together(changes) if plan.fits(plan.cost) is False else ():
        plan.try_change(change, lambda other: step_cost(other, traces, ceilings, target=target))
    return plan
