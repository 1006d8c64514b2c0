"""Retrieval examples: what is asked stands in the context, where it was asked to stand, once."""

from itertools import pairwise

import pytest

from openmsa.training.retrieval import TASKS, make_document, make_example

FILLER = "\n".join(f"def function_{i}(x):\n    return x + {i}" for i in range(300))


def example(task, **changes):
    settings = {"context_tokens": 600, "depth": 0.5, "seed": 3, "filler": FILLER} | changes
    return make_example(task, **settings)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context_tokens", [200, 601, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_the_answer_stands_once_in_a_context_that_is_full(task, context_tokens, depth):
    made = example(task, context_tokens=context_tokens, depth=depth)
    length = len((made.prompt + made.answer).encode())
    assert length == context_tokens
    question = made.prompt.rsplit("\n", 1)[1]
    body = made.prompt[: -len(question)]
    links = (question + made.answer).split(" = ")
    for name, value in pairwise(links):
        assert body.count(f"{name} = {value}\n") == 1
        assert body.count(f"{name} = ") == 1


@pytest.mark.parametrize("task", [task for task in TASKS if task != "variable_tracking"])
def test_the_asked_line_stands_at_its_depth(task):
    for depth in (0.0, 0.25, 0.5, 0.9):
        made = example(task, context_tokens=4000, depth=depth)
        question = made.prompt.rsplit("\n", 1)[1]
        at = made.prompt.index(question) / len(made.prompt)
        assert abs(at - depth) < 0.06


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_same_example_and_other_seed_another(task):
    assert example(task) == example(task)
    assert len({example(task, seed=seed).answer for seed in range(10)}) > 5


def test_variable_tracking_lines_stand_in_the_order_of_the_chain():
    made = example("variable_tracking", depth=0.2)
    links = (made.prompt.rsplit("\n", 1)[1] + made.answer).split(" = ")
    places = [made.prompt.index(f"{name} = ") for name in links[:-1]]
    assert places == sorted(places)


@pytest.mark.parametrize("task", TASKS)
def test_a_custom_encoder_measures_the_context(task):
    by_word = example(task, context_tokens=200, encode=lambda text: text.split())
    assert 120 < len((by_word.prompt + by_word.answer).split()) <= 200


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(8))
def test_documents_learn_answers_and_never_what_nobody_can_know(task, seed):
    pieces = make_document(task, tokens=512, seed=seed, filler=FILLER)
    assert sum(len(piece.text.encode()) for piece in pieces) <= 512
    seen = ""
    answers = 0
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        if after is not None and piece.text.startswith("@") and piece.text.endswith(" = "):
            known = f"{piece.text}{after.text.split(' = ')[0]}\n" in seen
            assert after.learned == known
            answers += after.learned
        seen += piece.text
    assert answers >= 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="task='needle'.*passkey"):
        example("needle")
    with pytest.raises(ValueError, match=r"depth=1.5 .*\[0, 1\]"):
        example("passkey", depth=1.5)
    with pytest.raises(ValueError, match="filler is empty"):
        example("passkey", filler=" \n")
    with pytest.raises(ValueError, match="context_tokens=40 cannot hold the 8 lines"):
        example("multi_key", context_tokens=40)
