"""What steps would take on a GPU that is not here: ``python -m bench.predict [--gpu H200] [--fractions 0.5,1.0]``.

Ours by ``trsd.step_simulation``, the LSP reference by the same means: run without content, every tensor counted, every
operation at the device's ceilings. Times are floors for kernels launched one by one; ``make gpu`` measures.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.lsp_reference import PAD_TO, LSPReference
from bench.record import GIB
from bench.training_settings import GPU_PAIRS, Pair, config_named
from trsd.ceilings import Ceilings, known
from trsd.fused_meter import fused
from trsd.loop_meter import LoopMeter
from trsd.methods.lsp import LSP, SECTIONS
from trsd.optim import build_optimizer
from trsd.planned_lengths import shared_lengths
from trsd.planning import planned_traces
from trsd.recipe import Recipe
from trsd.recomputation import recompute_activations
from trsd.step_simulation import COPIES, STATE, TEACHER_WEIGHTS, WEIGHTS, MetaPlacement, build_on_meta, simulate_step
from trsd.truncation import fraction, kept_length
from trsd.working_weights import WorkingWeights
from trsd_kernels import packed_layout

COMPILED = ", compiled"  # what the name of a contender ends in whose layers are


def planned_ours(pair: Pair, recipe: Recipe, ceilings: Ceilings, *, target: str) -> tuple[int, float]:
    """(peak bytes, least milliseconds) of our step."""
    placement = MetaPlacement(recipe, config_named(pair.student), config_named(pair.teacher), target=target)
    traces = planned_traces(pair.num_sequences, shared_lengths(pair.length))
    cost = simulate_step(placement, LSP(traces, fraction(recipe.keep_fraction), SECTIONS), ceilings)
    return cost.peak_bytes, 1000 * sum(cost.seconds.values())


def planned_reference(
    pair: Pair,
    keep_fraction: float,
    ceilings: Ceilings,
    *,
    target: str,
    best: bool,
    recomputed: bool,
    compiled: bool = False,
) -> tuple[int, float]:
    """(peak bytes, least milliseconds) of the LSP reference's step."""
    on_gpu = target == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    student = build_on_meta(config_named(pair.student), torch.float32).train()
    teacher = build_on_meta(config_named(pair.teacher), dtype).requires_grad_(False).eval()
    if recomputed:
        recompute_activations(student, "full", preserve_rng_state=False)
    weights = WorkingWeights(student, dtype if on_gpu else None)
    optimizer = build_optimizer(student, learning_rate=0.0, weight_decay=0.0)
    length = kept_length(pair.length, keep_fraction)
    ids = torch.zeros(length, dtype=torch.int64, device="meta")
    reference = LSPReference(
        *(student, teacher, optimizer, weights, [ids] * pair.num_sequences),
        pad_to=1 if best else PAD_TO,
        compiler=fused if compiled else None,
    )
    layout = packed_layout([reference.rows[0].input_ids.shape[1]])
    reference.forward_options |= {"packed_layout": layout, "attention_backend": "triton" if on_gpu else "sdpa"}
    trained = list(student.parameters())
    meter = LoopMeter(ceilings, on_gpu=on_gpu, bf16=on_gpu, chunk_bytes=1, trained=trained)
    with meter:
        for row in reference.rows[:2]:
            reference.backward(row._replace(attention_mask=None))
    parameters = sum(p.numel() for p in trained)
    held = {
        WEIGHTS: 4 * parameters,
        COPIES: weights.num_bytes,
        STATE: 8 * parameters,
        TEACHER_WEIGHTS: sum(p.nbytes for p in teacher.parameters()),
    }
    rows = len(reference.rows) / len(reference.rows[:2])
    optimizer_seconds = (28 * parameters + 3 * weights.num_bytes) / ceilings.copies
    return sum(held.values()) + meter.peak, 1000 * (rows * sum(meter.seconds.values()) + optimizer_seconds)


def ours_forms(pair: Pair, keep_fraction: float) -> dict[str, Recipe]:
    """Our contenders' recipes, by name."""
    from bench.training import lsp_recipe

    whole = lsp_recipe(pair, keep_fraction, row_tokens=pair.length * pair.num_sequences)
    lean = lsp_recipe(pair, keep_fraction, row_tokens=pair.length, chunk_bytes=2**29)
    found = {
        "ours, teacher online": whole,
        "ours, teacher online, lean": replace(lean, gradient_checkpointing=True),
        "ours, teacher in fp8": replace(whole, teacher="online_fp8"),
        "ours, teacher cached": replace(whole, teacher="hidden_cache"),
    }
    return found | {name + COMPILED: replace(recipe, torch_compile=True) for name, recipe in found.items()}


def predictions(pair: Pair, keep_fraction: float, ceilings: Ceilings) -> dict[str, Callable[[], tuple[int, float]]]:
    """Every contender's prediction on a GPU, to be computed."""
    shared = dict(target="cuda")
    forms = {
        "LSP reference": dict(best=False, recomputed=True),
        "LSP reference, best settings": dict(best=True, recomputed=False),
        "LSP reference, best settings" + COMPILED: dict(best=True, recomputed=False, compiled=True),
    }
    found: dict[str, Callable[[], tuple[int, float]]] = {
        name: partial(planned_reference, pair, keep_fraction, ceilings, **form, **shared)
        for name, form in forms.items()
    }
    for name, recipe in ours_forms(pair, keep_fraction).items():
        found[name] = lambda recipe=recipe: planned_ours(pair, recipe, ceilings, **shared)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--fractions", default="0.5,1.0")
    arguments = parser.parse_args(argv)
    try:
        ceilings, kept = known(arguments.gpu), [_fraction(text) for text in arguments.fractions.split(",")]
    except ValueError as error:
        parser.error(str(error))
    for pair in GPU_PAIRS:
        for keep_fraction in kept:
            print(f"\n{pair.group(keep_fraction)}, {ceilings.name}, predicted\n{'':<40}{'GiB':>8}{'ms at least':>14}")
            for name, predict in predictions(pair, keep_fraction, ceilings).items():
                peak, milliseconds = predict()
                fits = "" if ceilings.memory is None or peak <= ceilings.memory else "  does not fit"
                print(f"{name:<40}{peak / GIB:>8.1f}{milliseconds:>14.0f}{fits}", flush=True)


def _fraction(text: str) -> float:
    """One of ``--fractions``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ValueError(f"--fractions: expected numbers in (0, 1] with commas between, got {text!r}")
    return value


if __name__ == "__main__":
    main()
