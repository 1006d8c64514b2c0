"""The house rules: stairs, siblings, limits, what an import needs, how much there is to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import openmsa

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openmsa"

# A room may import rooms on lower steps only. Rooms that share a step do not know each other.
STEPS = (
    ("notation", "native"),
    ("selection",),
    ("ops",),
    ("mechanisms",),
    ("hf",),
    ("training", "inference"),
    ("accounting",),
    ("evaluation", "conformance"),
    ("cli",),
)
STEP_OF = {room: step for step, rooms in enumerate(STEPS) for room in rooms}
BACKENDS = ("reference", "portable", "cpu", "triton")

FILE_LINES, FILE_LINES_HARD = 300, 400
FUNCTION_LINES, FUNCTION_LINES_HARD = 40, 60
READING_MODULES, READING_LINES = 6, 700

# Above the soft limit, each with its reason. The hard limit has no exceptions.
LONG_FILES: dict[str, str] = {}
SIGNATURE = "a public door: half of it is the signature, one argument a line, and its docstring"
KERNEL = "a kernel: its arguments and where its tile lies come before the work"
LONG_FUNCTIONS: dict[str, str] = {
    "openmsa/ops/block_selection/triton_select.py:select_kernel": KERNEL,
    "openmsa/ops/index_loss/triton_loss.py:tile_loss": KERNEL,
    "openmsa/ops/triton_attend_backward.py:owner_gradients": KERNEL,
    "openmsa/mechanisms/msa.py:msa_attention": SIGNATURE,
    "openmsa/ops/block_selection/__init__.py:select_blocks": SIGNATURE,
    "openmsa/ops/index_loss/__init__.py:index_loss": SIGNATURE,
    "openmsa/ops/pooled_selection/__init__.py:pooled_selection": SIGNATURE,
    "openmsa/ops/sparse_attention/__init__.py:sparse_attention": SIGNATURE,
    "openmsa/ops/token_selection/__init__.py:token_index_loss": SIGNATURE,
    "openmsa/hf/attention.py:attention_function": "its signature is the one transformers calls",
    "openmsa/hf/layout.py:find_layout": "one refusal for each kind of mask, in the order met",
    "openmsa/ops/tiles.py:_cut": "one sort and what is read off it; half of it means nothing",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTED = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def name_of(path: Path) -> str:
    """openmsa/ops/backend.py -> openmsa.ops.backend; a folder's __init__ is the folder itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Our modules that a file imports, inside functions too; a name in a module counts as it."""
    found = set()
    for node in nodes or ast.walk(tree_of(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written from the root"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found


def room_of(module: str) -> str:
    """The first name under openmsa; the package itself and __main__ stand at the door."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_backend(module: str) -> bool:
    """A backend's file, or one part of it such as triton_forward."""
    parts = module.split(".")
    return room_of(module) == "ops" and len(parts) > 3 and parts[3].split("_")[0] in BACKENDS


def backend_of(module: str) -> tuple[str, str]:
    """(operation, backend) of a backend's file."""
    _, _, operation, file, *_ = module.split(".")
    return operation, file.split("_")[0]


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def test_every_room_has_its_step():
    rooms = {room_of(module) for module in MODULES} - {"", "__main__"}
    assert rooms <= set(STEP_OF), "a new room needs a step in STEPS"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    room = room_of(module)
    for imported in imports_of(MODULES[module]):
        other = room_of(imported)
        if room in ("", "__main__") or other == room:
            continue
        assert other != "__main__", f"{module} imports the command's door"
        # `import openmsa` brings ops and mechanisms: allowed from the step above them on.
        step = STEP_OF[other] if other else STEP_OF["mechanisms"]
        assert step < STEP_OF[room], f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.count(".") > 1))
def test_siblings_do_not_import_each_other(module):
    for imported in imports_of(MODULES[module]) - {module}:
        if room_of(module) == "mechanisms":
            assert room_of(imported) != "mechanisms", f"{module} imports {imported}"
        if is_backend(module) and is_backend(imported):
            assert backend_of(module) == backend_of(imported), f"{module} imports {imported}"


