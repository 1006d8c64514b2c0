"""The steps of the demo. Each leaves a file; what is there already is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from openmsa import hf
from openmsa.cli.console import progress, say
from openmsa.cli.door import UsageError
from openmsa.cli.models import load_model, load_tokenizer
from openmsa.cli.texts import sequences
from openmsa.cli.train import recall_probe, step_counter
from openmsa.evaluation.evidence import Evidence, ModelEvidence, Sample, machine_settings, measure
from openmsa.evaluation.inspection import Bearing, SelectionMap, selection_map, will_it_bear
from openmsa.evaluation.plain import read_json, write_json
from openmsa.evaluation.report import write_report
from openmsa.evaluation.retrieval import RetrievalPlan
from openmsa.inference import generate
from openmsa.mechanisms.msa import MSAConfig
from openmsa.training import Recipe, history, standard_library_text, train
from openmsa.training.recipes import dense_twin, msa_cpt
from openmsa.training.retrieval import make_example
from openmsa.training.trainer import fast_bf16

SHIPPED = Path(__file__).parent.parent / "assets" / "dense_byte_3m"
FILLER_CHARACTERS = 200_000
SEED = 1_000_003  # far from the seeds that training counts up from


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything. Lengths in tokens, which are bytes here."""

    block_size: int = 16
    top_k: int = 8
    warm_steps: int = 80
    sparse_steps: int = 60
    num_texts: int = 24
    text_tokens: int = 2048
    contexts: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples_per_cell: int = 10
    decode_contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    story_tokens: int = 1024

    @property
    def config(self) -> MSAConfig:
        """The budget."""
        return MSAConfig(block_size=self.block_size, top_k=self.top_k)


FULL = DemoPlan()
QUICK = DemoPlan(
    warm_steps=12,
    sparse_steps=8,
    num_texts=6,
    contexts=(1024,),
    depths=(0.0, 0.5),
    examples_per_cell=4,
    decode_contexts=(1024, 4096),
)


def run_demo(out: Path, *, quick: bool = False) -> Path:
    """Run what is missing of the demo in the folder `out`; returns the path of report.html.

    Raises UsageError if `out` holds a demo of another length or something else.
    """
    demo = _Demo(out, QUICK if quick else FULL)
    demo.claim()
    evidence = demo.evidence(f"openmsa demo{' --quick' if quick else ''} --out {out}")
    return write_report(evidence, out)


