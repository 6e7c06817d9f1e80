"""Who is measured: our plans, the bare matrix products, plain torch, and the peers of ``peers.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.shapes import Inputs, Loss
from trsd_kernels import fused_linear_distillation
from trsd_kernels.linear_ops import rows_per_chunk
from trsd_kernels.products import add_product_, product
from trsd_kernels.teacher_targets import distill_from_vectors, teacher_vectors
from trsd_kernels.torch_rows import row_chunks

SMALL_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss and its gradients."""

    name: str
    step: Callable[[Inputs, Loss], Callable[[], Tensor | None]]
    """Prepares a function that makes the loss, still to be differentiated, or None where there is none."""
    install: str = ""
    """What ``pip install`` takes to bring it along."""
    uncounted: bool = False
    """One opaque operation to ``LiveBytes``, so that its memory on a CPU is not known."""
    compiles: bool = False
    """Needs many seconds before it first runs."""
    needs_gpu: bool = False
    """Its kernels run on a GPU alone; those in Triton also in the interpreter."""
    check: Callable[[Inputs, Loss], Callable[[], Tensor]] | None = None
    """The same computation not compiled, to be checked by; None: ``step`` itself."""


def ours(plan: str, chunk_bytes: int | None = None) -> Callable[[Inputs, Loss], Callable[[], Tensor]]:
    """``fused_linear_distillation`` by one of its plans."""

    def step(inputs: Inputs, loss: Loss) -> Callable[[], Tensor]:
        keywords = dict(loss.options(), plan=plan, chunk_bytes=chunk_bytes)
        return lambda: fused_linear_distillation(*inputs.asked_for(loss), **keywords).loss

    return step


def ours_from_vectors(inputs: Inputs, loss: Loss) -> Callable[[], Tensor]:
    """A frozen head against cached teacher vectors; making the cache is not timed."""
    student_h, student_w, teacher_h, teacher_w, labels = inputs.positional()
    targets = teacher_vectors(teacher_h, teacher_w, student_w, temperature=loss.temperature)
    options = dict(alpha=loss.alpha, temperature=loss.temperature)
    return lambda: distill_from_vectors(student_h, student_w, targets, labels, **options).loss


def bare_gemms(inputs: Inputs, loss: Loss) -> Callable[[], None]:
    """The floor: only the products that the loss cannot do without, on the rows at a time that our plan takes.

    Student logits, teacher logits where there is a divergence, and dH, and dW for a trained head, with fp32 results; a
    random matrix stands for dloss/dlogits.
    """
    student_h, student_w, teacher_h, teacher_w, _ = (x.detach() for x in inputs.positional())
    num_tokens, vocab_size = len(student_h), len(student_w)
    chunk = min(rows_per_chunk(vocab_size, torch.float32, inputs.labels.device, None), num_tokens)
    gradient = torch.randn(chunk, vocab_size, device=student_h.device, dtype=student_h.dtype)

    def step() -> None:
        dh, dw = torch.empty_like(student_h), None
        for part in row_chunks(num_tokens, chunk):
            hidden = student_h[part]
            logits = [product(hidden, student_w.T)]
            if loss.alpha:
                logits.append(product(teacher_h[part], teacher_w.T))
            here = gradient[: len(hidden)]
            dh[part] = product(here, student_w)
            if inputs.head_is_trained and dw is None:
                dw = product(here.T, hidden)
            elif inputs.head_is_trained:
                add_product_(dw, here.T, hidden)
            del logits  # both were live at once, as they must be

    return step


def eager_loss(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor | None,
    teacher_w: Tensor | None,
    labels: Tensor,
    loss: Loss,
) -> Tensor:
    """What people write: whole logits, made in the inputs' dtype and then cast to fp32, and torch's losses."""
    student_logits = F.linear(student_h, student_w).float()
    if loss.alpha == 0.0:
        return F.cross_entropy(student_logits, labels)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(teacher_h, teacher_w).float() / loss.temperature, -1)
    log_q = F.log_softmax(student_logits / loss.temperature, -1)
    if loss.divergence == "forward_kl":
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    else:
        beta = loss.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        from_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
        divergence = beta * from_p + (1 - beta) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    total = loss.alpha * loss.temperature**2 * divergence
    return total if loss.alpha == 1.0 else total + (1 - loss.alpha) * F.cross_entropy(student_logits, labels)


def eager(inputs: Inputs, loss: Loss) -> Callable[[], Tensor]:
    """Plain torch."""
    return lambda: eager_loss(*inputs.asked_for(loss), loss)


def compiled_eager(inputs: Inputs, loss: Loss) -> Callable[[], Tensor]:
    """Plain torch under torch.compile, for this very shape."""
    torch.compiler.reset()
    function = torch.compile(eager_loss, dynamic=False)
    return lambda: function(*inputs.asked_for(loss), loss)


TOKENS = Contender("ours (tokens)", ours("tokens"))
VOCAB = Contender("ours (vocab)", ours("vocab"))
SMALL_VOCAB = Contender("ours (vocab, 256 MiB)", ours("vocab", SMALL_CHUNK_BYTES))
VECTORS = Contender("ours (cached vectors)", ours_from_vectors)
BARE_GEMMS = Contender("bare GEMMs", bare_gemms)
EAGER = Contender("eager torch", eager)
COMPILED = Contender("torch.compile", compiled_eager, uncounted=True, compiles=True, check=eager)
TRL = Contender("TRL chunked divergence", peers.trl_chunked_divergence, install="trl==1.16.0")
LIGER_CHUNKED = Contender(
    "Liger chunked JSD", peers.liger_chunked_jsd, install="liger-kernel==0.8.5", compiles=torch.cuda.is_available()
)


def _liger(name: str, step: Callable[[Inputs, Loss], Callable[[], Tensor]]) -> Contender:
    return Contender(name, step, install="liger-kernel==0.8.5", needs_gpu=True)


LIGER_FUSED = _liger("Liger fused JSD", peers.liger_fused_jsd)
LIGER_FUSED_FP32 = _liger("Liger fused JSD, fp32 dW", peers.liger_fused_jsd_fp32)
LIGER_CE = _liger("Liger fused CE", peers.liger_cross_entropy)
LIGER_CE_FP32 = _liger("Liger fused CE, fp32 dW", peers.liger_cross_entropy_fp32)
FLA = Contender("FLA fused KL", peers.fla_fused_kl, install="fla-core==0.6.0", needs_gpu=True)
FLA_ROUNDED = Contender(
    "FLA fused KL, rounded dW", peers.fla_fused_kl_rounded, install="fla-core==0.6.0", needs_gpu=True
)
CCE = Contender("CCE", peers.cut_cross_entropy, install="cut-cross-entropy==25.1.1", needs_gpu=True)
QUACK = Contender(
    "QuACK linear CE", peers.quack_cross_entropy, install="quack-kernels==0.6.5", needs_gpu=True, compiles=True
)
