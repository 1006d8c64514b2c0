"""Recipes fitted to mechanisms: the same tokens in the same order, phases that they have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openmsa import hf
from openmsa.training import dense_twin, fitted
from openmsa.training.recipes import dense_byte_3m, msa_cpt, msa_pt
from tests.hf.mechanisms import SMALL, WITH_INDEX
from tests.hf.tiny import tiny_model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", [msa_cpt(), msa_pt()], ids=lambda recipe: recipe.name)
def test_no_mechanism_sees_other_tokens(name, recipe):
    model = hf.convert(tiny_model(), SMALL[name])
    made, room = fitted(recipe, model), hf.room_of(model)
    assert (made.data, made.seed, made.tokens) == (recipe.data, recipe.seed, recipe.tokens)
    for ours, theirs in zip(made.phases, recipe.phases, strict=True):
        assert ours.attention in room.PHASES
        assert (ours.name, ours.tokens, ours.data) == (theirs.name, theirs.tokens, theirs.data)
    assert (made is recipe) == (name in WITH_INDEX)
    if name not in WITH_INDEX:
        assert {(phase.attention, phase.trained) for phase in made.phases} == {("sparse", "all")}
        assert made.phases[0].learning_rate == recipe.phases[1].learning_rate
        assert made.name == f"{recipe.name}-{room.NAME}"


def test_a_dense_model_gets_the_dense_twin():
    assert fitted(msa_cpt(), tiny_model()) == dense_twin(msa_cpt())
    for model in (tiny_model(), hf.convert(tiny_model(), SMALL["nsa"])):
        assert fitted(dense_byte_3m(), model) == dense_byte_3m()


def test_additions_alone_may_train_where_there_are_some():
    """NSA's gates learn from the model's loss, sparse; a window has nothing of its own."""
    alone = replace(msa_cpt().phases[1], trained="index")
    recipe = replace(msa_cpt(), phases=(alone,))
    assert fitted(recipe, hf.convert(tiny_model(), SMALL["nsa"])) is recipe
    with pytest.raises(ValueError, match="trains additions alone, which window lacks"):
        fitted(recipe, hf.convert(tiny_model(), SMALL["window"]))