class _Demo:
    def __init__(self, out: Path, plan: DemoPlan):
        self.out, self.plan = out, plan
        self.recipe = msa_cpt(plan.warm_steps, plan.sparse_steps)

    def claim(self) -> None:
        path, plan = self.out / "plan.json", json.loads(json.dumps(asdict(self.plan)))
        if path.exists() and json.loads(path.read_text()) != plan:
            raise UsageError(
                f"--out {self.out} holds a demo of another length; name another folder or delete it"
            )
        if not path.exists() and self.out.is_dir() and any(self.out.iterdir()):
            raise UsageError(f"--out {self.out} holds files but no demo; name another folder")
        write_json(path, plan)

    def evidence(self, command: str) -> Evidence:
        """Every step in its order."""
        say(f"the dense model that ships with OpenMSA: {SHIPPED}")
        bearing = self.step("bearing", Bearing, self.bear)
        for name, recipe, start in (
            ("msa", self.recipe, self.converted_start),
            ("dense twin", dense_twin(self.recipe), self.dense_start),
        ):
            self.train(name, recipe, start)
        measured = {
            name: self.step(
                name, ModelEvidence, lambda make=make, name=name: self.measure(name, make)
            )
            for name, make in (
                ("dense", self.dense),
                ("converted", self.converted),
                ("control", self.control),
            )
        }
        return Evidence(
            title="From a dense model to MSA",
            block_size=self.plan.block_size,
            top_k=self.plan.top_k,
            **measured,
            training=tuple(history(self.out / "msa")),
            selection=self.step("selection", SelectionMap, self.maps),
            bearing=bearing,
            sample=self.step("sample", Sample, self.tell),
            settings=self.settings(),
            commands=(command,),
        )

    def step(self, name: str, kind: type, make: Callable):
        """What `make` returns, kept in a file: read from there if the step is done."""
        path = self.out / "steps" / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(kind, path)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(str(SHIPPED))

    @cached_property
    def heldout(self) -> list[str]:
        return standard_library_text("heldout")

    @cached_property
    def filler(self) -> str:
        return "\n".join(self.heldout)[:FILLER_CHARACTERS]

    @cached_property
    def texts(self) -> list:
        return sequences(
            self.heldout,
            self.tokenizer,
            num_tokens=self.plan.text_tokens,
            num_sequences=self.plan.num_texts,
        )

    def dense_start(self):
        return load_model(str(SHIPPED), dtype="float32")

    def converted_start(self):
        return hf.convert(self.dense_start(), self.plan.config)

    def dense(self):
        return load_model(str(self.last("dense twin")), dtype="float32")

    def converted(self):
        return load_model(str(self.last("msa")), dtype="float32")

    def control(self):
        """The trained model with an index that nobody trained: random projections."""
        torch.manual_seed(SEED)
        return hf.convert(hf.to_dense(self.converted()), self.plan.config, init="random")

    def last(self, name: str) -> Path:
        number = len(self.recipe.phases) - 1
        return (
            self.out / name.replace(" ", "-") / f"{number}-{self.recipe.phases[-1].name}" / "model"
        )

    def bear(self) -> Bearing:
        say("will it bear sparse attention? looking into the dense model")
        return will_it_bear(self.dense_start(), self.texts[:4], self.plan.config)

    def train(self, name: str, recipe: Recipe, start: Callable) -> None:
        out = self.out / name.replace(" ", "-")
        say(f"training {name}: {recipe.tokens:,} tokens")
        model = start()
        probe = recall_probe(recipe, model, self.tokenizer)
        total = sum(phase.steps for phase in recipe.phases)
        with progress(f"training {name}", total) as bar:
            train(
                recipe,
                model=model,
                tokenizer=self.tokenizer,
                out=out,
                probe=probe,
                probe_every=max(1, self.plan.warm_steps // 6),
                callbacks=(step_counter(recipe, bar),),
                say=say,
            )

    def measure(self, name: str, make: Callable) -> ModelEvidence:
        say(f"measuring {name}: perplexity, retrieval, recall, decoding time")
        plan = RetrievalPlan(
            filler=self.filler,
            context_tokens=self.plan.contexts,
            depths=self.plan.depths,
            examples_per_cell=self.plan.examples_per_cell,
            seed=SEED,
        )
        with progress(f"measuring {name}") as bar:
            return measure(
                make(),
                self.tokenizer,
                self.texts,
                plan=plan,
                decode_contexts=self.plan.decode_contexts if name != "control" else (),
                autocast_dtype=torch.bfloat16 if fast_bf16() else None,
                progress=lambda what, done, total: bar.show(done, total),
            )

    def maps(self) -> SelectionMap:
        return selection_map(self.converted(), self.texts[:8])

    def tell(self) -> Sample:
        """The trained model finds something that was said at the start of a long context."""
        example = make_example(
            "passkey",
            context_tokens=self.plan.story_tokens,
            depth=0.0,
            seed=SEED,
            filler=self.filler,
        )
        told = generate(self.converted(), self.tokenizer, example.prompt, max_new_tokens=16)
        opening, question = example.prompt[:120], example.prompt.rsplit("\n", 1)[1]
        return Sample(
            "converted", self.plan.story_tokens, opening, question, told.text, example.answer
        )

    def settings(self) -> dict[str, str]:
        plan, recipe = self.plan, self.recipe
        return {
            "budget": f"{plan.top_k} blocks of {plan.block_size} tokens",
            "training": ", ".join(f"{p.name}: {p.tokens:,} tokens" for p in recipe.phases),
            "dense twin": "the shipped model, trained on the same tokens with dense attention",
            "untrained index": "the trained model with random index projections",
            "texts": f"{len(self.texts)} held-out pieces of {plan.text_tokens:,} tokens",
            "questions": f"{len(plan.depths) * plan.examples_per_cell} per task and length",
            **machine_settings(),
        }
