"""Where a step's time goes: families of kernels, the table, and a run of the small pair."""

import json

import pytest

from bench import profile_step
from bench.profile_step import Kernel, by_family, family_of, table


@pytest.mark.parametrize(
    "name,family",
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::mm", "matrix products"),
        ("_query_gradient_kernel", "attention"),
        ("_forward_kernel", "attention"),
        ("void flash::flash_fwd_kernel<...>", "attention"),
        ("_gradient_kernel", "loss rows"),
        ("_accumulate_kernel", "loss rows"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "softmax and cross-entropy"),
        ("Memcpy HtoD (Pageable -> Device)", "copies and casts"),
        ("void at::native::reduce_kernel<512, 1>", "reductions"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "fused by torch.compile"),
        ("triton_poi_fused_embedding_silu_mul_0", "fused by torch.compile"),
        ("something new", "other"),
    ],
)
def test_kernels_have_families(name, family):
    assert family_of(name) == family


KERNELS = [Kernel("aten::mul", 30.0, 6), Kernel("aten::mm", 90.0, 3), Kernel("aten::add", 60.0, 3)]


def test_families_and_their_members_are_sorted_by_time():
    found = by_family(KERNELS)
    assert list(found) == ["elementwise", "matrix products"] or list(found) == ["matrix products", "elementwise"]
    assert [kernel.name for kernel in found["elementwise"]] == ["aten::add", "aten::mul"]


def test_the_table_is_of_one_step():
    lines = table(KERNELS, steps=3, step_milliseconds=70.0).splitlines()
    rows = {line[:34].strip(): line.split()[-3:] for line in lines if line[0] != " "}
    assert rows["elementwise"] == ["30.00", "50.0%", "3"] and rows["matrix products"] == ["30.00", "50.0%", "1"]
    assert lines[-1].endswith("10.00 of it without any of these")


def test_the_small_pair_is_profiled_and_traced(capsys, tmp_path):
    trace = tmp_path / "step.trace.json"
    profile_step.main(["--steps", "1", "--fraction", "0.25", "--trace", str(trace)])
    said = capsys.readouterr().out
    assert "matrix products" in said and "a step takes" in said and str(trace) in said
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("words", [["--pair", "7"], ["--fraction", "0"], ["--contender", "nobody"], ["--steps", "0"]])
def test_what_cannot_be_profiled_is_refused(words):
    with pytest.raises(SystemExit) as exit_:
        profile_step.main(words)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--fraction", "0.001"], "no token to learn is left"), (["--contender", "fp8"], "compute capability 9.0")],
)
def test_what_cannot_run_here_is_said(words, said, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        profile_step.main([*words, "--trace", str(tmp_path / "trace.json")])
    assert said in str(exit_.value)


def test_a_trace_that_cannot_be_written_is_said_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        profile_step.main(["--trace", str(tmp_path / "file" / "trace.json")])
    assert exit_.value.code == 2 and "--trace" in capsys.readouterr().err
