"""Make the golden vectors anew: the reference backend in fp64 answers every recipe.

    python -m openmsa.conformance.make [folder]

The same bytes come out every time on one machine; on another, fp64 sums may differ in their last
digits.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from openmsa.conformance.case import FOLDER, Case, Inputs, save_case
from openmsa.conformance.definition import answers, choose, reference
from openmsa.conformance.judge import history
from openmsa.conformance.recipes import RECIPES, Recipe


def make(recipe: Recipe) -> Case:
    """The case of a recipe, with its answers.

    Raises ValueError where a score ties at the border of the selection and the recipe does not say
    that it may: another seed must be taken.
    """
    about = {"name": recipe.name, "trap": recipe.trap, "wrong": recipe.wrong}
    made = recipe.build()
    if isinstance(made, tuple):
        steps = []
        for step in made:
            steps.append(step)
            if step.do == "append":
                x = history(steps)
                _decided(recipe, x)
                x = x.replace(blocks=choose(x), dout=torch.zeros_like(x.q))
                out = answers(x.to("cpu", torch.float64), reference, with_loss=False)["out"]
                steps[-1] = dataclasses.replace(step, out=out)
        return Case(**about, steps=tuple(steps))
    expected: dict[str, Tensor] = {}
    if made.rule.phase == "sparse" and not made.imposed:
        _decided(recipe, made)
        blocks = choose(made)
        made, expected = made.replace(blocks=blocks), {"blocks": blocks.clone()}
    expected |= answers(made.to("cpu", torch.float64), reference, with_loss=recipe.with_loss)
    return Case(**about, inputs=made, expected=expected)


def _decided(recipe: Recipe, x: Inputs) -> None:
    """The last block kept and the first left out must not have one score, unless that is meant."""
    rule = x.rule
    for span in x.spans():
        one = x.only(span)
        t, s = one.q.shape[1], one.k.shape[1]
        score = torch.einsum("btgi,bsi->bgts", one.q_index.double(), one.k_index.double())
        position = torch.arange(s - t, s)[:, None]
        score = score.masked_fill((torch.arange(s) > position) | score.isnan(), -torch.inf)
        blocks = -(-s // rule.block_size)
        score = torch.nn.functional.pad(score, (0, blocks * rule.block_size - s), value=-torch.inf)
        best = score.unflatten(-1, (blocks, rule.block_size)).amax(-1)
        own, block = position // rule.block_size, torch.arange(blocks)
        forced = (block > own - rule.local_blocks) | (block < rule.sink_blocks)
        best = best.masked_fill(forced & (block <= own), torch.inf).sort(-1, descending=True).values
        if rule.top_k < blocks and not recipe.ties:
            kept, left = best[..., rule.top_k - 1], best[..., rule.top_k]
            if ((kept == left) & kept.isfinite()).any():
                raise ValueError(f"case {recipe.name} has an undecided row; change its seed")


def main() -> None:
    """Write every case into the folder named on the command line, or into the package."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    torch.set_num_threads(1)
    total = 0
    for recipe in RECIPES:
        path = save_case(make(recipe), folder)
        total += path.stat().st_size
        print(f"{path.stat().st_size:9,} {path.name}")
    print(f"{total:9,} bytes in {len(RECIPES)} cases")


if __name__ == "__main__":
    main()
