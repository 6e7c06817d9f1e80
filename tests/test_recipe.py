from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from trsd.recipe import AttentionBackend, Recipe, resolve_budgets, with_method_defaults
from trsd.recipe_file import load_recipe, parse_recipe, recipe_as_yaml, shipped_recipes
from trsd_kernels.attention_backends import BACKENDS


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_flags_override_yaml_overrides_defaults(write):
    path = write("learning_rate: 1e-3\ntrain_batch_size: 7\neval_budgets: [0, 50%]\nmax_steps: null\n")
    recipe, name, dry_run = parse_recipe(["--config", path, "--train_batch_size", "9", "--dry_run"])
    assert (recipe.learning_rate, recipe.train_batch_size, recipe.warmup_ratio) == (1e-3, 9, Recipe().warmup_ratio)
    assert recipe.eval_budgets == ("0", "50%") and recipe.max_steps is None
    assert name == "r" and dry_run


def test_lists_are_comma_separated_flags():
    recipe, _, _ = parse_recipe(["--eval_budgets", "0,16,50%", "--cut_fractions", "0.1,0.9"])
    assert recipe.eval_budgets == ("0", "16", "50%") and recipe.cut_fractions == (0.1, 0.9)


def test_recipe_as_yaml_loads_to_the_same_recipe(write):
    recipe = replace(Recipe(), cut_fractions=(0.1, 0.2), closer="a\n</think>\n", bf16=True, max_steps=None)
    assert parse_recipe(["--config", write(recipe_as_yaml(recipe))])[0] == with_method_defaults(recipe)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse(name):
    assert parse_recipe(["--config", name])[0].problems() == []


def test_unknown_yaml_key_exits_2_with_a_suggestion(write, capsys):
    assert "unknown key 'learning_rte'; did you mean learning_rate?" in refusal(
        capsys, ["--config", write("learning_rte: 1\n")]
    )


@pytest.mark.parametrize(
    ("written", "taken"), [("1:30", 90), ("-1:30", -90), ("0100", 64), ("-0_17", -15), ("1:30.5", 90.5)]
)
def test_numbers_that_yaml_takes_for_others_are_refused(write, capsys, written, taken):
    found = refusal(capsys, ["--config", write(f"seed: 3\ntimeout_seconds: {written}\n")])
    assert f"r.yaml:2: YAML takes {written} for {taken}: write the number itself" in found


def test_other_ways_to_write_numbers_in_yaml_are_taken(write):
    recipe = load_recipe(
        Path(write("max_steps: 1_000\nseed: 0x10\nlearning_rate: 1e-4\nalpha: 0.5\nlogging_steps: +7\n"))
    )
    assert (recipe.max_steps, recipe.seed, recipe.learning_rate, recipe.alpha) == (1000, 16, 1e-4, 0.5)
    assert recipe.logging_steps == 7


def test_unknown_flag_exits_2_with_a_suggestion(capsys):
    assert "--learning_rate" in refusal(capsys, ["--learning_rte", "1"])


@pytest.mark.parametrize(
    "text,key",
    [
        ("learning_rate: fast\n", "learning_rate"),
        ("max_steps: 1.5\n", "max_steps"),
        ("bf16: maybe\n", "bf16"),
        ("cut: middle\n", "cut"),
        ("cut_budgets: [a]\n", "cut_budgets"),
        ("data: {a: 1}\n", "data"),
        ("data: null\n", "data: expected text"),
        ("closer: no\n", "closer: expected text, got False"),
        ("seed: 1\nseed: 2\n", "seed given twice"),
        ("weight_decay: -1\n", "weight_decay"),
        ("sampling_top_p: 0\n", "sampling_top_p"),
        ("thinking_weight: .nan\n", "thinking_weight"),
        ("alpha: 2\n", "alpha"),
        ("temperature: 0\n", "temperature"),
        ("train_batch_size: 0\n", "train_batch_size"),
        ("max_tokens_per_batch: 100\n", "max_tokens_per_batch"),
        ("eval_budgets: [half]\n", "eval_budgets"),
        ("eval_budgets: [99999999999999999999]\n", "eval_budgets"),
        ("seed: -1\n", "seed: expected 0"),
        ("cut: fractions\ncut_fractions: [1.5]\n", "cut_fractions"),
        ("resume_from_checkpoint: latest\n", "resume_from_checkpoint"),
        ("- a\n- b\n", "key: value"),
        ("a: [\n", "not YAML"),
    ],
)
def test_wrong_value_exits_2_and_names_the_key(write, capsys, text, key):
    assert key in refusal(capsys, ["--config", write(text)])


