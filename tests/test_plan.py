"""python -m trsd.plan: what fits, what to turn, and what cannot be planned."""

import re

import pytest
import yaml
from conftest import refusal
from transformers import GptOssConfig, Qwen3MoeConfig

from trsd import plan, planner
from trsd.errors import InputError
from trsd.model_shapes import config_of
from trsd.plan_report import GIB, Plan
from trsd.planned_lengths import shared_lengths
from trsd.planning import alternatives, planned_method, planned_traces, together
from trsd.recipe import Recipe

SMALL = [
    "--model",
    "bundled:reasoner",
    "--max_length",
    "512",
    "--max_tokens_per_batch",
    "1024",
    "--train_batch_size",
    "4",
]


def planned(capsys, *words):
    plan.main(words)
    return capsys.readouterr().out


def make_plan(*words):
    return planner.run(*plan.parse(words)[:2])


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Leaves out the alternative whose tracing takes most of a small plan's time."""
    all_of_them = planner.alternatives

    def without(*args, **kwargs):
        return [change for change in all_of_them(*args, **kwargs) if "torch_compile" not in change]

    monkeypatch.setattr(planner, "alternatives", without)


def test_a_dry_run_shows_the_recipe_and_plans_nothing(capsys, monkeypatch):
    monkeypatch.setattr(planner, "run", lambda *_: pytest.fail("it planned"))
    text = planned(capsys, *SMALL, "--gpu", "H200", "--dry_run", "True", "--seed", "7")
    assert yaml.safe_load(text)["seed"] == 7


def test_a_plan_says_memory_time_disk_and_what_fits(capsys):
    text = planned(capsys, *SMALL, "--gpu", "H200")
    for wanted in ("optimizer state", "it fits", "s at least", "teacher targets on disk", "the recipe as it is"):
        assert wanted in text
    parts = [float(x) for x in re.findall(r"^  (?!peak)\D.*?([\d.]+)$", text.split("\n\n")[1], flags=re.M)]
    total = float(re.search(r"peak of live tensors\s+([\d.]+)", text)[1])
    assert sum(parts) == pytest.approx(total, abs=0.05)


def test_what_does_not_fit_names_the_settings_that_would(nothing_compiled):
    enough = make_plan(*SMALL, "--gpu", "H200")
    found = make_plan(*SMALL, "--gpu", "H200", "--gpu_memory", f"{0.999 * enough.needed(enough.cost) / GIB:.6f}")
    assert found.fits(found.cost) is False
    changes = [change for change, _ in found.alternatives]
    assert {"gradient_checkpointing": True} in changes and {"lora_rank": 16} in changes
    combined = [(change, cost) for change, cost in found.alternatives if len(change) > 1]
    assert combined and all(found.needed(cost) < found.needed(found.cost) for _, cost in combined)


def test_a_change_that_cannot_be_planned_is_told_with_its_reason(capsys, monkeypatch):
    true = planner.step_cost

    def step_cost(recipe, *args, **kwargs):
        if recipe.torch_compile:
            raise InputError("torch_compile: this torch does not show what it compiles")
        return true(recipe, *args, **kwargs)

    monkeypatch.setattr(planner, "step_cost", step_cost)
    text = planned(capsys, *SMALL, "--gpu", "H200")
    assert "--torch_compile True (torch_compile: this torch does not show what it compiles)" in text
    assert re.search(r"[\d.]+ +[\d.]+ +yes +--gradient_checkpointing True$", text, flags=re.M)


def test_teacher_is_a_model_or_where_targets_come_from():
    _, recipe, _ = plan.parse([*SMALL, "--method", "lsp", "--teacher", "Qwen3-8B", "--teacher", "online"])
    assert (recipe.teacher_model_name_or_path, recipe.teacher) == ("Qwen3-8B", "online")
    assert recipe.model_name_or_path == "bundled:reasoner" and recipe.keep_fraction == 0.5


def test_a_shipped_recipe_can_be_planned():
    arguments, recipe, _ = plan.parse(["--config", "lsp-qwen3-8b-4b", "--gpus", "2"])
    assert recipe.teacher_model_name_or_path == "Qwen/Qwen3-8B" and arguments.gpus == 2


def test_several_gpus_share_all_but_activations(nothing_compiled):
    one, four = (make_plan(*SMALL, "--gpu", "H100", "--gpus", count) for count in "14")
    before, after = one.held(one.cost), four.held(four.cost)
    assert after["optimizer state"] == before["optimizer state"] / 4
    assert after["activations"] == before["activations"]
    assert after["gathered: two layers, a head"] > 0


def test_caches_are_counted_for_all_traces(capsys, nothing_compiled):
    text = planned(capsys, *SMALL, "--gpu", "cpu", "--answer_tokens", "100", "--num_traces", "1000000")
    assert "teacher targets on disk: 71.53 GiB for 1,000,000 traces (hidden_cache)" in text  # 100 rows of 192 fp32
    assert "teacher targets on disk: none" in planned(capsys, *SMALL, "--method", "sft", "--gpu", "cpu")


