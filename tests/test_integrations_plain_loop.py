"""The plain loop with FSDP2 and torch.compile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trsd.integrations import plain_loop

ROOT = Path(__file__).parent.parent


def losses(text):
    return re.findall(r"loss (\d+\.\d+)  grad_norm (\d+\.\d+)", text)


def assert_alike(found, expected):
    """The same but for the last digit that is printed, which sums in another order may round otherwise."""
    for one, other in zip(found, expected, strict=True):
        assert float(one[0]) == pytest.approx(float(other[0]), abs=2.1e-6)
        assert float(one[1]) == pytest.approx(float(other[1]), abs=2.1e-4)


def test_one_process_learns(capsys):
    plain_loop.main(["--steps", "8"])
    found = [float(loss) for loss, _ in losses(capsys.readouterr().out)]
    assert len(found) == 8 and found[-1] < 0.7 * found[0]


@pytest.mark.slow
def test_compiled_as_one_graph_and_over_two_ranks_it_has_the_same_losses(capsys):
    plain_loop.main(["--steps", "3"])
    expected = losses(capsys.readouterr().out)
    compiled = ["--compile", "1", "--compile_backend", "aot_eager"]
    plain_loop.main(["--steps", "3", *compiled])
    assert_alike(losses(capsys.readouterr().out), expected)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trsd.integrations.plain_loop"]
    result = subprocess.run(
        [sys.executable, "-m", *command, "--steps", "3", "--batch_size", "4", *compiled],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )
    assert len(losses(result.stdout)) == 3, result.stderr[-2000:]
    assert_alike(losses(result.stdout), expected)


@pytest.mark.slow
def test_inductor_compiles_it_as_one_graph(capsys):
    plain_loop.main(["--steps", "3"])
    expected = losses(capsys.readouterr().out)
    plain_loop.main(["--steps", "3", "--compile", "1"])
    for (loss, _), (other, _) in zip(expected, losses(capsys.readouterr().out), strict=True):
        assert float(loss) == pytest.approx(float(other), rel=1e-5)
