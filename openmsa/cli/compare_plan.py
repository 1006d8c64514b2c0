"""How much of everything a comparison does, and the numbers each mechanism gets for its budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from openmsa.evaluation.comparison import Lengths
from openmsa.mechanisms.dsa import DSAConfig
from openmsa.mechanisms.infllm2 import InfLLM2Config
from openmsa.mechanisms.moba import MoBAConfig
from openmsa.mechanisms.msa import MSAConfig
from openmsa.mechanisms.nsa import NSAConfig
from openmsa.mechanisms.window import WindowConfig
from openmsa.training import Recipe
from openmsa.training.recipes import msa_cpt, msa_pt

BUDGET = 128  # tokens that a query may read, in every mechanism
BLOCK = 16


def configs() -> dict[str, object]:
    """Every mechanism at the budget, for the byte model: 8 query heads, 2 KV heads, 32 wide.

    NSA's selection and window overlap, so what it reads lies between 64 and 128 tokens, and the
    compressed keys come on top: half of the budget is given to each.
    """
    blocks = {"block_size": BLOCK, "top_k": BUDGET // BLOCK}
    kernels = {"kernel": BLOCK, "stride": BLOCK // 2, "block_size": BLOCK}
    half = BUDGET // 2
    return {
        "window": WindowConfig(window=BUDGET - 4, sinks=4),
        "moba": MoBAConfig(**blocks),
        "infllm2": InfLLM2Config(**kernels, top_k=8, local_blocks=2, dense_below=0),
        "nsa": NSAConfig(**kernels, top_k=half // BLOCK, window=half),
        "dsa": DSAConfig(top_k=BUDGET, index_heads=8, d_index=32),
        "msa": MSAConfig(**blocks),
    }


@dataclass(frozen=True)
class ComparePlan:
    """Steps, texts and lengths. Lengths in tokens, which are bytes here; no contexts, no tasks."""

    start: str
    warm_steps: int
    sparse_steps: int
    num_texts: int
    text_tokens: int
    contexts: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples_per_cell: int = 10
    tasks: tuple[str, ...] = ("passkey", "multi_key", "key_value")
    lengths: Lengths = field(default_factory=Lengths)
    budget: int = BUDGET

    @property
    def recipe(self) -> Recipe:
        """What every mechanism is trained on, as far as it has such phases."""
        made = {"dense": msa_cpt, "scratch": msa_pt}[self.start]
        return made(self.warm_steps, self.sparse_steps)


TIMED = Lengths((1024, 4096, 16384, 65536), (2048, 8192, 32768), (2048, 8192))
TIMED_SHORT = Lengths((1024, 4096), (1024, 2048), (1024,))
PLANS = {
    ("dense", False): ComparePlan("dense", 80, 60, 24, 2048, (256, 512, 1024), lengths=TIMED),
    ("scratch", False): ComparePlan("scratch", 60, 200, 48, 512),
    ("dense", True): ComparePlan(
        "dense",
        warm_steps=2,
        sparse_steps=2,
        num_texts=4,
        text_tokens=1024,
        contexts=(512,),
        depths=(0.0, 0.5),
        examples_per_cell=1,
        tasks=("passkey", "key_value"),
        lengths=TIMED_SHORT,
    ),
    ("scratch", True): ComparePlan("scratch", 3, 3, 4, 512),
}
