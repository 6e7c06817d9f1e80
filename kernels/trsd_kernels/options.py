"""Everything about a distillation loss that is not a tensor, checked once and handed around as one value."""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")  # compare with a mixture of p and q, known only after both normalisers


class LogitTransform(NamedTuple):
    """What a model does to ``hidden @ weight.T + bias``: z = softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The keywords that every loss of this package takes; the terms are those of ``reference.py``."""

    alpha: float = 0.5
    """Share of the divergence in the loss, 0 to 1; the rest is cross-entropy. At 0 no teacher is needed."""
    divergence: str = "forward_kl"
    """"forward_kl", "reverse_kl", "jsd", "skew_kl" or "skew_reverse_kl"."""
    beta: float = 0.5
    """The teacher's weight in the JSD's mixture, 0 (forward KL) to 1 (reverse KL)."""
    skew: float = 0.1
    """Skew divergences: the share mixed into the second distribution from the first, 0 (plain KL) to below 1."""
    temperature: float = 1.0
    """Divides the logits of both models in the divergence and the entropies, never in the cross-entropy. Without a
    divergence (``alpha`` 0) it plays no part."""
    temperature_squared: bool = True
    """Multiply the divergence by temperature^2 in the loss, so that its gradient keeps its size."""
    student_logit_scale: float = 1.0
    """Factor on the student's logits before anything else (Cohere's logit_scale, 1 / Granite's logits_scaling)."""
    student_logit_softcap: float | None = None
    """softcap * tanh(logits / softcap) on the student's scaled logits (Gemma's final_logit_softcapping)."""
    teacher_logit_scale: float = 1.0
    """Factor on the teacher's logits."""
    teacher_logit_softcap: float | None = None
    """Soft cap of the teacher's scaled logits."""
    ignore_index: int = -100
    """Label of a row that enters neither term."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "skew", "temperature", "student_logit_scale", "teacher_logit_scale"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "temperature_squared", bool(self.temperature_squared))
        object.__setattr__(self, "ignore_index", int(self.ignore_index))
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected the divergence's share in [0, 1], got {self.alpha}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta: expected 0 (forward KL) to 1 (reverse KL), got {self.beta}")
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"skew: expected a share in [0, 1), got {self.skew}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        for name in ("student_logit_scale", "teacher_logit_scale"):
            if not -math.inf < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        for name in ("student_logit_softcap", "teacher_logit_softcap"):
            softcap = getattr(self, name)
            if softcap is not None and not 0.0 < softcap < math.inf:
                raise ValueError(f"{name}: expected a positive number, or None for no cap, got {softcap}")
            object.__setattr__(self, name, None if softcap is None else float(softcap))

    def encode(self) -> str:
        """These options as one string, the only form in which a dispatcher op and torch.compile carry them whole."""
        # hex() is exact, and makes a compiled graph take a float it holds symbolically for the number it is.
        values = [(name, getattr(self, name)) for name in NAMES]
        return ";".join([f"{name}={value.hex() if isinstance(value, float) else value}" for name, value in values])

    @staticmethod
    @lru_cache(maxsize=64)
    def decode(encoded: str) -> "DistillOptions":
        """The options that ``encode`` wrote."""
        texts = dict(part.split("=") for part in encoded.split(";"))
        return DistillOptions(**{field.name: _value(field.type, texts[field.name]) for field in fields(DistillOptions)})

    @property
    def divergence_scale(self) -> float:
        """alpha * kappa: what the divergence counts in the loss."""
        return self.alpha * (self.temperature**2 if self.temperature_squared else 1.0)

    @property
    def student_transform(self) -> LogitTransform:
        """Scale and soft cap of the student's logits."""
        return LogitTransform(self.student_logit_scale, self.student_logit_softcap)

    @property
    def teacher_transform(self) -> LogitTransform:
        """Scale and soft cap of the teacher's logits."""
        return LogitTransform(self.teacher_logit_scale, self.teacher_logit_softcap)

    @property
    def kind(self) -> str:
        """The divergence actually computed: at its ends a mixture is one of the two KLs."""
        if self.alpha == 0.0:
            return "none"
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        if self.divergence.startswith("skew") and self.skew == 0.0:
            return "forward_kl" if self.divergence == "skew_kl" else "reverse_kl"
        return self.divergence

    @property
    def softmax_temperature(self) -> float:
        """The temperature that statistics are taken at: without a divergence there is none."""
        return 1.0 if self.kind == "none" else self.temperature

    @property
    def teacher_share(self) -> float:
        """The teacher's share in the mixture m of ``kind``."""
        if self.kind == "jsd":
            return self.beta
        return self.skew if self.kind == "skew_kl" else 1.0 - self.skew


NAMES = tuple(field.name for field in fields(DistillOptions))


class SoftmaxOptions(DistillOptions):
    """One model alone: statistics at ``temperature``, gradients w_0 softmax(z) + w_1 / T softmax(z / T)."""

    @property
    def kind(self) -> str:
        return "softmax"


def _value(kind: object, text: str) -> object:
    """One field from its text."""
    if text == "None":
        return None
    if kind is bool:
        return text == "True"
    if kind in (int, str):
        return kind(text)
    return float.fromhex(text)
