"""The self-reflection cues: each is found as a whole word, in any case and inflection, and none twice."""

import pytest

from trsd.demo.problems import draw_problems
from trsd.reflections import CUES, count_reflections, reflection_cues


@pytest.mark.parametrize("cue", CUES)
def test_every_cue_is_found_in_any_case(cue):
    for text in (f"So x = 3. {cue.capitalize()} that.", f"I will {cue.upper()}, now", cue):
        assert reflection_cues(text) == {cue: 1}


@pytest.mark.parametrize(
    "text,cue",
    [
        ("Rechecking this", "recheck"),
        ("I rethought it", "rethink"),
        ("a reassessment", "reassess"),
        ("re-evaluating", "re-evaluate"),
        ("reevaluated", "reevaluate"),
        ("a re-evaluation", "reevaluation"),
        ("re\u2011examined", "re-examine"),
        ("reconsidering", "reconsider"),
        ("a reanalysis", "reanalyze"),
        ("reanalyse it", "reanalyze"),
        ("Let me double check", "double-check"),
        ("double-checked", "double-check"),
        ("checking\nagain", "check again"),
        ("verifying again", "verify again"),
        ("going over the  steps", "go over the steps"),
    ],
)
def test_inflections_count_as_their_cue(text, cue):
    assert reflection_cues(text) == {cue: 1}


@pytest.mark.parametrize(
    "text", ["", "waiting for the bus", "she waited", "await", "waiter", "check the steps", "prerecheck", "think"]
)
def test_other_words_are_no_cues(text):
    assert count_reflections(text) == 0


def test_overlapping_cues_count_once():
    assert reflection_cues("double-check again") == {"double-check": 1}
    assert reflection_cues("Wait, wait. Check again, and check again!") == {"wait": 2, "check again": 2}


def test_the_demo_reasoning_holds_its_three_cues():
    problem = next(draw_problems("train", seed=0))
    assert reflection_cues(problem.reasoning) == {"wait": 1, "double-check": 1, "go over the steps": 1}
