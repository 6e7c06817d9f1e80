"""The model card: README.md of a checkpoint, what it is and how it must be served."""

from trsd.recipe import Recipe
from trsd.recipe_file import recipe_as_yaml

CARDS = {
    "trsd": """\
Trained to answer well after any amount of thinking. To stop the thinking at a budget, append this closer, the one it
was trained with, and let the model answer""",
    "lsp": """\
Trained on a part of each sequence, by a larger model's distributions. It may have seen few ends: watch how often it
stops by itself, and close its thinking where it does not with""",
    "palign": """\
Trained on the shortest prefixes of longer reasoning that it found sufficient, and on its own completions of them. What
closes its thinking""",
    "sft": """\
Trained on traces as text. What closes its thinking where it is cut""",
}


def model_card(recipe: Recipe, closer: str, step: int) -> str:
    """README.md of a checkpoint: what it is and how it must be served."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [trsd, reasoning, distillation]
---
# {recipe.model_name_or_path} after {step} steps of {recipe.method.upper()}

{CARDS[recipe.method]} (written as a Python string)

```
{closer!r}
```

Recipe:

```yaml
{recipe_as_yaml(recipe)}```
"""
