"""transformers' MiniMax-M3 attention beside ours: time, memory and results, a process for each.

Measured is what stands between the projections and the output projection of one sparse layer, on
the same queries, keys, values and hidden states: theirs as `MiniMaxM3VLAttention.forward` does it
(indexer, mask, SDPA), ours with the indexer's projections in front of select and attend.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from openmsa.accounting import inputs, judge, machine
from openmsa.accounting.inputs import Inputs, Shape
from openmsa.accounting.timing import Times, timed
from openmsa.ops.block_selection import select_blocks
from openmsa.ops.sparse_attention import sparse_attention
from openmsa.selection import Selection

SIDES = ("transformers", "openmsa")
HIDDEN = 512  # a narrow model: its projections are not what is measured


@dataclass(frozen=True)
class Side:
    """Seconds, and the most memory above what the process held before."""

    times: Times
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Both sides on `groups` KV heads and their query heads."""

    theirs: Side
    ours: Side
    groups: int
    verdict: judge.Verdict


def groups_that_fit(shape: Shape, tokens: int, available: int | None) -> int:
    """How many of the g groups transformers' masks leave room for; 0: not even one.

    Without a word from the system about its memory: one.
    """
    one = group_bytes(shape, tokens)
    if available is None:
        return 1
    fitting = [n for n in range(1, shape.g + 1) if shape.g % n == 0 and n * one < available]
    return max(fitting, default=0)


def missing() -> str:
    """Why transformers' side cannot run here; empty if it can."""
    try:
        found = find_spec("transformers.models.minimax_m3_vl")
    except ModuleNotFoundError:
        found = None
    return "" if found else "needs transformers 5.17 or later (pip install 'openmsa[hf]')"


def group_bytes(shape: Shape, tokens: int) -> int:
    """What transformers holds for one group: three masks of one byte and two of two bytes for each
    query head, and a few times its four-byte scores; with room to spare.
    """
    return tokens * tokens * (7 * shape.r + 16) * 9 // 8


def compare(
    shape: Shape, tokens: int, groups: int, *, seconds: float, backend: str, instruction_set: str
) -> Comparison:
    """Run one side after the other. Raises RuntimeError with a side's last line if it fails."""
    part = replace(shape, h=groups * shape.r, g=groups)
    job = {
        "shape": asdict(part),
        "tokens": tokens,
        "seconds": seconds,
        "backend": backend,
        "instruction_set": instruction_set,
        "threads": torch.get_num_threads(),
    }
    theirs, ours = (in_a_process({**job, "side": side}) for side in SIDES)
    verdict = judge.Verdict(ours["ok"], ours["words"]).also(_same(theirs, ours))
    sides = (Side(Times(tuple(x["seconds"])), x["peak_bytes"]) for x in (theirs, ours))
    return Comparison(*sides, groups, verdict)


