"""openmsa conformance: does an engine mean what the definition means, trap by trap?"""

from __future__ import annotations

import argparse
from pathlib import Path

from openmsa.cli.console import progress, say, table
from openmsa.cli.door import UsageError

DESCRIPTION = (
    "Holds an engine against golden vectors: selection, output, log-sum-exp, loss, gradients and "
    "cache, one case for each trap that implementations of MSA fell into. Selections must be "
    "equal; numbers may be at most twice as wrong as eager torch in the same dtype. What an engine "
    "lacks is reported as not offered, never as passed. Exit code 1 if any check fails."
)
EXAMPLE = "openmsa conformance --adapter transformers --json runs/transformers.json"

DTYPES = ("float32", "bfloat16", "float16")
OURS = ("reference", "portable", "cpu", "triton")
COLUMNS = {
    "select": ("blocks",),
    "out": ("out",),
    "lse": ("lse",),
    "loss": ("loss",),
    "grads": ("dq", "dk", "dv"),
    "index": ("dq_index", "dk_index"),
}
MARKS = {"pass": "pass", "fail": "FAIL", "not offered": "-", "": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME",
        help="an engine by name (--list) or module:Class; may be given again; left out: our own "
        "backends that are usable here",
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="one case only, or several")
    parser.add_argument("--list", action="store_true", help="cases and engines; no more")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all inputs")
    parser.add_argument("--device", default="cpu", help="where inputs lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every verdict, with versions")


def run(arguments: argparse.Namespace) -> int:
    from openmsa.conformance import shipped_cases
    from openmsa.conformance.adapters import ENGINES
    from openmsa.evaluation.plain import write_json

    paths = shipped_cases()
    if arguments.list:
        _list(paths)
        return 0
    if unknown := sorted(set(arguments.case or ()) - set(paths)):
        raise UsageError(f"there is no case {unknown[0]!r}; --list names them")
    wanted = {name: path for name, path in paths.items() if name in (arguments.case or paths)}
    names = arguments.adapter or _usable()
    if unknown := [name for name in names if name not in ENGINES and ":" not in name]:
        known = ", ".join(ENGINES)
        raise UsageError(f"there is no adapter {unknown[0]!r}; give module:Class or one of {known}")
    results = [_judge(name, wanted, arguments) for name in dict.fromkeys(names)]
    for result in results:
        _show(result)
    if len(results) > 1:
        _compare(results, list(wanted))
    if arguments.json:
        found = {"dtype": arguments.dtype, "device": arguments.device, "engines": results}
        say(f"wrote {write_json(arguments.json, found)}")
    return int(any(v["verdict"] == "fail" for result in results for v in result["verdicts"]))


def _usable() -> list[str]:
    from openmsa.ops.backend import availability

    return [name for name, reason in availability().items() if reason is None]


def _judge(name: str, paths: dict[str, Path], arguments: argparse.Namespace) -> dict:
    import torch

    from openmsa.conformance import judge, load_case
    from openmsa.conformance.adapters import open_adapter
    from openmsa.evaluation.plain import to_plain

    adapter = open_adapter(name)
    how = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    verdicts = []
    with progress(adapter.name, len(paths)) as bar:
        for path in paths.values():
            verdicts += judge(adapter, load_case(path), **how)
            bar.advance()
    return {"name": adapter.name, "version": adapter.version(), "verdicts": to_plain(verdicts)}


def _list(paths: dict[str, Path]) -> None:
    from openmsa.conformance import load_case
    from openmsa.conformance.adapters import ENGINES

    cases = [load_case(path) for path in paths.values()]
    rows = [(case.name, case.trap, case.wrong) for case in cases]
    table("Cases", ("case", "what is tested", "a wrong engine"), rows)
    rows = [(name, engine.install or "always there") for name, engine in ENGINES.items()]
    table("Engines", ("--adapter", "how to get it"), rows)


def _show(result: dict) -> None:
    """One engine: a row a case, then each failure in words, then what is not offered."""
    by_case: dict[str, list[dict]] = {}
    for verdict in result["verdicts"]:
        by_case.setdefault(verdict["case"], []).append(verdict)
    rows = []
    for case, verdicts in by_case.items():
        checks = [_cell(verdicts, checks) for checks in COLUMNS.values()]
        cache = _cell([v for v in verdicts if v["check"].startswith("step")], None)
        rows.append((case, *checks, cache, _worst(verdicts)))
    columns = ("case", *COLUMNS, "cache", "error")
    table(f"{result['name']}: {result['version']}", columns, rows)
    print("grads: dq, dk, dv; index: dq_index, dk_index; error: the largest, 1 is what is allowed")
    failed: dict[tuple[str, str], list[str]] = {}
    for verdict in result["verdicts"]:
        if verdict["verdict"] == "fail":
            failed.setdefault((verdict["case"], verdict["why"]), []).append(verdict["check"])
    for (case, why), checks in failed.items():
        print(f"FAIL {case}, {', '.join(checks)}: {why}")
    missing = {v["why"]: None for v in result["verdicts"] if v["verdict"] == "not offered"}
    if missing:
        print(f"not offered by {result['name']}: {'; '.join(missing)}")


def _cell(verdicts: list[dict], checks: tuple[str, ...] | None) -> str:
    """One word for several checks: the worst of them."""
    found = [v["verdict"] for v in verdicts if checks is None or v["check"] in checks]
    return MARKS[next((word for word in ("fail", "not offered", "pass") if word in found), "")]


def _worst(verdicts: list[dict]) -> str:
    """The largest error of a case, as a share of what is allowed."""
    shares = [
        v["error"] / v["allowed"] for v in verdicts if v["allowed"] and v["error"] is not None
    ]
    if not shares:
        return ""
    return f"{max(shares):.2f}" if max(shares) < 10 else f"{max(shares):.0e}"


def _compare(results: list[dict], cases: list[str]) -> None:
    rows = [(case, *(summary(result, case) for result in results)) for case in cases]
    table("All engines", ("case", *(result["name"] for result in results)), rows)


def summary(result: dict, case: str) -> str:
    """A case in one cell: pass, FAIL, how many of its checks are offered, or "-" for none."""
    words = [v["verdict"] for v in result["verdicts"] if v["case"] == case]
    if "fail" in words:
        return "FAIL"
    passed = words.count("pass")
    if not passed:
        return "-"
    return "pass" if passed == len(words) else f"pass {passed} of {len(words)}"