def test_lengths_fill_the_trace():
    assert sum(shared_lengths(4096)) == 4096 and sum(shared_lengths(8)) == 8
    trace = planned_traces(1, (5, 20, 7))[0]
    assert (len(trace.prompt_ids), trace.num_tokens) == (5, 32)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--model", "./nothing"], "no model folder at ./nothing"),
        (["--gpu", "Abacus"], "known are H200"),
        (["--gpus", "0"], "gpus: expected at least 1"),
        (["--gpu_memory", "-3"], "gpu_memory: expected GiB"),
        (["--gpu_memory", "much"], "gpu_memory"),
        (["--answer_tokens", "600"], "longer than max_length 512"),
        (["--answer_tokens", "0"], "answer_tokens: expected at least 1"),
        (["--branches", "3"], "branches_per_trace"),
        (["--teacher", "vector_cache"], "needs lora_rank"),
        (["--max_length", "2048"], "max_tokens_per_batch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_says_why(words, said, capsys):
    assert said in refusal(capsys, lambda: plan.main([*SMALL, *words]))


def test_help_says_what_a_model_may_be(capsys):
    with pytest.raises(SystemExit) as exit_:
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "--model NAME" in text and "Qwen3-8B" in text and "--gpu_memory" in text


def test_settings_that_are_set_are_not_offered():
    taken = dict(torch_compile=True, gradient_checkpointing=True, lora_rank=4, loss_chunk_bytes=2**20)
    recipe = Recipe(alpha=1.0, teacher="online", **taken)
    offered = alternatives(recipe, target="cuda")
    assert {"gradient_checkpointing": False} in offered and {"teacher": "hidden_cache"} in offered
    assert [*together(offered)] == [{"teacher": "hidden_cache", "max_tokens_per_batch": 8192}]


def test_a_device_without_known_memory_fits_nothing_and_refuses_nothing(nothing_compiled):
    found = make_plan(*SMALL, "--gpu", "cpu")
    assert isinstance(found, Plan) and found.fits(found.cost) is None
    assert all(len(change) == 1 for change, _ in found.alternatives)


def test_names_and_flags_are_taken_as_people_spell_them(capsys):
    arguments, recipe, _ = plan.parse(["--model", "qwen/qwen3-4b", "--gpu-memory=24", "--max-length", "1024"])
    assert arguments.gpu_memory == 24 and recipe.max_length == 1024
    assert config_of(recipe.model_name_or_path).hidden_size == 2560
    assert "did you mean Qwen3-" in refusal(capsys, lambda: plan.main(["--model", "Qwen3-7B"]))


def test_a_large_model_is_planned_for_a_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(planner.torch.cuda, "is_available", lambda: False)
    named, bundled = (planner.ceilings_of(plan.PlanArguments(), bundled=flag)[0] for flag in (False, True))
    assert (named.name, bundled.name) == (planner.DEFAULT_GPU, "CPU")


def test_models_that_cannot_be_planned_say_why(tmp_path, capsys):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=16)
    GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path / "sinks")
    Qwen3MoeConfig(**shape, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16).save_pretrained(
        tmp_path / "moe"
    )
    words = ["--max_length", "64", "--max_tokens_per_batch", "64", "--train_batch_size", "1", "--model"]
    for name in ("sinks", "moe"):
        assert "experts" in refusal(capsys, lambda name=name: plan.main([*words, str(tmp_path / name)]))


def test_a_cut_that_leaves_no_label_says_so(capsys):
    flags = ["--method", "sft", "--loss_sections", "a", "--keep_fraction", "0.5"]
    assert "no token to learn is left by the cut" in refusal(capsys, lambda: plan.main([*SMALL, *flags]))


def test_a_folder_is_read_whatever_it_is_called(tmp_path, tiny_folder):
    named = tiny_folder.rename(tmp_path / "Qwen3-8B")
    assert config_of(str(named)).hidden_size == 64


def test_an_epoch_is_as_many_steps_as_its_traces_need(capsys, nothing_compiled):
    found = make_plan(*SMALL, "--gpu", "H100")
    step = sum(found.cost.seconds.values())
    count = round(3600 * 4 / step)  # of four traces a step: an hour
    for gpus, said in ((1, "1:00:0"), (2, "30:0")):
        text = planned(capsys, *SMALL, "--gpu", "H100", "--num_traces", str(count), "--gpus", str(gpus))
        assert f"an epoch of {count:,} traces: at least {said}" in text
    assert "a step of each GPU: 4 traces" in text


def test_where_only_text_can_decide_the_whole_is_kept():
    _, recipe, _ = plan.parse([*SMALL, "--method", "sft", "--truncation", "first_derivation"])
    example = planned_method(recipe, planned_traces(1, (10, 40, 20))).teacher_example(0)
    assert len(example.input_ids) == 69  # all but the last, which is a label only
