"""The numbers of a finished demo as rows: the converted model against its dense twin and a control.

make demo && .venv/bin/python benchmarks/conversion.py runs/demo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from record import record

from openmsa.evaluation.evidence import ModelEvidence
from openmsa.evaluation.perplexity import compare
from openmsa.evaluation.plain import read_json

MODELS = {"dense": "dense twin", "converted": "converted", "control": "random index"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"))
    folder = parser.parse_args().demo
    plan = json.loads((folder / "plan.json").read_text())
    shape = f"3M bytes, block {plan['block_size']}, top_k {plan['top_k']}"
    found = {n: read_json(ModelEvidence, folder / "steps" / f"{n}.json") for n in MODELS}
    rows = []

    def add(model: str, metric: str, unit: str, value: str, **more: str) -> None:
        rows.append(
            {"what": MODELS[model], "shape": shape, "metric": metric, "unit": unit, "p50": value}
            | more
        )

    for name, evidence in found.items():
        add(name, "perplexity", "1", f"{evidence.perplexity.mean_perplexity:.4f}")
        change = compare(found["dense"].perplexity, evidence.perplexity)
        if name != "dense":
            middle, error = 100 * change.perplexity_change, 100 * change.mean_stderr
            ends = {"p20": f"{middle - error:.2f}", "p80": f"{middle + error:.2f}"}
            add(name, "perplexity change, one standard error", "%", f"{middle:.2f}", **ends)
        for task in evidence.retrieval.tasks:
            for tokens in evidence.retrieval.context_tokens:
                right, asked = evidence.retrieval.counts(task, tokens)
                add(name, f"{task} at {tokens} tokens, right of {asked}", "answers", str(right))
        if evidence.recall is not None:
            for measure in ("block_recall", "score_recall", "captured_mass"):
                add(name, measure, "1", f"{evidence.recall.mean(measure):.4f}")
        for time in evidence.decode:
            what = f"one token after {time.context_tokens} tokens"
            add(name, what, "ms", f"{time.median_ms:.2f}")
    print(record("conversion", rows))


if __name__ == "__main__":
    main()
