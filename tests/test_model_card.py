"""The model card: what it says, that no name breaks it, and that its code does what the trainer's own does."""

import io
import json
import os
import re
import shutil

import pytest
import yaml
from conftest import REASONER, make_tiny_model
from huggingface_hub import ModelCard as HubCard
from test_adapters import save_adapted

from trsd import model_card
from trsd.adapters import add_adapter
from trsd.decoding import Decoder, Limits
from trsd.engines.hf import HFEngine
from trsd.errors import InputError
from trsd.manifest import replace_unloaded, verify, write_manifest
from trsd.merging import merge, merge_adapter
from trsd.model_card import CARD, ModelCard, base_of, serving_facts
from trsd.models import load_model
from trsd.recipe import Recipe, with_method_defaults
from trsd.recipe_file import load_recipe, resolve_config, shipped_recipes
from trsd.serving_snippets import LLAMA_CPP, TRANSFORMERS, VLLM, Serving, program, vllm_program, vllm_serve
from trsd.thinking import CLOSERS, ThinkFormat

HOSTILE = ["plain", "a|b", "`x```y`", "*[z](http://u)*", "<b>&amp;</b>", "colon: # - 'quote\" \\n", "ünï\u2028cødé"]


def card_of(tokenizer, think, **settings):
    return ModelCard(with_method_defaults(Recipe(**settings)), think, tokenizer)


def result(accuracy, tokens=(0, 40)):
    """An evaluation as evaluate.py writes it, of what a card reads."""
    figures = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    return {
        "num_questions": 30,
        "sampling": {"temperature": 0.0},
        "auc": accuracy / 2,
        "budgets": [{"budget": f"{count}", "tokens": count} | figures for count in tokens],
        "unconstrained": figures | {"mean_thinking_tokens": 90.0},
    }


def test_figures_before_and_after_stand_in_columns_of_their_own(tokenizer, think):
    text = card_of(tokenizer, think).text(7, result(0.25), result(0.75))
    assert "| 40 | 40 | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] |" in text
    assert "| free | 90 → 90 | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] |" in text
    assert "Area under the curve: 0.125 → 0.375." in text


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_card_of_every_recipe_has_front_matter_that_the_hub_reads(name, tokenizer, think):
    recipe = with_method_defaults(load_recipe(resolve_config(name)))
    text = ModelCard(recipe, think, tokenizer).text(7, result(0.25))
    data = HubCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data.get("base_model") == (None if "bundled" in recipe.model_name_or_path else recipe.model_name_or_path)
    assert data["trsd"]["closer"] == think.closer and data["trsd"]["budgets"] == [0, 40]
    shown = yaml.safe_load(blocks(text, "yaml")[0])
    assert shown.items() >= {"learning_rate": recipe.learning_rate}.items() or recipe.learning_rate == 1e-5
    assert f"after 7 steps of {recipe.method.upper()}" in text


@pytest.mark.parametrize("closer", [*CLOSERS, "``` stop ```\n{close}\n", 'it\'s "time": #1 \\ {close} `now`'])
def test_the_closer_comes_back_as_it_was_from_front_matter_and_code(closer, tokenizer, tmp_path):
    think = ThinkFormat.of(tokenizer, closer=closer)
    text = card_of(tokenizer, think).text(1)
    (tmp_path / CARD).write_text(text, encoding="utf-8")
    assert serving_facts(tmp_path)["closer"] == think.closer
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    fences = [token for token in markdown.parse(text) if token.type == "fence"]
    python = [token.content for token in fences if token.info == "python"]
    assert python[0] == f"{think.closer!r}\n" and f"CLOSER, CLOSE_TAG, OPENER = {think.closer!r}" in python[1]
    assert [token.info for token in fences].count("python") == 4
    for content in python:
        compile(content, "card", "exec")


def test_a_recipe_with_a_fence_in_it_stays_one_block(tokenizer, tmp_path):
    closer = "x\n```\n# not a heading {close}\n"
    card = card_of(tokenizer, ThinkFormat.of(tokenizer, closer=closer), closer=closer).text(1)
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (recipe,) = [token.content for token in markdown.parse(card) if token.type == "fence" and token.info == "yaml"]
    assert yaml.safe_load(recipe)["closer"] == closer


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_card_and_no_path_of_the_machine_is_in_it(name, tokenizer, think, tmp_path):
    folder = tmp_path / name.replace("/", ".")
    shutil.copytree(REASONER, folder)
    text = card_of(tokenizer, think, model_name_or_path=str(folder), data=f"{folder}.jsonl").text(3, result(0.5))
    assert str(tmp_path) not in text
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(text.split("---\n", 2)[2])
    (title,) = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h1"]
    shown = "".join(child.content for child in title.children)
    assert shown == f"{' '.join(folder.name.split())} after 3 steps of TRSD"
    assert [child.type for child in title.children if child.type not in ("text", "text_special")] == []
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type in ("td_open", "th_open")]
    assert len(rows) == 5 + 4 and len(cells) == 2 * 5 + 3 * 4
    assert not [token for token in tokens if token.type == "html_block"]


