"""Errors of every gradient against float64: ``python -m bench.error_table``.

For each divergence (alpha 1, temperature 1) and regime of ``shapes.py``: ||g - g64|| / ||g64|| of dH, dW and db by both
plans, from fp32 and from bf16 inputs, and of the same loss from whole fp32 logits differentiated by torch. g64 is
``trsd_kernels.reference`` in float64 on the very numbers drawn. A bf16 gradient carries one rounding, about 1.7e-3.
"""

import argparse
import itertools

import torch
from torch import Tensor

from bench.record import environment, results_path, write_json
from bench.shapes import REGIMES, Inputs, Shape, draw
from trsd_kernels import fused_linear_distillation
from trsd_kernels.options import DIVERGENCES
from trsd_kernels.reference import distillation_rows

SHAPE = Shape(64, 32000, 256, 384)
PLANS = ("tokens", "vocab")
NAMES = {"student_hidden_states": "dH", "student_lm_head_weight": "dW", "student_lm_head_bias": "db"}
COLUMNS = {
    ("float32", PLANS): "ours fp32",
    ("float32", ("plain torch",)): "plain torch fp32",
    ("bfloat16", PLANS): "ours bf16",
}


def gradients(inputs: Inputs, loss: Tensor) -> dict[str, Tensor]:
    """dH, dW and db in float64."""
    trained = inputs.trained()
    found = torch.autograd.grad(loss, list(trained.values()))
    return {NAMES[name]: gradient.double() for name, gradient in zip(trained, found, strict=True)}


def whole_logits_loss(inputs: Inputs, divergence: str) -> Tensor:
    """The mean divergence from whole logits, in the inputs' dtype."""
    student = torch.addmm(inputs.student_lm_head_bias, inputs.student_hidden_states, inputs.student_lm_head_weight.T)
    teacher = torch.addmm(inputs.teacher_lm_head_bias, inputs.teacher_hidden_states, inputs.teacher_lm_head_weight.T)
    return distillation_rows(student, teacher, inputs.labels, alpha=1.0, divergence=divergence).divergence.mean()


def fused_loss(inputs: Inputs, divergence: str, plan: str) -> Tensor:
    """Ours, in several chunks."""
    return fused_linear_distillation(
        *inputs.positional(),
        student_lm_head_bias=inputs.student_lm_head_bias,
        teacher_lm_head_bias=inputs.teacher_lm_head_bias,
        alpha=1.0,
        divergence=divergence,
        plan=plan,
        chunk_size=SHAPE.num_tokens // 3 if plan == "tokens" else SHAPE.vocab_size // 3,
    ).loss


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((got[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


def rows_of(regime: str, dtype: torch.dtype, device: str) -> list[dict[str, object]]:
    """Every divergence and plan on one draw."""
    inputs = draw(SHAPE, device=device, dtype=dtype, regime=regime, bias=True)
    double = inputs.to(torch.float64)
    rows = []
    for divergence in DIVERGENCES:
        exact = gradients(double, whole_logits_loss(double, divergence))
        losses = {plan: fused_loss(inputs, divergence, plan) for plan in PLANS}
        if dtype == torch.float32:
            losses["plain torch"] = whole_logits_loss(inputs, divergence)
        for plan, loss in losses.items():
            row = dict(divergence=divergence, regime=regime, plan=plan, dtype=str(dtype).removeprefix("torch."))
            rows.append(row | errors(gradients(inputs, loss), exact))
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """Worst of dH, dW and db and of both plans: a row for each divergence."""
    columns = list(itertools.product(REGIMES, COLUMNS))
    lines = [
        " | ".join(["| divergence", *(f"{regime}: {COLUMNS[column]}" for regime, column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for divergence in DIVERGENCES:
        worst = [
            max(
                row[name]
                for row in rows
                for name in NAMES.values()
                if (row["divergence"], row["regime"], row["dtype"]) == (divergence, regime, dtype)
                and row["plan"] in plans
            )
            for regime, (dtype, plans) in columns
        ]
        lines.append(" | ".join([f"| {divergence}", *(f"{error:.1e}" for error in worst)]) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        row for dtype in (torch.float32, torch.bfloat16) for regime in REGIMES for row in rows_of(regime, dtype, device)
    ]
    facts = environment()
    path = results_path("linear_distill-errors", facts["device"])
    write_json(path, {"environment": facts, "shape": SHAPE._asdict(), "errors": rows})
    print(f"{facts['device']}, torch {facts['torch']}, {SHAPE}\n\n{markdown(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
