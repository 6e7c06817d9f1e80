"""Forward and backward of attention over packed rows: our kernels, torch's and flash-attn's, with and without branches.

On a GPU in bf16 with the heads of Qwen3-4B; on a CPU at a small size in fp32, where only SDPA serves. Every line is
measured in turn with ours over the same sequences. A back end that cannot run here is skipped, with its reason.
"""

import pytest
import torch

from bench.attention import GPU_PLAIN, QWEN3_4B, Contender, Setting, cases, flops, measure, reference_of, visible_pairs
from bench.lines import AttentionLine

SUITE = ("attention", "varlen_attention, forward and backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = reference_of(DEVICE)
SHARE_OF_THE_BEST = 0.70

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a target for a GPU, and there is no CUDA device")
unused_is_fine = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def name_of(value: Setting | Contender) -> str:
    return value.name


@unused_is_fine
@pytest.mark.parametrize("setting,contender", cases(DEVICE), ids=name_of)
def test_attention(setting, contender, benchmark, record):
    benchmark.group = setting.name
    layout = setting.layout(separate=contender.separate)

    def line(**measured: object) -> AttentionLine:
        return AttentionLine(
            group=setting.name,
            contender=contender.name,
            num_tokens=layout.num_tokens,
            visible_pairs=visible_pairs(layout),
            flops=flops(layout, setting.heads),
            **measured,
        )

    record([line], lambda: [measure(benchmark, setting, contender, REFERENCE, device=DEVICE)])


@needs_gpu
@unused_is_fine
@pytest.mark.parametrize("setting", [each for each in GPU_PLAIN if each.heads == QWEN3_4B], ids=name_of)
def test_ours_reaches_its_share_of_the_best(setting, benchmark, results):
    others = [
        line
        for setting_of_case, contender in cases(DEVICE)
        if setting_of_case == setting and contender != REFERENCE
        if (line := results.find(group=setting.name, contender=contender.name))
    ]
    if results.find(group=setting.name, contender=REFERENCE.name) is None:
        pytest.fail(f"{setting.name}: ours was not measured")
    if not others:
        pytest.skip(f"{setting.name}: neither torch nor flash-attn was measured")
    # The same operations, so the share of the throughput is the ratio of times measured in turn.
    reached = min(line.time_ratio for line in others)
    assert reached >= SHARE_OF_THE_BEST, f"{setting.name}: reached {reached:.2f} of the best\n{results.table()}"
