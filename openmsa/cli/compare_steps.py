"""The steps of a comparison. Each leaves a file; what is there already is not done again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch

from openmsa import hf
from openmsa.accounting import machine
from openmsa.cli.compare_plan import BUDGET, PLANS, ComparePlan, configs
from openmsa.cli.console import progress, say
from openmsa.cli.demo_steps import FILLER_CHARACTERS, SEED, SHIPPED
from openmsa.cli.door import UsageError
from openmsa.cli.models import load_model, load_tokenizer
from openmsa.cli.texts import sequences
from openmsa.cli.train import step_counter
from openmsa.evaluation.comparison import Comparison, Contender, contend
from openmsa.evaluation.comparison_page import write_comparison
from openmsa.evaluation.evidence import machine_settings
from openmsa.evaluation.plain import read_json, write_json
from openmsa.evaluation.retrieval import RetrievalPlan
from openmsa.training import fitted, history, standard_library_text, train
from openmsa.training.models import byte_model
from openmsa.training.trainer import fast_bf16

TOLD = {
    "dense": "each made from the shipped dense model, then trained on the same tokens",
    "scratch": "each trained from the same random weights on the same tokens",
}


def run_comparison(
    out: Path, mechanisms: list[str], *, start: str, quick: bool, command: str
) -> Path:
    """Run what is missing of the comparison in the folder `out`; returns the path of its page.

    command: what was typed, for the page and the csv.

    Raises UsageError if `out` holds another comparison or something else.
    """
    comparing = _Comparing(out, PLANS[start, quick])
    comparing.claim()
    contenders = comparing.contenders(mechanisms)
    comparison = Comparison(
        title="Sparse attention, side by side",
        start=f"{TOLD[start]}; a query reads {BUDGET} tokens.",
        contenders=contenders,
        settings=comparing.settings(),
        commands=(command,),
    )
    stamp = {
        "start": start,
        "device": machine.device(),
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command,
    }
    return write_comparison(comparison, out, stamp)


class _Comparing:
    def __init__(self, out: Path, plan: ComparePlan):
        self.out, self.plan = out, plan

    def claim(self) -> None:
        path, plan = self.out / "plan.json", json.loads(json.dumps(asdict(self.plan)))
        if path.exists() and json.loads(path.read_text()) != plan:
            raise UsageError(
                f"--out {self.out} holds another comparison; name another folder or delete it"
            )
        if not path.exists() and self.out.is_dir() and any(self.out.iterdir()):
            raise UsageError(f"--out {self.out} holds files but no comparison; name another folder")
        write_json(path, plan)

    def contenders(self, mechanisms: list[str]) -> tuple[Contender, ...]:
        """Train and measure each; says how long it takes, by what the others took."""
        done, spent = [], []
        for number, name in enumerate(mechanisms):
            if spent:
                left = sum(spent) / len(spent) * (len(mechanisms) - number)
                say(f"about {left / 60:.0f} min left")
            path, started = self.out / "measured" / f"{name}.json", time.monotonic()
            if not path.exists():
                write_json(path, self.contender(name))
                spent.append(time.monotonic() - started)
            done.append(read_json(Contender, path))
        return tuple(done)

    def contender(self, name: str) -> Contender:
        model = self.start(name)
        recipe = fitted(self.plan.recipe, model)
        folder = self.out / "models" / name
        say(f"{name}: training, {recipe.tokens:,} tokens")
        with progress(f"training {name}", sum(phase.steps for phase in recipe.phases)) as bar:
            train(
                recipe,
                model=model,
                tokenizer=self.tokenizer,
                out=folder,
                callbacks=(step_counter(recipe, bar),),
                say=say,
            )
        last = f"{len(recipe.phases) - 1}-{recipe.phases[-1].name}"
        losses = [line.get("lm_loss", line.get("loss")) for line in history(folder)]
        losses = [loss for loss in losses if loss is not None]
        model = load_model(str(folder / last / "model"), dtype="float32")
        say(f"{name}: measuring")
        with progress(f"measuring {name}") as bar:
            return contend(
                model.eval(),
                self.tokenizer,
                self.texts,
                plan=self.questions,
                train_tokens=recipe.tokens,
                train_loss=losses[-1] if losses else None,
                lengths=self.plan.lengths,
                autocast_dtype=torch.bfloat16 if fast_bf16() else None,
                progress=lambda what, done, total: bar.show(done, total),
            )

    def start(self, name: str):
        if self.plan.start == "dense":
            model, init = load_model(str(SHIPPED), dtype="float32"), "main"
        else:
            model, init = byte_model(seed=self.plan.recipe.seed), "random"
        torch.manual_seed(SEED)
        return model if name == "dense" else hf.convert(model, configs()[name], init=init)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(str(SHIPPED))

    @cached_property
    def heldout(self) -> list[str]:
        return standard_library_text("heldout")

    @cached_property
    def texts(self) -> list:
        return sequences(
            self.heldout,
            self.tokenizer,
            num_tokens=self.plan.text_tokens,
            num_sequences=self.plan.num_texts,
        )

    @cached_property
    def questions(self) -> RetrievalPlan | None:
        if not self.plan.contexts:
            return None
        return RetrievalPlan(
            filler="\n".join(self.heldout)[:FILLER_CHARACTERS],
            tasks=self.plan.tasks,
            context_tokens=self.plan.contexts,
            depths=self.plan.depths,
            examples_per_cell=self.plan.examples_per_cell,
            seed=SEED,
        )

    def settings(self) -> dict[str, str]:
        plan, recipe = self.plan, self.plan.recipe
        phases = ", ".join(f"{p.name}: {p.tokens:,} tokens" for p in recipe.phases)
        asked = len(plan.depths) * plan.examples_per_cell if plan.contexts else 0
        return {
            "read by a query": f"{plan.budget} tokens",
            "training": phases,
            "phases": "an index warms up on the first of them (MSA, DSA); what has none trains "
            "everything, sparse, on both; dense trains everything on both",
            "texts": f"{len(self.texts)} held-out pieces of {plan.text_tokens:,} tokens",
            "times": "whole model, batch 1; dense attends by the native kernels of OpenMSA as well",
            "questions": f"{asked} per task and length",
            **machine_settings(),
        }
