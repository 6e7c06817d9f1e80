"""A run's teacher: as the recipe's ``teacher`` says, a model that runs, or targets on disk that are made once.

A cache is in the run's folder as ``teacher/``, or wherever ``teacher_cache_dir`` says, for several runs. It is built
when it is not there, gone on with when a build was interrupted, and refused when it was made from something else.
"""

import gc
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import Example
from trsd.errors import InputError
from trsd.fp8 import to_fp8
from trsd.job import Job
from trsd.methods import Method, TeacherExamples
from trsd.metrics import progress_bar
from trsd.models import logit_options, tokenizer_fingerprint, weights_fingerprint
from trsd.parallel import shard_teacher
from trsd.recipe import CACHE_OF_ALL, ONLINE
from trsd.row_shards import MANIFEST, building_folder, check_fingerprint, read_manifest
from trsd.teacher_cache import (
    HiddenCache,
    TopKCache,
    VectorCache,
    build_hidden_cache,
    build_top_k_cache,
    build_vector_cache,
    bytes_per_row,
    cache_fingerprint,
    cache_layout,
)
from trsd.teachers import AdapterOffTeacher, OnlineTeacher, Teacher


def prepare_teacher(job: Job, method: Method) -> Teacher | None:
    """The recipe's teacher, its targets computed where they are cached; None without one, or where it is the student.

    Raises:
        InputError: a cache that was made from something else, is damaged, or cannot be written.
    """
    recipe = job.recipe
    if recipe.alpha == 0 or recipe.teacher == "adapter_off":
        return None
    examples = TeacherExamples(method)
    if recipe.teacher in ONLINE:
        return _online_teacher(job, examples, sharded=job.ranks.size > 1)
    folder, fingerprint = job.cache_folder, _fingerprint(job, examples)
    with job.ranks.main_first():
        if job.ranks.is_main and not (folder / MANIFEST).exists():
            start = time.perf_counter()
            _check_room(job, folder, sum(len(example.labels) for example in examples))
            _build(job, folder, examples, fingerprint)
            gc.collect()
            print(f"teacher targets: {describe_cache(job, folder)} in {time.perf_counter() - start:.0f} s", flush=True)
    shared: dict[str, Any] = {"fingerprint": fingerprint, "device": job.device}
    if recipe.teacher == "hidden_cache":
        return HiddenCache(folder, **shared)
    kind = TopKCache if recipe.teacher == "top_k_cache" else VectorCache
    return kind(folder, temperature=recipe.temperature, **shared)


def refuse_other_cache(job: Job) -> None:
    """Raise InputError, before other work, where ``teacher_cache_dir`` holds another kind than the recipe asks for."""
    recipe = job.recipe
    cached = recipe.alpha > 0 and recipe.teacher.endswith("_cache")
    if recipe.teacher_cache_dir and cached and (job.cache_folder / MANIFEST).exists():
        stored = read_manifest(job.cache_folder)["fingerprint"]
        wanted = {"kind": recipe.teacher}
        if recipe.teacher != CACHE_OF_ALL:
            wanted["temperature"] = str(recipe.temperature)
        if recipe.teacher == "top_k_cache":
            wanted["k"] = str(recipe.teacher_top_k)
        check_fingerprint(job.cache_folder, {name: stored.get(name) for name in wanted}, wanted)


def student_as_teacher(job: Job, student: PreTrainedModel, method: Method) -> Teacher | None:
    """The teacher of teacher=adapter_off: ``student`` itself; None for other recipes."""
    recipe = job.recipe
    if recipe.alpha == 0 or recipe.teacher != "adapter_off":
        return None
    return AdapterOffTeacher(student, TeacherExamples(method), **_running(job, student, sharded=job.ranks.size > 1))


def describe_cache(job: Job, folder: Path) -> str:
    """Size and content of a complete cache."""
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    what = {
        "hidden_cache": "hidden states, and the lm_head",
        "top_k_cache": f"top {job.recipe.teacher_top_k}",
        "vector_cache": "vectors",
    }
    return f"{size:.1f} MiB ({what[job.recipe.teacher]}, {bytes_per_row(cache_layout(job)):,} bytes a token)"


def _fingerprint(job: Job, examples: Sequence[Example]) -> dict[str, str]:
    recipe, options = job.recipe, {}
    if recipe.teacher != "hidden_cache":
        options = {"vocab_size": job.vocab_size, "temperature": recipe.temperature}
    if recipe.teacher == "top_k_cache":
        options["k"] = recipe.teacher_top_k
    if recipe.teacher == "vector_cache":
        options["student_weights"] = weights_fingerprint(job.student_folder)
    return cache_fingerprint(
        kind=recipe.teacher,
        teacher_weights=weights_fingerprint(job.teacher_folder),
        tokenizer=tokenizer_fingerprint(job.tokenizer),
        dtype=job.reading_dtype,
        examples=examples,
        **options,
    )


def _build(job: Job, folder: Path, examples: Sequence[Example], fingerprint: dict[str, str]) -> None:
    recipe = job.recipe
    shared: dict[str, Any] = {"fingerprint": fingerprint, "progress": progress_bar("teacher")}
    if recipe.teacher == "hidden_cache":
        build_hidden_cache(folder, _online_teacher(job, examples), dtype=job.reading_dtype, **shared)
        return
    shared |= {"vocab_size": job.vocab_size, "temperature": recipe.temperature}
    shared |= logit_options(job.teacher_config, "teacher")
    if recipe.teacher == "top_k_cache":
        build_top_k_cache(folder, _online_teacher(job, examples), k=recipe.teacher_top_k, **shared)
    else:
        head = _student_head(job)
        build_vector_cache(folder, _online_teacher(job, examples), student_lm_head_weight=head, **shared)


def _student_head(job: Job) -> Tensor:
    """The student's lm_head as it is trained against; the rest of the student is dropped before the teacher comes."""
    return job.reader(job.student_folder).get_output_embeddings().weight.detach()


def _check_room(job: Job, folder: Path, num_rows: int) -> None:
    """Raise before a cache is computed that the disk cannot hold beside what is built of it."""
    building = building_folder(folder)
    built = sum(file.stat().st_size for file in building.iterdir()) if building.exists() else 0
    needed = bytes_per_row(cache_layout(job)) * num_rows - built
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the teacher's targets would take {needed / 2**30:.1f} GiB more and {place} has {free / 2**30:.1f}: "
            "use --teacher online, a top_k_cache of fewer tokens, another --teacher_cache_dir, or fewer traces"
        )


def _online_teacher(job: Job, examples: Sequence[Example], *, sharded: bool = False) -> OnlineTeacher:
    model = job.reader(job.teacher_folder, sharded=sharded)
    if job.recipe.teacher == "online_fp8":
        print(f"teacher: {to_fp8(model)} layers in 8 bits, which is not exact", flush=True)
    running = _running(job, model, sharded=sharded)
    if sharded:
        shard_teacher(model, job.ranks.mesh(job.recipe.shard_group_size))
    return OnlineTeacher(model, examples, **running)


def _running(job: Job, model: PreTrainedModel, *, sharded: bool) -> dict[str, Any]:
    """How a teacher runs its examples."""
    return {
        "max_tokens_per_batch": job.recipe.max_tokens_per_batch,
        "backend": job.attention_backend(model.config, branches=False),
        "ranks": job.ranks if sharded else None,
    }
