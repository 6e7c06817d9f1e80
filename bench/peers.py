"""Other packages' losses behind one face: each adapter computes what ours does, or says in what it differs.

Read and checked against trl 1.16.0 and liger-kernel 0.8.5. A ``step`` takes inputs and loss and returns a function that
makes the scalar loss; a package that is missing raises ImportError there.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from bench.shapes import Inputs, Loss

Forward = Callable[[], Tensor]


def _trl_kernel() -> type:
    """TRL's autograd function.

    Its module takes one context manager, null without DeepSpeed, from ``trl.trainer.utils``, which imports the whole
    trainer's packages. Where those are missing a stand-in provides that one name.
    """
    try:
        return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    except ImportError as error:
        if error.name == "trl":
            raise
    stand_in = types.ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
    sys.modules[stand_in.__name__] = stand_in
    try:
        return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    finally:
        del sys.modules[stand_in.__name__]


def trl_chunked_divergence(inputs: Inputs, loss: Loss) -> Forward:
    """``trl/kernels/chunked_divergence.py``: fp32 logits and dW; repeats the logits in backward.

    No cross-entropy (alpha 1 only), no temperature^2 (multiplied here). Like ours it also gives per-token entropies.
    """
    function = _trl_kernel()
    student_h, student_w, teacher_h, teacher_w, _ = inputs.positional()

    def forward() -> Tensor:
        per_token, _ = function.apply(
            student_h, student_w, None, teacher_h, teacher_w, None, loss.beta, loss.temperature
        )
        return per_token.mean() * loss.temperature**2

    return forward


def _liger_fused(inputs: Inputs, loss: Loss, accum_dtype: torch.dtype | None) -> Forward:
    """``LigerFusedLinearJSD``: fp32 logits, gradients made in the forward over short chunks of rows.

    No cross-entropy (alpha 1 only), no temperature^2 (multiplied here). Its mean is over the labels not ignored, as
    ours is.
    """
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=loss.beta, temperature=loss.temperature, accum_dtype=accum_dtype)
    # Its backward leaves the gradients as they are when the upstream gradient is 1, else it scales them in place.
    if loss.temperature == 1.0:
        return lambda: module(*inputs.positional())
    return lambda: module(*inputs.positional()) * loss.temperature**2


def liger_fused_jsd(inputs: Inputs, loss: Loss) -> Forward:
    """As shipped: dW is summed in the weight's own dtype, so in bf16 its figures are of a rougher gradient."""
    return _liger_fused(inputs, loss, None)


def liger_fused_jsd_fp32(inputs: Inputs, loss: Loss) -> Forward:
    """dW summed in fp32, as ours is."""
    return _liger_fused(inputs, loss, torch.float32)


def liger_chunked_jsd(inputs: Inputs, loss: Loss) -> Forward:
    """``liger_kernel.chunked_loss``: cross-entropy and divergence from torch operations, compiled on a GPU.

    Logits and the sum of dW are rounded to the inputs' dtype, and a frozen head's dW is made all the same.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.compiler.reset()  # it compiles a new closure in every call, and Dynamo counts those up to a limit
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0 - loss.alpha,
        weight_soft_loss=loss.alpha * loss.temperature**2,  # it divides logits by the temperature and leaves it there
        beta=loss.beta,
        temperature=loss.temperature,
        compiled=inputs.labels.is_cuda,
    )
    return lambda: module(*inputs.positional())
