"""teacher=auto: what is chosen, that it is said and stored, and that nothing is chosen without an adapter."""

import shutil

import pytest
import torch
import yaml
from conftest import losses, refusal
from transformers import AutoConfig

from trsd.recipe import Recipe
from trsd.recipe_file import parse_recipe, recipe_as_yaml
from trsd.teacher_choice import with_teacher_kind


def config(hidden_size, **fields):
    return AutoConfig.for_model("qwen3", hidden_size=hidden_size, **fields)


def chosen(student_config, teacher_config, dtype=torch.bfloat16, **fields):
    recipe = Recipe(**{"lora_rank": 4, "alpha": 0.5} | fields)
    return with_teacher_kind(recipe, student_config, teacher_config, dtype=dtype)


@pytest.mark.parametrize(
    "student,teacher,dtype,kind",
    [
        (1024, 5120, torch.bfloat16, "vector_cache"),  # Qwen3-32B for 0.6B: 4,104 bytes a token instead of 10,240
        (2048, 5120, torch.bfloat16, "vector_cache"),
        (2048, 4096, torch.bfloat16, "hidden_cache"),  # 8,200 and 8,192
        (2560, 2560, torch.bfloat16, "hidden_cache"),
        (1024, 2048, torch.float32, "vector_cache"),
        (1024, 1024, torch.float32, "hidden_cache"),  # 4,104 and 4,096
    ],
)
def test_the_kind_of_fewer_bytes_is_chosen_and_both_are_said(student, teacher, dtype, kind):
    recipe, why = chosen(config(student), config(teacher), dtype)
    assert recipe.teacher == kind
    assert f"{4 * student + 8:,} bytes" in why and f"{dtype.itemsize * teacher:,} in hidden states" in why


@pytest.mark.parametrize(
    "fields,why",
    [
        ({"divergence": "jsd"}, "vectors hold no jsd"),
        ({"teacher_cache_dir": "shared"}, "other students may share"),
        ({"lora_rank": None}, ""),
        ({"alpha": 0.0}, ""),
    ],
)
def test_vectors_are_chosen_only_where_they_are_as_good(fields, why):
    recipe, said = chosen(config(64), config(1024), **fields)
    assert recipe.teacher == "hidden_cache" and why in said and bool(why) == bool(said)


def test_a_student_that_caps_its_logits_learns_from_hidden_states_and_what_is_asked_for_stays():
    capped = AutoConfig.for_model("gemma2", hidden_size=64, final_logit_softcapping=30.0)
    recipe, why = chosen(capped, config(1024))
    assert recipe.teacher == "hidden_cache" and "caps its logits" in why
    assert chosen(config(64), config(1024), teacher="online")[0].teacher == "online"


@pytest.mark.parametrize("words", [[], ["--method", "sft"], ["--method", "sft", "--lora_rank", "4"]])
def test_without_an_adapter_or_a_teacher_nothing_is_left_to_choose(words, tmp_path):
    recipe = parse_recipe(["--data", "d.jsonl", *words])[0]
    assert recipe.teacher == "hidden_cache"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_as_yaml(recipe))
    assert parse_recipe(["--config", str(path)])[0] == recipe


# The tiny student is a third as wide as this teacher.
PAIR = dict(teacher_model_name_or_path="bundled:reasoner", lora_rank=4, max_steps=2, save_steps=1)


def stored(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())["teacher"]


def test_a_run_says_and_stores_what_was_chosen_and_resumes_with_it(run, capsys):
    pytest.importorskip("peft")
    folder = run(**PAIR)
    said = capsys.readouterr().out
    assert stored(folder) == "vector_cache" and "teacher: vector_cache (264 bytes a token in vectors, 768 in" in said
    wanted = losses(folder)
    shutil.rmtree(folder / "checkpoint-2")
    run(resume_from_checkpoint="latest", **PAIR)
    assert losses(folder) == wanted and stored(folder) == "vector_cache"
    said = refusal(capsys, lambda: run(resume_from_checkpoint="latest", teacher="hidden_cache", **PAIR))
    assert "teacher: vector_cache -> hidden_cache" in said


def test_a_resumed_run_keeps_the_kind_it_was_started_with(run):
    pytest.importorskip("peft")
    folder = run(teacher="hidden_cache", **PAIR)
    wanted = losses(folder)
    shutil.rmtree(folder / "checkpoint-2")
    run(resume_from_checkpoint="latest", **PAIR)
    assert losses(folder) == wanted and stored(folder) == "hidden_cache"


def test_both_kinds_give_the_same_loss(run):
    pytest.importorskip("peft")
    chosen, hidden = (losses(run(kind, teacher=kind, **PAIR)) for kind in ("auto", "hidden_cache"))
    for one, other in zip(chosen, hidden, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_what_trsd_cache_chose_training_goes_on_with(words, run, tmp_path):
    pytest.importorskip("peft")
    from trsd import cache

    cache.main(words(**PAIR))
    assert stored(tmp_path / "run") == "vector_cache"
    built = (tmp_path / "run" / "teacher" / "manifest.json").stat().st_mtime_ns
    folder = run(**PAIR)
    assert (folder / "teacher" / "manifest.json").stat().st_mtime_ns == built and len(losses(folder)) == 2