def test_the_base_is_named_by_the_hub_wherever_its_folder_lies(tmp_path):
    cache = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    assert base_of(str(cache)) == model_card.Base("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert base_of("Qwen/Qwen3-0.6B").hub_name == "Qwen/Qwen3-0.6B"
    assert base_of("bundled:reasoner") == model_card.Base("bundled reasoner of trsd", None, "apache-2.0")
    tuned = tmp_path / "night" / "checkpoint-40"
    tuned.mkdir(parents=True)
    assert base_of(str(tuned)) == model_card.Base("night/checkpoint-40")
    (tuned / CARD).write_text("---\nbase_model: Qwen/Qwen3-4B\nlicense: mit\n---\n# x\n")
    assert base_of(str(tuned)) == model_card.Base("night/checkpoint-40", "Qwen/Qwen3-4B", "mit")
    (tuned / CARD).write_text("---\nbase_model: [unclosed\n---\n")
    (tuned / "config.json").write_text('{"_name_or_path": "Qwen/Qwen3-8B"}')
    assert base_of(str(tuned)).hub_name == "Qwen/Qwen3-8B"
    (tuned / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path)}))
    assert base_of(str(tuned)).hub_name is None


def test_facts_of_another_form_are_refused_and_no_card_has_none(tokenizer, think, tmp_path):
    assert serving_facts(tmp_path) is None
    text = card_of(tokenizer, think).text(1, result(0.5))
    for old, new in (("max_answer_tokens: 512", "max_answer_tokens: many"), ("- 40", "- forty")):
        assert old in text
        (tmp_path / CARD).write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match="under trsd in its front matter"):
            serving_facts(tmp_path)


def test_a_run_leaves_a_card_with_both_evaluations_in_a_checkpoint_that_is_whole(run):
    folder = run(
        eval_data="bundled:questions/evaluation.jsonl",
        max_eval_samples=3,
        max_thinking_tokens=12,
        max_answer_tokens=4,
        eval_budgets="0,8",
        max_steps=2,
        save_steps=1,
    )
    verify(folder / "checkpoint-2")
    last, first = ((folder / f"checkpoint-{step}" / CARD).read_text() for step in (2, 1))
    after = json.loads((folder / "eval" / "after.json").read_text())
    row = after["budgets"][1]
    assert f"| {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |" in last
    assert "accuracy after training" in last and "accuracy after training" not in first
    assert "accuracy before training" in first and "thinking budgets of 0, 8 tokens" in first
    assert "3 questions, greedy" in last and str(folder) not in last
    assert serving_facts(folder / "checkpoint-2")["budgets"] == [0, 8]


def test_a_card_that_changes_leaves_a_whole_checkpoint_wherever_it_is_killed(tmp_path, monkeypatch):
    def fail_at(count):
        seen = iter(range(100))
        real = os.replace

        def replace(source, target):
            if next(seen) == count:
                raise KeyboardInterrupt
            real(source, target)

        return replace

    for count in range(4):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / CARD).write_text("# before\n")
        write_manifest(folder)
        with monkeypatch.context() as patch:
            patch.setattr("trsd.files.os.replace", fail_at(count))
            if count < 3:
                with pytest.raises(KeyboardInterrupt):
                    replace_unloaded(folder, CARD, "# after\n")
            else:
                replace_unloaded(folder, CARD, "# after\n")
        verify(folder)
        assert (folder / CARD).read_text() == ("# before\n" if count < 2 else "# after\n")
        replace_unloaded(folder, CARD, "# again\n")
        verify(folder)
    (folder / CARD).write_text("# damaged\n")
    with pytest.raises(InputError, match="README.md has 10 bytes"):
        verify(folder)


def test_what_could_be_loaded_is_never_replaced_outside_the_manifest(tmp_path):
    for name in ("config.json", "model.safetensors", "state/notes.md"):
        with pytest.raises(ValueError, match="no loader takes"):
            replace_unloaded(tmp_path, name, "")


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory, tokenizer, think):
    """(folder, decoder) of the bundled reasoner, whose folder has a card."""
    import torch

    folder = tmp_path_factory.mktemp("served") / "reasoner"
    shutil.copytree(REASONER, folder)
    decoder = Decoder(
        HFEngine(load_model(folder, dtype=torch.float32, device="cpu"), tokenizer, batch_size=4), tokenizer, think
    )
    return folder, decoder