def in_a_process(job: dict, module: str = "openmsa.accounting.m3") -> dict:
    """What `run_side` of `module` leaves, run on `job` in a process of its own.

    Raises MemoryError where the system killed it, RuntimeError with its last line where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        command = [sys.executable, "-m", module]
        command.append(json.dumps({**job, "told": str(told)}))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == -signal.SIGKILL:
            raise MemoryError(f"the {job['side']} side was killed: out of memory")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"the {job['side']} side of the comparison failed: {reason}")
        return torch.load(told)


def _same(theirs: dict, ours: dict) -> judge.Verdict:
    """Outputs at the sampled tokens, where both sides chose the same blocks in every group."""
    chosen = torch.where(theirs["blocks"] < 0, 1 << 30, theirs["blocks"]).sort(-1).values
    chosen = torch.where(chosen == 1 << 30, -1, chosen).to(torch.int32)
    mine = ours["blocks"][..., : chosen.shape[-1]]
    same = (chosen == mine).all(-1).all(1)[0]  # [sampled tokens]
    if not same.any():
        return judge.Verdict(False, "no sampled token with transformers' blocks")
    a, b = (x["out"][0, same].float() for x in (theirs, ours))
    difference = float((a - b).abs().max() / a.abs().max())
    words = f"{int(same.sum())} of {len(same)} sampled tokens have transformers' blocks, "
    return judge.Verdict(difference < 0.03, f"{words}outputs differ by {difference:.1e}")


def run_side(job: dict) -> None:
    """What a child process does: measure one side and leave a file."""
    torch.set_num_threads(job["threads"])
    shape, tokens = Shape(**job["shape"]), job["tokens"]
    module, hidden, x = _layer(shape, tokens)
    call = {"transformers": _theirs, "openmsa": _ours}[job["side"]]
    result: dict = {}

    def once() -> None:
        result.clear()
        result.update(call(module, hidden, x, job))

    with torch.no_grad(), _instruction_set(job):
        machine.forget_peak()
        before = machine.resident_bytes()
        times = timed(once, seconds=job["seconds"])
        peak = machine.peak_bytes() - before
    rows = judge.sampled(tokens)
    told = {"seconds": times.seconds, "peak_bytes": peak, "ok": True, "words": ""}
    told |= {"out": result["out"][:, rows], "blocks": result["blocks"][:, :, rows]}
    if job["side"] == "openmsa":
        selection = Selection(result["blocks"], shape.block_size)
        verdict = judge.judge_attention(x, selection, result["out"], rows)
        told |= {"ok": verdict.ok, "words": verdict.words}
    torch.save(told, job["told"])


def _layer(shape: Shape, tokens: int):
    """(their attention module, hidden states, its queries, keys and values) in bf16, unrotated."""
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as configuration
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    torch.manual_seed(0)
    config = configuration.MiniMaxM3VLTextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=shape.h,
        num_key_value_heads=shape.g,
        head_dim=shape.d,
        index_n_heads=shape.g,
        index_head_dim=shape.d_index,
        index_block_size=shape.block_size,
        index_topk_blocks=shape.top_k,
        layer_types=["minimax_m3_sparse"],
    )
    config._attn_implementation = "sdpa"
    module = modeling.MiniMaxM3VLAttention(config, 0).to(torch.bfloat16).eval()
    hidden = inputs.normal(1, tokens, HIDDEN, dtype=torch.bfloat16, seed=6)
    with torch.no_grad():
        q = module.q_norm(module.q_proj(hidden).view(1, tokens, shape.h, shape.d))
        k = module.k_norm(module.k_proj(hidden).view(1, tokens, shape.g, shape.d))
        v = module.v_proj(hidden).view(1, tokens, shape.g, shape.d)
    # Rotation leaves queries and keys heads first; that is how an attention function gets them.
    q, k = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k))
    return module, hidden, Inputs(q, k, v, q, k)


def _theirs(module, hidden, x: Inputs, job: dict) -> dict:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    t = hidden.shape[1]
    positions = torch.arange(t)[None]
    blocks = module.indexer(hidden, _no_rotation(module, t), None, positions)
    mask = module.indexer.build_block_mask(blocks, None, t, hidden.dtype, hidden.device, positions)
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=module.scaling)
    return {"out": out, "blocks": blocks}


def _ours(module, hidden, x: Inputs, job: dict) -> dict:
    t, indexer = hidden.shape[1], module.indexer
    q_index = indexer.q_norm(indexer.q_proj(hidden).view(1, t, -1, indexer.head_dim))
    k_index = indexer.k_norm(indexer.k_proj(hidden))
    how = {"block_size": indexer.block_size, "top_k": indexer.topk_blocks}
    selection = select_blocks(q_index, k_index, index_scale=1.0, **how, backend=job["backend"])
    out = sparse_attention(x.q, x.k, x.v, selection, backend=job["backend"])
    return {"out": out, "blocks": selection.blocks}


def _no_rotation(module, t: int):
    shape = (1, t, module.indexer.head_dim)
    return torch.ones(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)


def _instruction_set(job: dict):
    if not job["instruction_set"]:
        return nullcontext()
    from openmsa import native

    return native.instruction_set(job["instruction_set"])


if __name__ == "__main__":
    run_side(json.loads(sys.argv[1]))
