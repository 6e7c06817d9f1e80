"""``python -m trsd.cache``: what it makes, what ``trsd.train`` finds, and what becomes of it when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import losses, make_traces, refusal

from trsd import cache, row_builder
from trsd.errors import InputError
from trsd.job import Job
from trsd.recipe import Recipe
from trsd.row_shards import building_folder
from trsd.sweeping import sweep
from trsd.teachers import OnlineTeacher
from trsd.traces import write_traces

ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_teacher(monkeypatch):
    """From here on no teacher may be loaded."""

    def forbid():
        monkeypatch.setattr(Job, "teacher", lambda self: pytest.fail("the teacher was loaded"))

    return forbid


def test_train_goes_on_with_what_was_cached_and_trains_as_without(run, words, tmp_path, capsys, no_teacher):
    plain = run("plain")
    cache.main(words("run"))
    said = capsys.readouterr().out
    assert f"cache   {tmp_path}/run/teacher: " in said and "256 bytes a token" in said
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*/*")}
    cache.main(words("run"))  # again: all is there
    no_teacher()
    assert losses(run("run")) == losses(plain)
    assert made.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*/*")}.items()


def test_runs_share_a_cache_and_another_recipes_is_refused_by_name(run, words, tmp_path, capsys, no_teacher):
    shared = tmp_path / "shared"
    cache.main(words("made", teacher_cache_dir=shared))
    no_teacher()
    one, two = run("one", teacher_cache_dir=shared, max_steps=2), run("two", teacher_cache_dir=shared, seed=1)
    assert not (one / "teacher").exists() and losses(one) != losses(two)[:2]
    flags = dict(teacher_cache_dir=shared, teacher="top_k_cache", teacher_top_k=8)
    assert "made with other k, kind, temperature" in refusal(capsys, lambda: run("three", **flags))
    assert not (tmp_path / "three").exists()  # it was refused before any work, and the right command may follow
    run("three", teacher_cache_dir=shared, max_steps=1)


def test_a_prepared_folder_of_another_recipe_is_refused_by_field_and_untouched(run, words, tmp_path, capsys):
    cache.main(words("run"))
    before = sorted(tmp_path.rglob("run/**/*"))
    error = refusal(capsys, lambda: run("run", seed=5))
    assert "was prepared under another recipe (seed: 0 -> 5)" in error and sorted(tmp_path.rglob("run/**/*")) == before
    run("run", logging_steps=3)  # what does not change a run may differ


def test_a_path_may_be_spelled_in_another_way_but_not_be_another_file(
    run, words, trace_file, tmp_path, capsys, monkeypatch
):
    cache.main(words("run"))
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.jsonl"
    shutil.copy(trace_file, other)
    assert "data: " in refusal(capsys, lambda: run("run", data=other))
    run("run", data=os.path.relpath(trace_file), model_name_or_path=f"{words()[1]}/.")
    cache.main(words("relative", data=other.name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(trace_file, other.name)  # the stored name is of the folder where it was given
    assert "data: " in refusal(capsys, lambda: run("relative", data=Path(other.name).absolute()))


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(teacher="online"), "teacher: this recipe has teacher online, and there is nothing to cache"),
        (dict(alpha=0.0), "teacher: this recipe has alpha 0, so no teacher"),
        (dict(resume_from_checkpoint="latest"), "a cache is gone on with by itself"),
        (dict(data="missing.jsonl"), "no data file at missing.jsonl"),
    ],
)
def test_what_cannot_be_cached_exits_2_and_leaves_nothing(words, tmp_path, capsys, flags, message):
    assert message in refusal(capsys, lambda: cache.main(words("run", **flags)))
    assert not (tmp_path / "run").exists()


def test_dry_run_and_help_are_those_of_the_command(words, capsys, tmp_path):
    cache.main([*words(), "--dry_run"])
    assert "max_steps: 6" in capsys.readouterr().out and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        cache.main(["--help"])
    assert "python -m trsd.cache" in capsys.readouterr().out


def test_a_flipped_bit_in_a_cache_ends_the_run_before_its_first_step(run, words, tmp_path, capsys):
    cache.main(words("run"))
    path = tmp_path / "run" / "teacher" / "rows-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "rows-00000.safetensors is damaged" in refusal(capsys, lambda: run("run"))
    assert losses(tmp_path / "run") == []


def test_a_run_that_was_interrupted_while_it_built_goes_on_by_the_same_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr(row_builder, "TRACES_PER_SHARD", 2)
    asked, true = [], OnlineTeacher.each

    def each(self, indices, rows_of):
        if len(asked) == 3:
            asked.append("interrupted")
            raise KeyboardInterrupt
        asked.append(indices.start)
        return true(self, indices, rows_of)

    monkeypatch.setattr(OnlineTeacher, "each", each)
    with pytest.raises(SystemExit, match="130"):
        run("part")
    part = run("part")
    assert asked == [0, 2, 4, "interrupted", 6, 8] and losses(part) == losses(run("whole"))


def test_what_is_built_already_is_not_asked_of_the_disk_again(words, tmp_path, monkeypatch, capsys):
    cache.main(words("run"))
    (tmp_path / "run" / "teacher").rename(building_folder(tmp_path / "run" / "teacher"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    cache.main(words("run"))
    shutil.rmtree(tmp_path / "run" / "teacher")
    error = refusal(capsys, lambda: cache.main(words("run")))
    assert f"{tmp_path / 'run'} has 0.0" in error and "another --teacher_cache_dir" in error


def test_a_sweep_whose_runs_differ_in_their_targets_takes_no_shared_cache(tmp_path):
    recipe = Recipe(method="lsp", teacher_model_name_or_path="t", eval_data="e", teacher_cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="teacher_cache_dir: every fraction has targets of its own"):
        sweep(recipe, tmp_path / "sweep", [])


def environment():
    return os.environ | {"PYTHONPATH": "kernels", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_a_cache_command_killed_in_the_middle_goes_on_and_ends_the_same(words, tmp_path, run):
    code = "from trsd import row_builder, cache; row_builder.TRACES_PER_SHARD = 1; cache.main()"
    command = [sys.executable, "-c", code]
    subprocess.run([*command, *words("whole")], cwd=ROOT, env=environment(), check=True, capture_output=True)
    building = building_folder(tmp_path / "part" / "teacher")
    with subprocess.Popen([*command, *words("part")], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as killed:
        while not (building / "rows-00002.safetensors").exists():
            assert killed.poll() is None
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "part" / "teacher").exists()
    kept = {path: path.stat().st_mtime_ns for path in building.glob("rows-*") if path.name <= "rows-00001"}
    subprocess.run([*command, *words("part")], cwd=ROOT, env=environment(), check=True, capture_output=True)
    found = tmp_path / "part" / "teacher"
    assert all((found / path.name).stat().st_mtime_ns == when for path, when in kept.items())
    for path in (tmp_path / "whole" / "teacher").iterdir():
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name
    assert losses(run("part")) == losses(run("whole"))


TRAINING = """
import json, sys
from pathlib import Path
from trsd import loop, train

first = loop.Loop.step
peaks = []

def status(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def step(self, number, **options):
    if number == 2:  # all that a step allocates is there
        Path("/proc/self/clear_refs").write_text("5")
        peaks.append(status("VmRSS"))
    row = first(self, number, **options)
    peaks[1:] = [status("VmHWM")]
    return row

loop.Loop.step = step
train.main()
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_a_cache_of_ten_times_the_memory_that_training_may_take_trains(words, tmp_path, tokenizer, think):
    write_traces(tmp_path / "many.jsonl", make_traces(tokenizer, think, 600))
    flags = dict(
        data=tmp_path / "many.jsonl",
        method="lsp",
        keep_fraction=1.0,
        teacher_model_name_or_path=tmp_path / "tiny",
        teacher="top_k_cache",
        teacher_top_k=600,
        train_batch_size=2,
        max_steps=300,
    )
    result = subprocess.run(
        [sys.executable, "-c", TRAINING, *words("run", **flags)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "teacher").glob("rows-*"))
    before, peak = json.loads(result.stdout.splitlines()[-1])
    assert size > 300e6 and peak - before < size / 10, (size / 2**20, (peak - before) / 2**20)
