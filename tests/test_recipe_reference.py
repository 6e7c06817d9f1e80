"""The page of the recipes is what the code says."""

from dataclasses import fields
from pathlib import Path

import pytest

from trsd import recipe_reference
from trsd.recipe import METHOD_FIELDS, Recipe
from trsd.recipe_file import shipped_recipes

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"


def test_the_page_is_what_the_code_says_now():
    renew = "docs/recipes.md is not of this code: python -m trsd.recipe_reference > docs/recipes.md"
    assert PAGE.read_text(encoding="utf-8") == recipe_reference.reference(), renew


def test_the_command_prints_the_page(capsys):
    recipe_reference.main()
    assert capsys.readouterr().out == recipe_reference.reference()


@pytest.fixture
def rows():
    """The first cell of every row of the tables, and the rows."""
    lines = [line.split(" | ") for line in recipe_reference.reference().splitlines() if line.startswith("| ")]
    return {cells[0].strip("| `"): cells[1:] for cells in lines}


def test_every_field_has_a_row_with_its_methods_and_what_it_is(rows):
    for entry in fields(Recipe):
        _, _, methods, text = rows[entry.name]
        assert methods == (", ".join(METHOD_FIELDS[entry.name]) if entry.name in METHOD_FIELDS else "all")
        assert len(text) > 15, entry.name


@pytest.mark.parametrize(
    "name,kind,default",
    [
        ("learning_rate", "number", "`1e-05`"),
        ("max_steps", "whole number", "left out"),
        ("bf16", "true or false", "left out"),
        ("cut_budgets", "list of whole numbers", "`[64, 256, 1024]`"),
        ("divergence", "`forward_kl`, `reverse_kl`, `jsd`", "`forward_kl`"),
        ("alpha", "number", "trsd `1.0`, lsp `0.5`, palign `0.0`, sft `0.0`"),
        ("loss_sections", "`a`, `p+a`, `cot`, `cot+a`, `p+cot`, `p+cot+a`", "lsp `p+cot+a`, sft `cot+a`"),
    ],
)
def test_kinds_and_defaults_are_those_of_the_class(rows, name, kind, default):
    assert rows[name][:2] == [kind, default]


def test_every_shipped_recipe_has_a_row_with_its_models(rows):
    links = {name.partition("]")[0].strip("["): cells for name, cells in rows.items() if "recipes/" in name}
    assert set(links) == set(shipped_recipes())
    assert links["lsp-qwen3-8b-0.6b"][:3] == ["lsp", "`Qwen/Qwen3-0.6B-Base`", "`Qwen/Qwen3-8B`"]
