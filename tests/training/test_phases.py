"""Recipes are plain data: they survive json, and a wrong one is refused by name."""

import json
from dataclasses import replace

import pytest

from openmsa.training import RECIPES, DataConfig, Phase, Recipe, recipe_from_dict


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = RECIPES[name]()
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.tokens == sum(phase.tokens for phase in recipe.phases) > 0


def test_tokens_count_accumulation():
    assert Phase("a", steps=3, seq_len=10, batch_size=2, accumulate=4).tokens == 240


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "spares"}, "attention='spares' must be one of dense, warmup, sparse"),
        ({"steps": 0}, "steps=0 of phase 'a' must be >= 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"trained": "index"}, "gets no gradient; use attention='warmup'"),
        ({"name": "a/b"}, "names a folder"),
        ({"decay_to": 2.0}, "decay_to=2.0"),
    ],
)
def test_a_wrong_phase_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Phase("a"), **changes)


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(
        ValueError, match="phase has no key 'learning_rte'; did you mean 'learning_rate'"
    ):
        recipe_from_dict({"name": "x", "phases": [{"name": "a", "learning_rte": 1}]})
    with pytest.raises(ValueError, match="data has no key 'sorce'; did you mean 'source'"):
        recipe_from_dict({"name": "x", "phases": [{"name": "a"}], "data": {"sorce": "stdlib"}})
    with pytest.raises(ValueError, match="recipe lacks the key 'name'"):
        recipe_from_dict({"phases": [{"name": "a"}]})


def test_phases_need_names_of_their_own():
    with pytest.raises(ValueError, match="name of its own"):
        Recipe("x", (Phase("a"), Phase("a")), DataConfig())