QUESTION = (
    "Ravi has 27 pears. He buys 5 bags with 4 pears each. He sells 4 of the pears. How many pears does Ravi have now?"
)
BUDGETS = (0, 40, 137, 138, 142, 250)  # it thinks 138 tokens, and answers in 12


def said_at(decoder, budget):
    prompt = decoder.think.prompt_ids(decoder.tokenizer, [{"role": "user", "content": QUESTION}])
    limits = Limits(max_thinking_tokens=250, max_answer_tokens=32)
    _, at = decoder.think_at_budgets([prompt], [budget], limits)
    (answer,) = at[budget]
    return decoder.tokenizer.decode([*answer.reasoning_ids, *answer.close_ids, *answer.answer_ids])


def play(snippet, capsys):
    """What a snippet prints, asked our question."""
    exec(compile(snippet.replace("How many prime numbers are there below 20?", QUESTION), "card", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_cards_own_code_answers_as_the_evaluation_does(budget, reasoner, capsys, monkeypatch):
    folder, decoder = reasoner
    monkeypatch.chdir(folder)
    serving = Serving.of(decoder.think, decoder.tokenizer, budget=budget, max_answer_tokens=32)
    assert play(program(serving, TRANSFORMERS), capsys) == said_at(decoder, budget) + "\n"


def test_the_cards_own_code_takes_no_penalty_from_the_folder(reasoner, capsys, monkeypatch, tmp_path):
    folder, decoder = reasoner
    shutil.copytree(folder, tmp_path / "penal")
    path = tmp_path / "penal" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 3.0}))
    monkeypatch.chdir(tmp_path / "penal")
    serving = Serving.of(decoder.think, decoder.tokenizer, budget=40, max_answer_tokens=32)
    assert play(program(serving, TRANSFORMERS), capsys) == said_at(decoder, 40) + "\n"


@pytest.mark.parametrize("writer", [VLLM, LLAMA_CPP], ids=["vllm", "llama.cpp"])
@pytest.mark.parametrize("budget", [40, 138, 250])
def test_the_code_for_servers_does_the_same_over_http(writer, budget, reasoner, capsys, monkeypatch):
    folder, decoder = reasoner
    asked = []

    def urlopen(request):
        wanted = json.loads(request.data)
        asked.append(request.full_url)
        length = wanted.get("max_tokens", wanted.get("n_predict"))
        assert wanted["temperature"] == 0
        (ids,) = decoder.complete([wanted["prompt"]], max_new_tokens=length)
        reply = {"tokens": ids, "choices": [{"token_ids": ids}]}
        return io.BytesIO(json.dumps(reply).encode())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.chdir(folder)
    serving = Serving.of(decoder.think, decoder.tokenizer, budget=budget, max_answer_tokens=32)
    assert play(program(serving, writer), capsys) == said_at(decoder, budget) + "\n"
    assert len(asked) == (1 if budget == 250 else 2) and len(set(asked)) == 1


def test_vllm_forces_the_closer_itself_only_where_its_parser_knows_the_tags(tokenizer):
    options = dict(budget=60, max_answer_tokens=32)
    own = Serving.of(ThinkFormat.of(tokenizer, closer="anytime"), tokenizer, **options)
    assert r'"reasoning_end_str": "...\n\n...\n\n</think>\n\n**Final Answer**\n"' in vllm_serve(own)
    assert '"thinking_token_budget": 61,  # 60, and what stands behind <think>' in vllm_program(own)
    other = Serving.of(ThinkFormat.of(tokenizer, open_tag="<why>", close_tag="</why>"), tokenizer, **options)
    assert "reasoning" not in vllm_serve(other) and vllm_program(other) == program(other, VLLM)


def test_merged_models_keep_what_their_checkpoints_say_of_serving(tokenizer, think, tmp_path):
    folders = []
    for seed in range(2):
        folder = tmp_path / f"model{seed}"
        make_tiny_model(tokenizer, seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(card_of(tokenizer, think).text(5))
        folders.append(folder)
    merge(folders, tmp_path / "alike")
    assert serving_facts(tmp_path / "alike") == serving_facts(folders[0])
    other = ThinkFormat.of(tokenizer, closer="anytime")
    (folders[1] / CARD).write_text(card_of(tokenizer, other).text(5))
    merge(folders, tmp_path / "unlike")
    assert serving_facts(tmp_path / "unlike") is None


def test_a_merged_adapter_keeps_what_its_checkpoint_says_of_serving(tiny_folder, tokenizer, think, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    model = make_tiny_model(tokenizer)
    add_adapter(model, 2, seed=0)
    save_adapted(model, checkpoint)
    (checkpoint / CARD).write_text(card_of(tokenizer, think).text(1))
    merge_adapter(checkpoint, tiny_folder, tmp_path / "merged")
    assert serving_facts(tmp_path / "merged")["closer"] == think.closer
