"""Whether a contender computes the loss it is timed for: loss and gradients against float64 before any timing.

At a small size, in the timed dtype and on the timed device, at temperature 1 and 2 (where conventions of temperature
and its square show) and with a mixture's own weights (where those of beta show).
"""

import functools

import torch
from torch import Tensor

from bench.contenders import Contender
from bench.measure import NotMeasured
from bench.shapes import Inputs, Loss, Shape, draw
from trsd_kernels.products import triton_interpreted
from trsd_kernels.reference import distillation_rows

# Peers choose kernels and tiles by what divides the sizes: like 151,936 the vocabulary is an odd multiple of 128.
SHAPE = Shape(96, 896, 512, 640)
TEMPERATURES = (1.0, 2.0)
# A convention that differs is off by a tenth or more; bf16 logits, as some contenders make them, by a hundredth.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def exact(inputs: Inputs, loss: Loss) -> dict[str, Tensor]:
    """Loss and gradients of the very numbers in ``inputs``, in float64."""
    wide = inputs.to(torch.float64)
    student = wide.student_hidden_states @ wide.student_lm_head_weight.T
    teacher = wide.teacher_hidden_states @ wide.teacher_lm_head_weight.T if loss.alpha else None
    terms = distillation_rows(student, teacher, wide.labels, **loss.options())
    value = (1 - loss.alpha) * terms.cross_entropy.mean()
    if loss.alpha:
        value = value + loss.alpha * loss.temperature**2 * terms.divergence.mean()
    return {"loss": value.detach(), **_gradients(wide, value)}


def _gradients(inputs: Inputs, value: Tensor) -> dict[str, Tensor]:
    trained = inputs.trained()
    found = torch.autograd.grad(value, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@functools.cache
def worst_error(contender: Contender, loss: Loss, *, device: str, dtype: torch.dtype, head_is_trained: bool) -> float:
    """The largest relative error of loss and gradients over ``TEMPERATURES``.

    Raises:
        NotMeasured: it is beyond ``TOLERANCE``: the contender computes something else, and what differs most; or its
            kernels do not run on the device.
        ImportError: the contender's package is missing.
    """
    worst = 0.0
    for temperature in TEMPERATURES:
        asked = loss._replace(temperature=temperature)
        inputs = draw(SHAPE, device=device, dtype=dtype, head_is_trained=head_is_trained)
        step = (contender.check or contender.step)(inputs, asked)
        if contender.needs_gpu and not (inputs.labels.is_cuda or triton_interpreted(inputs.labels.device)):
            raise NotMeasured("needs a GPU")
        value = step()
        value.backward()
        got = {"loss": value.detach()} | {name: tensor.grad for name, tensor in inputs.trained().items()}
        for name, wanted in exact(inputs, asked).items():
            if got[name] is None:
                raise NotMeasured(f"refused, no gradient of {name}")
            error = float((got[name].double() - wanted).norm() / wanted.norm())
            if not error <= TOLERANCE[dtype]:
                raise NotMeasured(f"refused, {name} is {error:.1e} off float64's at temperature {temperature:g}")
            worst = max(worst, error)
    return worst
