"""The verdict: an engine's answer to a case beside the golden one.

Selections must be the same sets: index scores of the vectors are exact in fp32, so that no rounding
can change one. Numbers follow the accuracy rule: largest and mean error against fp64 at most twice
what eager torch in the same dtype gets wrong, plus one last place of the largest true value (for
the mean a quarter of it). A loss is a difference of numbers around 1, whose last place counts; and
an engine may keep its softmax as a log-sum-exp, so that a log-sum-exp of 200 in a case makes 200
last places of all that is computed from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openmsa.conformance.adapter import Adapter, NotOffered
from openmsa.conformance.case import GRADIENTS, MAIN, Case, Inputs
from openmsa.conformance.definition import answers, choose, eager

PASS, FAIL, NOT_OFFERED = "pass", "fail", "not offered"


@dataclass(frozen=True)
class Verdict:
    """One check of one case. error and allowed: the largest, where there are numbers to compare;
    why: what is missing, or what went wrong."""

    case: str
    check: str
    verdict: str
    why: str = ""
    error: float | None = None
    allowed: float | None = None


def judge(
    adapter: Adapter,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Verdict]:
    """Every check of a case, in order: those of CHECKS that the case has, or one for each step."""
    if case.steps:
        return list(_judge_steps(adapter, case, dtype, device))
    truth, x = case.expected, case.inputs.to(device, dtype)
    guide = answers(case.inputs.to("cpu", dtype), eager, with_loss="loss" in truth)
    verdicts = []
    if "blocks" in truth:
        chosen = _Answer(lambda: adapter.select(x))
        verdicts.append(_judged(case.name, "blocks", chosen, lambda got: _same_sets(got, case)))
    both = _Answer(lambda: adapter.attend(x))
    for place, check in enumerate(("out", "lse")):
        part = _Answer(lambda place=place: _offered(both.get()[place], "the log-sum-exp"))
        verdicts.append(_judged(case.name, check, part, _closeness(case, check, guide)))
    if "loss" in truth:
        loss = _Answer(lambda: adapter.loss(x))
        verdicts.append(_judged(case.name, "loss", loss, _closeness(case, "loss", guide)))
    found = _Answer(lambda: adapter.gradients(x))
    for check in (name for name in GRADIENTS if name in truth):
        part = _Answer(
            lambda check=check: _offered(found.get().get(check), "gradients of the index")
        )
        verdicts.append(_judged(case.name, check, part, _closeness(case, check, guide)))
    return verdicts


class _Answer:
    """What an engine says to one question, asked once."""

    def __init__(self, ask: Callable):
        self._ask, self._kept = ask, None

    def get(self):
        if self._kept is None:
            try:
                self._kept = (self._ask(), None)
            except Exception as error:
                self._kept = (None, error)
        answer, error = self._kept
        if error is not None:
            raise error
        return answer


def _offered(answer: Tensor | None, what: str) -> Tensor:
    if answer is None:
        raise NotOffered(what)
    return answer


def _judged(
    case: str, check: str, answer: _Answer, compare: Callable[[Tensor], tuple[str, dict]]
) -> Verdict:
    try:
        got = answer.get()
        why, numbers = compare(got)
    except NotOffered as missing:
        return Verdict(case, check, NOT_OFFERED, str(missing))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return Verdict(case, check, FAIL, f"raised {type(error).__name__}: {said}")
    return Verdict(case, check, FAIL if why else PASS, why, **numbers)


def _same_sets(got: Tensor, case: Case) -> tuple[str, dict]:
    """Compare selections of real query tokens as sets of block numbers."""
    want = case.expected["blocks"]
    got, want = _ascending(torch.as_tensor(got).cpu()), _ascending(want)
    if got.shape[1] == 1 and want.shape[1] > 1:
        got = got.expand(-1, want.shape[1], -1, -1)
    if got.shape[:3] != want.shape[:3]:
        return f"has shape {tuple(got.shape)}, must be [b, g, t, k] = {tuple(want.shape)}", {}
    slots = max(got.shape[-1], want.shape[-1])
    got, want = (
        torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=-1) for x in (got, want)
    )
    wrong = (got != want).any(-1)
    if case.inputs.mask is not None:
        wrong &= case.inputs.mask[:, None]
    if not wrong.any():
        return "", {}
    b, g, t = wrong.nonzero()[0].tolist()
    one, other = ([n for n in x[b, g, t].tolist() if n >= 0] for x in (got, want))
    rows = f"{int(wrong.sum())} of {wrong.numel()} rows differ"
    return f"{rows}; first: row {b}, group {g}, query {t}: {one} instead of {other}", {}


def _ascending(blocks: Tensor) -> Tensor:
    """Ascending, empty slots last."""
    blocks = blocks.to(torch.int64)
    last = torch.iinfo(torch.int64).max
    blocks = blocks.masked_fill(blocks < 0, last).sort(-1).values
    return blocks.masked_fill(blocks == last, -1)


def _closeness(
    case: Case, check: str, guide: dict[str, Tensor]
) -> Callable[[Tensor], tuple[str, dict]]:
    def compare(got: Tensor) -> tuple[str, dict]:
        real = case.inputs.mask if check in ("out", "lse") else None
        tensors = (torch.as_tensor(got).detach().cpu(), guide[check], case.expected[check])
        if tensors[0].shape != tensors[2].shape:
            shapes = [tuple(x.shape) for x in tensors]
            return f"has shape {shapes[0]}, must be {shapes[2]}", {}
        least = 1.0 if check == "loss" else 0.0
        lse = case.expected["lse"]
        places = 1.0 if check == "lse" else float(lse[lse.isfinite()].abs().max())
        return close(*(tensors if real is None else (x[real] for x in tensors)), least, places)

    return compare


def close(
    got: Tensor, eager: Tensor, truth: Tensor, least: float = 0.0, places: float = 1.0
) -> tuple[str, dict]:
    """The accuracy rule: what breaks it ("": nothing), and the largest error with what is allowed.

    least: what the largest true value is at least taken for. places: last places of it, at least 1.
    Where the truth is not finite, the answer must be the same.
    """
    dtype = eager.dtype
    got, eager, truth = got.double(), eager.double(), truth.double()
    finite = truth.isfinite()
    if not _equal(got[~finite], truth[~finite]):
        return "finite where it must not be", {}
    error, theirs = ((x[finite] - truth[finite]).abs() for x in (got, eager))
    if error.numel() == 0:
        return "", {}
    slack = torch.finfo(dtype).eps * max(least, float(truth[finite].abs().max())) * max(1.0, places)
    allowed = 2 * float(theirs.max()) + slack
    numbers = {"error": float(error.max()), "allowed": allowed}
    if not error.isfinite().all():
        return "not finite where it must be", {}
    if numbers["error"] > allowed:
        return f"largest error {numbers['error']:.1e}, allowed {allowed:.1e}", numbers
    mean, allowed_mean = float(error.mean()), 2 * float(theirs.mean()) + slack / 4
    if error.numel() > 1 and mean > allowed_mean:
        return f"mean error {mean:.1e}, allowed {allowed_mean:.1e}", numbers
    return "", numbers


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.nan_to_num(nan=1e300), b.nan_to_num(nan=1e300)))


def _judge_steps(adapter: Adapter, case: Case, dtype, device) -> Iterator[Verdict]:
    """Drive a cache through the steps; each output is a check, named by what came before it."""
    session, done = None, []
    for step in case.steps:
        done.append(step.do)
        check = f"step {len(done)}: {step.do}"
        try:
            if session is None:
                session = adapter.open_cache(step.inputs.rule)
            if step.do == "append":
                got = session.append(step.inputs.to(device, dtype))
            else:
                _change(session, step)
        except NotOffered as missing:
            yield Verdict(case.name, check, NOT_OFFERED, str(missing))
            return
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            yield Verdict(case.name, check, FAIL, f"raised {type(error).__name__}: {said}")
            return
        if step.do == "append":
            guide = _eager_step(case, len(done) - 1, dtype)
            tensors = (torch.as_tensor(got).detach().cpu(), guide, step.out)
            real = step.inputs.real_queries
            why, numbers = close(*(tensors if real is None else (x[real] for x in tensors)))
            yield Verdict(case.name, check, FAIL if why else PASS, why, **numbers)


def _change(session, step) -> None:
    if step.do == "crop":
        session.crop(step.length)
    elif step.do == "reorder":
        session.reorder(step.rows)
    else:
        session.reload()


def _eager_step(case: Case, number: int, dtype: torch.dtype) -> Tensor:
    """What eager torch computes for one appending, over all that is held by then."""
    x = history(case.steps[: number + 1])
    x = x.replace(blocks=choose(x), dout=torch.zeros_like(x.q))
    return answers(x.to("cpu", dtype), eager, with_loss=False)["out"]


def history(steps) -> Inputs:
    """The inputs of the last step, an appending, with the keys of everything that is held by
    then."""
    held: dict[str, Tensor] = {}
    for step in steps:
        if step.do == "append":
            named = step.inputs.tensors()
            new = {n: named[n] for n in (*MAIN[1:], "k_index", "mask") if n in named}
            held = {n: torch.cat([held[n], x], 1) if held else x for n, x in new.items()}
        elif step.do == "crop":
            held = {name: x[:, : step.length] for name, x in held.items()}
        elif step.do == "reorder":
            held = {name: x[list(step.rows)] for name, x in held.items()}
    return dataclasses.replace(steps[-1].inputs, **held)
