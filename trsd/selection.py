"""Which traces suit a student: the Rank-Surprisal Ratio (arXiv 2601.14249).

For a trace's response tokens, reasoning, close and answer, under the student:

    RSR = sum_t min(rank_t, 100) / sum_t NLL_t,        rank_t = 1 + number of logits above the token's        (1)

and for a data set the mean over traces of the average rank, over the mean over traces of the average NLL. **Lower is
better**: tokens that tell the student something new (high NLL) while it already ranks them well. One forward pass over
packed rows; hidden states go through the head in chunks (``trsd_kernels.token_surprisal``), logits are never whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trsd.batching import pack_examples
from trsd.methods.lsp import kept_example
from trsd.models import logit_options, packed_hidden_states
from trsd.traces import Trace
from trsd_kernels import token_surprisal

MAX_RANK = 100


@dataclass(frozen=True, kw_only=True)
class RankSurprisal:
    """A trace under a student, averaged over its response tokens."""

    mean_rank: float
    """Ranks are clipped to ``MAX_RANK`` first."""
    mean_nll: float
    """Nats per token."""
    num_tokens: int

    @property
    def ratio(self) -> float | None:
        """RSR; None where every token is certain."""
        return self.mean_rank / self.mean_nll if self.mean_nll > 0 else None


@torch.no_grad()
def rank_surprisal(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    *,
    max_tokens_per_batch: int = 8192,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[RankSurprisal]:
    """Rank and surprisal of every trace under ``model``, in the order of ``traces``.

    Args:
        model: the student, as ``load_model`` made it; its vocabulary must be the traces'.
        traces: that fit the student's context.
        max_tokens_per_batch: tokens of a packed row; those of the longest trace, where that has more.
        backend: of ``trsd_kernels.varlen_attention``.
        progress: called with (traces done, number of traces).
    """
    head, options = model.get_output_embeddings().weight, logit_options(model.config, "student")
    # Reasoning, close and answer; a close that was forced is nobody's response.
    examples = [
        kept_example(trace, index, ((0, trace.num_tokens),), ("cot", "a")) for index, trace in enumerate(traces)
    ]
    widest = max([max_tokens_per_batch, *(example.num_tokens for example in examples)])
    found: dict[int, RankSurprisal] = {}
    # Chunks of traces, because packing makes tensors of everything it is given.
    for start in range(0, len(examples), 512):
        for batch in pack_examples(examples[start : start + 512], widest, model.device):
            hidden = packed_hidden_states(model, batch.input_ids, batch.layout, backend=backend)[batch.rows]
            tokens = token_surprisal(hidden, head, batch.labels, **options)
            lengths = [len(examples[index].labels) for index in batch.trace_indices]
            ranks, nlls = tokens.rank.clamp(max=MAX_RANK).double().split(lengths), tokens.nll.double().split(lengths)
            for index, rank, nll in zip(batch.trace_indices, ranks, nlls, strict=True):
                found[index] = RankSurprisal(
                    mean_rank=float(rank.mean()), mean_nll=float(nll.mean()), num_tokens=len(rank)
                )
            if progress:
                progress(len(found), len(traces))
    return [found[index] for index in range(len(traces))]


def dataset_ratio(found: Sequence[RankSurprisal]) -> float | None:
    """RSR of a data set: mean average rank over mean average NLL; None for no traces, or certain ones."""
    surprisal = sum(one.mean_nll for one in found)
    return sum(one.mean_rank for one in found) / surprisal if surprisal > 0 else None