@pytest.mark.parametrize("path", ["nowhere.yaml", "/tmp"])
def test_missing_recipe_exits_2_and_lists_the_shipped_ones(capsys, path):
    error = refusal(capsys, ["--config", path])
    assert f"no recipe at {path}" in error and "demo" in error


def test_without_arguments_it_is_the_demo():
    assert parse_recipe([])[:2] == parse_recipe(["--config", "demo"])[:2]
    assert parse_recipe(["--seed", "3"])[0].eval_data == "bundled:questions/evaluation.jsonl"


@pytest.mark.parametrize("words", [["--model_name_or_path", "m"], ["--data=d.jsonl"], ["--model-name-or-path", "m"]])
def test_a_model_or_data_of_ones_own_does_not_inherit_the_demos_limits(words):
    recipe, name, _ = parse_recipe(words)
    assert (recipe.max_thinking_tokens, recipe.eval_data, name) == (Recipe().max_thinking_tokens, None, "run")


def test_resolve_budgets_takes_percents_of_the_median():
    assert resolve_budgets(("0", "25%", "64", "100%"), 90.0) == {"0": 0, "25%": 22, "64": 64, "100%": 90}


def test_every_attention_back_end_can_be_named():
    assert get_args(AttentionBackend) == ("auto", "triton", *(name for name in BACKENDS if name != "triton"))


def test_every_field_is_documented():
    import inspect

    source = inspect.getsource(Recipe)
    for name in yaml.safe_load(recipe_as_yaml(Recipe())):
        line = source.index(f"    {name}:")
        assert source[line:].split("\n")[1].strip().startswith('"""'), name
    assert len(yaml.safe_load(recipe_as_yaml(Recipe()))) <= 75


