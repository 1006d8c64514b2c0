"""Does an engine mean what we mean by MSA? Golden vectors, one adapter an engine, a verdict a trap.

case.py reads the vectors, adapter.py is what an engine offers, judge.py compares the two. Vectors
are made by make.py from recipes.py with the reference backend in fp64 (definition.py).
"""

from openmsa.conformance.adapter import Adapter, Cache, NotOffered, TorchAdapter
from openmsa.conformance.case import Case, Inputs, Rule, load_case, shipped_cases
from openmsa.conformance.judge import Verdict, judge

__all__ = [
    "Adapter",
    "Cache",
    "Case",
    "Inputs",
    "NotOffered",
    "Rule",
    "TorchAdapter",
    "Verdict",
    "judge",
    "load_case",
    "shipped_cases",
]