def test_the_reference_shares_no_helper_with_what_it_judges():
    for module, path in MODULES.items():
        if is_backend(module) and backend_of(module)[1] == "reference":
            strangers = {i for i in imports_of(path) if room_of(i) not in ("selection", "notation")}
            assert not strangers, f"{module} imports {strangers}"


def test_there_is_no_import_cycle():
    """Top-level imports only: an import inside a function is bound to go down by the stairs."""
    edges = {m: imports_of(p, iter(tree_of(p).body)) - {m} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in edges[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", TESTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    name = str(path.relative_to(ROOT))
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= (FILE_LINES_HARD if name in LONG_FILES else FILE_LINES)
    for function, length in functions_of(path):
        allowed = f"{name}:{function}" in LONG_FUNCTIONS
        assert length <= (FUNCTION_LINES_HARD if allowed else FUNCTION_LINES), function


def test_exceptions_are_still_needed():
    for name in LONG_FILES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE_LINES, name
    for entry in LONG_FUNCTIONS:
        name, function = entry.split(":")
        lengths = [lines for found, lines in functions_of(ROOT / name) if found == function]
        assert max(lengths, default=0) > FUNCTION_LINES, entry


def test_there_is_no_drawer_for_everything():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [path for path in TESTED if path.stem in names]


def test_msa_can_be_read_in_one_sitting():
    """At most 6 modules say what MSA is: the mechanism, Selection and the four reference files.

    Their lines and those of the four doors are at most 700. Checks of arguments, the choice of a
    backend and its workspace say nothing about MSA and are not counted; nor are other backends and
    the native kernels.
    """
    reached: set[str] = set()
    waiting = ["openmsa.mechanisms.msa"]
    while waiting:
        module = waiting.pop()
        other_backend = is_backend(module) and backend_of(module)[1] != "reference"
        if module in reached or other_backend or room_of(module) in ("", "native"):
            continue
        reached.add(module)
        waiting += imports_of(MODULES[module])
    reached -= {
        f"openmsa.ops.{name}" for name in ("checks", "backend", "workspace", "native_calls", "gpu")
    }
    doors = {module for module in reached if MODULES[module].name == "__init__.py"}
    lines = sum(len(MODULES[m].read_text(encoding="utf-8").splitlines()) for m in reached)
    assert len(reached - doors) <= READING_MODULES, sorted(reached - doors)
    assert lines <= READING_LINES


PUBLIC = (
    "Selection",
    "select_blocks",
    "sparse_attention",
    "dense_attention",
    "index_loss",
    "msa_attention",
    "MSAConfig",
    "MSAOutput",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist(name):
    assert getattr(openmsa, name) is not None and name in openmsa.__all__


def test_the_overview_does_not_wait_for_torch():
    code = """
import sys
sys.modules["torch"] = None  # an import of it fails
from openmsa.cli import main
sys.exit(main(["--help"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "openmsa VERB" in run.stdout, run.stderr


def test_the_front_door_needs_torch_alone():
    """No package of ours beyond torch is loaded, even where it is installed."""
    absent = "transformers accelerate safetensors tokenizers datasets rich matplotlib pyarrow"
    code = f"""
import sys
for name in {absent.split()!r}:
    sys.modules[name] = None  # an import of it fails
import torch, openmsa
for name in openmsa.__all__:
    getattr(openmsa, name)
x = torch.ones(1, 5, 2, 4)
out = openmsa.msa_attention(x, x, x, x, x[:, :, 0], block_size=2, top_k=1)
assert out.out.shape == x.shape
from openmsa.cli import main
assert main(["env"]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_finished_and_reads_nothing_from_the_environment(path):
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "NotImplementedError", "os.environ", "getenv"):
        assert word not in text, f"{path.name} holds {word}"