def test_a_recipe_builds_on_another_and_overrides_it(write, tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-3\nseed: 4\n")
    recipe, name, _ = parse_recipe(["--config", write("base: base.yaml\nseed: 5\n")])
    assert (recipe.learning_rate, recipe.seed, name) == (1e-3, 5, "r")
    shipped = parse_recipe(["--config", write("base: demo\nmax_steps: 3\n")])[0]
    assert shipped == replace(parse_recipe(["--config", "demo"])[0], max_steps=3)


def test_recipes_that_build_on_each_other_in_a_circle_are_refused(write, capsys):
    assert "in a circle" in refusal(capsys, ["--config", write("base: r.yaml\n")])


def test_the_papers_seven_pairs_differ_in_their_models_alone():
    pairs = {name: parse_recipe(["--config", name])[0] for name in shipped_recipes() if name.startswith("lsp-qwen3")}
    models = {(r.teacher_model_name_or_path, r.model_name_or_path) for r in pairs.values()}
    assert len(pairs) == len(models) == 7
    assert all("Qwen/Qwen3-" in teacher and student.endswith("-Base") for teacher, student in models)
    same = {replace(r, model_name_or_path="", teacher_model_name_or_path="") for r in pairs.values()}
    assert len(same) == 1
    (recipe,) = same
    assert (recipe.method, recipe.learning_rate, recipe.weight_decay, recipe.alpha) == ("lsp", 4e-6, 0.05, 0.5)
    assert (recipe.train_batch_size, recipe.num_train_epochs, recipe.lr_scheduler_type) == (8, 2, "onecycle")
    assert recipe.loss_sections == "p+cot+a" and recipe.max_length == 4096


@pytest.mark.parametrize(
    "method,alpha,fraction,sections",
    [("trsd", 1.0, None, None), ("lsp", 0.5, 0.5, "p+cot+a"), ("sft", 0.0, 1.0, "cot+a"), ("palign", 0.0, None, None)],
)
def test_a_method_says_what_a_field_left_out_is(method, alpha, fraction, sections):
    recipe = parse_recipe(["--method", method, "--model_name_or_path", "m", "--teacher_model_name_or_path", "t"])[0]
    assert (recipe.alpha, recipe.keep_fraction, recipe.loss_sections) == (alpha, fraction, sections)


@pytest.mark.parametrize("words", [["--method", "lsp"], ["--method=lsp"]])
def test_a_method_alone_is_its_demo(words):
    assert parse_recipe(words)[0] == parse_recipe(["--config", "demo-lsp"])[0]
    assert parse_recipe(["--method", "trsd"])[0] == parse_recipe([])[0]


@pytest.mark.parametrize(
    "text,key",
    [
        ("method: sft\nalpha: 0.5\n", "alpha: method sft learns text without a teacher"),
        ("method: lsp\n", "teacher_model_name_or_path: lsp learns from a larger teacher"),
        ("method: sft\nkeep_fraction: 0\n", "keep_fraction: expected more than 0"),
        ("method: sft\ncut: budgets\n", "cut: method sft does not read it"),
        ("keep_fraction: 0.5\n", "keep_fraction: method trsd does not read it (methods that do: lsp, sft)"),
        ("method: sft\ntruncation: endpoints\nkeep_side: right\n", "keeps both ends"),
        ("method: sft\ntruncation: first_derivation\nkeep_fraction: 0.3\n", "decides by itself"),
        ("teacher_top_k: 0\n", "teacher_top_k: expected at least 1"),
        ("lora_rank: 0\n", "lora_rank: expected at least 1"),
        ("gradient_checkpointing_policy: selective\n", "without gradient_checkpointing nothing is recomputed"),
        (
            "gradient_checkpointing_policy: selective\ngradient_checkpointing: true\ntorch_compile: true\n",
            "with torch_compile layers recompute what is cheap by themselves",
        ),
        ("method: sft\nteacher: online\n", "teacher: method sft does not read it"),
        ("lora_base: nf4\n", "lora_base: there is no adapter without lora_rank"),
        ("lora_base: nf4\nlora_rank: 8\nteacher: adapter_off\n", "adapter_off would be the student in nf4"),
        ("lora_alpha: 8\n", "lora_alpha: there is no adapter without lora_rank"),
        ("lora_target_modules: [q_proj]\n", "lora_target_modules: there is no adapter without lora_rank"),
        ("teacher: vector_cache\n", "teacher: vector_cache needs lora_rank, without it the lm_head would move"),
        ("teacher: adapter_off\n", "teacher: adapter_off needs lora_rank, without it there is no adapter"),
        ("teacher: vector_cache\nlora_rank: 8\ndivergence: jsd\n", "vector_cache holds the forward KL only"),
        ("teacher: adapter_off\nlora_rank: 8\nteacher_model_name_or_path: t\n", "the student itself is the teacher"),
        ("teacher: online\nteacher_cache_dir: c\n", "teacher_cache_dir: teacher online keeps nothing on disk"),
        ("method: sft\nteacher_cache_dir: c\n", "teacher_cache_dir: method sft does not read it"),
    ],
)
def test_what_a_method_cannot_use_exits_2_and_says_so(write, capsys, text, key):
    assert key in refusal(capsys, ["--config", write(text)])


def test_another_method_over_a_recipe_starts_from_its_own_defaults_and_says_so(write, capsys):
    base = parse_recipe(["--config", "lsp-qwen3-8b-4b"])[0]
    recipe = parse_recipe(["--config", "lsp-qwen3-8b-4b", "--method", "sft"])[0]
    assert (recipe.alpha, recipe.keep_fraction, recipe.loss_sections, recipe.teacher) == (0, 1, "cot+a", "hidden_cache")
    assert (recipe.learning_rate, recipe.model_name_or_path) == (base.learning_rate, base.model_name_or_path)
    said = capsys.readouterr().err
    assert "lsp-qwen3-8b-4b is of method lsp, so left out: keep_fraction, teacher, alpha" in said
    resolved = write(recipe_as_yaml(base))
    assert parse_recipe(["--config", resolved, "--method", "sft", "--keep_fraction", "0.7"])[0].keep_fraction == 0.7
    assert parse_recipe(["--config", write("base: lsp-qwen3-8b-4b\nmethod: sft\n")])[0] == recipe


def test_lsp_may_learn_from_the_student_it_was(write):
    recipe = parse_recipe(["--config", write("method: lsp\nteacher: adapter_off\nlora_rank: 8\n")])[0]
    assert recipe.teacher_model_name_or_path is None and recipe.alpha == 0.5


@pytest.mark.parametrize(
    "words,wanted",
    [
        (["--bf16"], True),
        (["--bf16", "--seed", "3"], True),
        (["--bf16", "False"], False),
        (["--bf16=False"], False),
        (["--close-unfinished", "--bf16", "True"], True),
    ],
)
def test_a_switch_alone_means_true(words, wanted):
    recipe, _, _ = parse_recipe([*words, "--data", "d.jsonl"])
    assert recipe.bf16 is wanted and recipe.close_unfinished == ("--close-unfinished" in words)


@pytest.mark.parametrize(
    "words,wanted", [(["--dry_run"], True), (["--dry_run", "True"], True), (["--dry_run=False"], False), ([], False)]
)
def test_dry_run_is_a_switch_like_any(words, wanted):
    assert parse_recipe([*words, "--seed", "4"])[2] is wanted


def test_a_model_as_teacher_is_told_its_flag(capsys):
    for name in ("bundled:reasoner", "Qwen/Qwen3-8B"):
        with pytest.raises(SystemExit) as exit_:
            parse_recipe(["--teacher", name])
        said = capsys.readouterr().err
        assert exit_.value.code == 2
        assert "a model goes to --teacher_model_name_or_path" in said and "hidden_cache" in said


def test_a_method_that_is_none_is_refused_before_anything_is_said_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--method", "LSP"])
    said = capsys.readouterr()
    assert "left out" not in said.err and "LSP" in said.err + said.out


@pytest.mark.parametrize(
    "words,hint",
    [
        (["questions.jsonl"], "hint: --data questions.jsonl?"),
        (["--eval_budgets", "0,", "50%"], "hint: a list is one word, without spaces: 0,50%"),
    ],
)
def test_words_that_belong_to_no_flag_come_with_what_was_meant(words, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(words)
    assert exit_.value.code == 2 and hint in capsys.readouterr().err


def test_a_wrong_type_in_yaml_names_the_file_and_a_command_whose_help_there_is(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("seed: fast\n")
    with pytest.raises(SystemExit):
        load_recipe(path)
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "python -m trsd.train --help" in text and f"is wrong in {path}" in text and "expected a whole number" in text


def test_a_folder_that_is_called_like_a_kind_of_targets_hides_it_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("online", "mine"):
        (tmp_path / name).mkdir()
    assert parse_recipe(["--teacher", "online"])[0].teacher == "online"
    with pytest.raises(SystemExit):
        parse_recipe(["--teacher", "mine"])
    assert "a model goes to --teacher_model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,takes",
    [
        ("--cut_fractions 0.5", "cut fractions"),
        ("--cut-budgets=10", "cut budgets"),
        ("--judge answer", "cut judged"),
        ("--beta 0.3", "divergence jsd"),
        ("--teacher_top_k 8", "teacher top_k_cache"),
        ("--sampling_top_p 0.5", "a sampling_temperature above 0"),
        ("--eval_budgets 0,50%", "eval_data"),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(words, takes, capsys):
    assert f"only {takes} reads it" in refusal(capsys, ["--data", "q.jsonl", *words.split()])


@pytest.mark.parametrize(
    "words",
    [
        "--data q.jsonl --cut fractions --cut_fractions 0.5",
        "--data q.jsonl --divergence jsd --beta 0.3",
        "--data q.jsonl --beta 0.5",  # as it is anyway
        "--config demo --cut uniform",  # whose cut_fractions were for another cut
        "--method palign --judge answer --data q.jsonl",
    ],
)
def test_what_is_read_or_was_only_in_the_recipe_is_not_refused(words):
    parse_recipe(words.split())
